"""What `benchmarks/gpu.py` measures: a case builds its models, random, and gives what is to be run again and again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.gpu_flops import Flops, Modules, block_weights, forward_flops
from benchmarks.updates import AUTHORED, METHODS, Update, Workload, fill_randomly, megatron_update
from megatron_oprd.config import Config
from megatron_oprd.launch.layouts import check_precision, plan_teacher
from megatron_oprd.models.build import DTYPES, build_model
from megatron_oprd.models.layer_plan import PlannedTeacher
from megatron_oprd.models.precision import Precision, plan_precision
from megatron_oprd.models.scaled_linear import quantize_weights
from megatron_oprd.models.targets import TeacherTargets
from megatron_oprd.parallel.topology import Topology, build_topology, start_process
from megatron_oprd.runtime.environment import Machine
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.training.student import build_student
from megatron_oprd.training.student_step import accumulate_gradients, stage_loss, student_step
from megatron_oprd.training.teacher_pass import Teacher, build_frozen, teacher_pass
from megatron_oprd.types import PackedBatch

OPRD = "OPRD, last tokens"
Part = Literal["student update", "teacher pass", "blocks, forward and backward", "blocks, forward", "cost"]


@dataclass(frozen=True)
class Case:
    """One line of the table. `passes`: forward passes' worth of the model's work in a run (0: not followed), and
    `repeated` of what recomputation adds."""

    part: Part
    name: str
    workload: Workload
    settings: tuple[str, ...] = ()  # of `precision`
    modules: Modules = "bf16"
    passes: int = 0
    repeated: int = 0
    trained: int = 0  # parameters that a run steps

    @property
    def flops(self) -> Flops:
        return forward_flops(self.workload).times(self.passes)

    @property
    def bf16_blocks(self) -> int:
        """Blocks that FP8 leaves out."""
        return 0 if "keep_bf16" in " ".join(self.settings) else min(2, self.workload.layers)


@dataclass(frozen=True)
class Prepared:
    """A case that is built."""

    run: Update
    weights: int = 0  # bytes of the frozen model's


TE, OWN = "precision.attention=te", "precision.attention=sdpa"
BLOCKWISE = "precision.recipe=blockwise"
ALL_BLOCKS = ("precision.keep_bf16.first=0", "precision.keep_bf16.last=0")
STUDENTS: dict[str, tuple[Modules, tuple[str, ...]]] = {
    "bf16, Transformer Engine": ("bf16", (TE,)),
    "bf16, own modules": ("own", (OWN,)),
    "FP8 tensorwise": ("tensorwise", (TE, "precision.fp8=hybrid")),
    "FP8 blockwise": ("blockwise", (TE, "precision.fp8=hybrid", BLOCKWISE)),
}
TEACHERS: dict[str, tuple[Modules, tuple[str, ...]]] = {
    "bf16, Transformer Engine": ("bf16", (TE,)),
    "FP8 weights, tensorwise": ("tensorwise", (TE, "precision.teacher_fp8=weights")),
    "FP8 compute, tensorwise": ("tensorwise", (TE, "precision.teacher_fp8=compute")),
    "FP8 weights, blockwise": ("blockwise", (TE, "precision.teacher_fp8=weights", BLOCKWISE)),
    "FP8 weights, own modules": ("scaled_mm", (OWN, "precision.teacher_fp8=weights")),
    "bf16, own modules": ("own", (OWN,)),
}


def all_cases(model: Workload, blocks: Workload, lengths: Iterable[int]) -> list[Case]:
    """Every case, the most wanted first: the student's update and the teacher's pass of `model`, FP8 against bf16 in
    `blocks` of another size, and the cost of each method with one sequence of each of `lengths`."""
    trained = block_weights(model) + model.vocabulary * model.hidden
    cases = [
        Case("student update", name, model, settings, modules, passes=3, repeated=1, trained=trained)
        for name, (modules, settings) in STUDENTS.items()
    ]
    cases += [
        Case("teacher pass", name, model, settings, modules, passes=1) for name, (modules, settings) in TEACHERS.items()
    ]
    parts: tuple[tuple[Part, int], ...] = (("blocks, forward and backward", 3), ("blocks, forward", 1))
    for name, (modules, settings) in STUDENTS.items():
        kept = ALL_BLOCKS if "FP8" in name else ()
        cases += [Case(part, name, blocks, settings + kept, modules, passes=passes) for part, passes in parts]
    for length in lengths:
        workload = dataclasses.replace(model, responses=(length - model.prompt,))
        cases += [Case("cost", method, workload) for method in [*METHODS, AUTHORED]]
    return cases


def prepare(case: Case, device: torch.device, machine: Machine) -> Prepared:
    """Build the case's models. Raises UserError for what the machine cannot do, torch's OutOfMemoryError."""
    if case.part == "cost":
        return Prepared(megatron_update(case.workload, case.name, device))
    if case.part == "teacher pass":
        return teacher_reading(Scene.of(case, device, machine))
    return student_training(Scene.of(case, device, machine), case.part)


@dataclass(frozen=True)
class Scene:
    """What stands around the models of a case."""

    workload: Workload
    config: Config
    precision: Precision
    topology: Topology
    planned: PlannedTeacher
    whole: GlobalBatch
    batches: list[PackedBatch]

    @classmethod
    def of(cls, case: Case, device: torch.device, machine: Machine) -> Scene:
        """Joins the process group of one, where that has not been done."""
        workload, spec = case.workload, case.workload.spec
        recompute = "full" if case.repeated else "none"
        config = workload.config(OPRD, f"recompute.granularity={recompute}", *case.settings)
        planned = plan_teacher(config, spec, spec)
        precision = plan_precision(config.precision, config.parallel, machine)
        check_precision(config, precision, spec, {"": planned})
        start_process(device)
        topology = build_topology(config.parallel, device, seed=0)
        rollouts = tuple(workload.rollouts())
        whole = GlobalBatch(rollouts, (0,) * len(rollouts), config.loss, precision.pad_tokens)
        batches = whole.micro_batches(config.batch, spec, topology)
        return cls(workload, config, precision, topology, planned, whole, batches)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.precision.dtype]


def student_training(scene: Scene, part: Part) -> Prepared:
    """The student's part of an update, against states that are there: its passes, and but for blocks alone its step."""
    config, topology, plan, batches = scene.config, scene.topology, scene.planned.plan, scene.batches
    stage = build_model(
        scene.workload.spec,
        topology,
        scene.dtype,
        stages=plan.student_stages,
        recompute=config.recompute,
        precision=scene.precision.student,
    )
    fill_randomly(stage)
    student = build_student(stage, config, plan, topology)
    layers = plan.readers(topology.stages)
    count = len(batches[0].representation)
    states = torch.randn(count, scene.workload.hidden, dtype=scene.dtype, device=topology.device)

    def targets() -> TeacherTargets:
        made = TeacherTargets(layers, topology.device)
        made.put(0, dict.fromkeys(layers, states))
        return made

    def update() -> None:
        student_step(student, topology, plan, config.loss, scene.whole, batches, targets())

    def passes() -> None:
        tap = stage_loss(plan, config.loss, batches[0], targets(), 0, None)
        accumulate_gradients(student, topology, plan, batches, [tap])

    def forward() -> None:
        read_through(Teacher(lambda: stage, topology, plan, scene.workload.hidden), scene)

    of_part: dict[Part, Update] = {
        "student update": update,
        "blocks, forward and backward": passes,
        "blocks, forward": forward,
    }
    return Prepared(of_part[part])


def teacher_reading(scene: Scene) -> Prepared:
    """The teacher's pass over the micro-batch."""
    stage = frozen_teacher(scene)
    teacher = Teacher(lambda: stage, scene.topology, scene.planned.plan, scene.workload.hidden)
    return Prepared(lambda: read_through(teacher, scene), held_bytes(stage))


def frozen_teacher(scene: Scene) -> torch.nn.ModuleList:
    """A random teacher as `train` builds it."""
    precision = scene.precision.teacher
    stage = build_frozen(scene.planned, scene.topology, scene.dtype, precision)
    fill_randomly(stage)
    if precision.scaled_weights:
        quantize_weights(stage, precision.keep_bf16)
    stage.eval().requires_grad_(False)
    return stage


def read_through(teacher: Teacher, scene: Scene) -> None:
    targets, _ = teacher_pass([teacher], scene.topology, scene.batches, lambda number: scene.batches)
    targets.of(0)  # made now
    for layer in targets.layers:
        targets.take(0, layer)


def held_bytes(model: torch.nn.Module, belongs: Callable[[str], bool] = lambda name: True) -> int:
    """Bytes of the parameters whose names `belongs` says yes to. One of Transformer Engine's in FP8 says that it is of
    bf16: what it has is its data, a transposed copy if there is one, and scales."""
    total = 0
    for name, parameter in model.named_parameters():
        if not belongs(name):
            continue
        own = {key: value for key, value in vars(parameter).items() if torch.is_tensor(value)}
        parts = [value for key, value in own.items() if key.endswith(("_data", "_transpose", "_scale_inv"))]
        total += sum(part.numel() * part.element_size() for part in parts or [parameter])
    return total
