"""Build the cases of `benchmarks/gpu.py`: random models and the function that is timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.gpu_flops import Flops, Modules, block_weights, forward_flops
from benchmarks.updates import AUTHORED, METHODS, Update, Workload, megatron_update
from megatron_oprd.config import Config
from megatron_oprd.launch.layouts import check_precision, plan_teacher
from megatron_oprd.models.build import DTYPES, ModelPart, build_model
from megatron_oprd.models.layer_plan import PlannedTeacher
from megatron_oprd.models.precision import Precision, plan_precision
from megatron_oprd.models.scaled_linear import quantize_weights
from megatron_oprd.models.targets import TeacherTargets
from megatron_oprd.parallel.topology import Topology, build_topology, start_process
from megatron_oprd.runtime.environment import Machine
from megatron_oprd.testing.random_update import fill_randomly
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.training.student import build_student
from megatron_oprd.training.student_step import accumulate_gradients, stage_loss, student_step
from megatron_oprd.training.teacher import Teacher, build_frozen
from megatron_oprd.training.teacher_pass import teacher_pass
from megatron_oprd.types import DeviceBatch

OPRD = "OPRD, last tokens"
COST_ON_TE = "cost with Transformer Engine"
Part = Literal[
    "student update",
    "teacher pass",
    "blocks, forward and backward",
    "blocks, forward",
    "cost with Transformer Engine",
    "cost",
]


@dataclass(frozen=True)
class Case:
    """A row of the table.

    `passes` is the work of a run in forward passes (0: operations are not counted), `repeated` the forward passes that
    recomputation adds.
    """

    part: Part
    name: str
    workload: Workload
    settings: tuple[str, ...] = ()  # overrides of the section `precision`
    modules: Modules = "bf16"
    passes: int = 0
    repeated: int = 0
    trained: int = 0  # parameters that the optimizer updates in a run
    in_a_row: int = 1  # runs without a wait between them, like the micro-batches of an update; the time is one run's

    @property
    def flops(self) -> Flops:
        return forward_flops(self.workload).times(self.passes)

    @property
    def bf16_blocks(self) -> int:
        """Return the number of blocks that stay in bf16."""
        return 0 if "keep_bf16" in " ".join(self.settings) else min(2, self.workload.layers)


@dataclass(frozen=True)
class Prepared:
    """A built case."""

    run: Update  # the function that is timed
    weights: int = 0  # bytes of the frozen model's weights


NOT_RECOMPUTED = ", without recomputation"
TE, OWN = "precision.attention=te", "precision.attention=sdpa"
BLOCKWISE = "precision.recipe=blockwise"
ALL_BLOCKS = ("precision.keep_bf16.first=0", "precision.keep_bf16.last=0")
STUDENTS: dict[str, tuple[Modules, tuple[str, ...]]] = {
    "bf16, Transformer Engine": ("bf16", (TE,)),
    "bf16, own modules": ("own", (OWN,)),
    "FP8 tensorwise": ("tensorwise", (TE, "precision.fp8=hybrid")),
    "FP8 blockwise": ("blockwise", (TE, "precision.fp8=hybrid", BLOCKWISE)),
}
# Only in the case of blocks: this recipe keeps no blocks in bf16.
DELAYED: tuple[Modules, tuple[str, ...]] = ("tensorwise", (TE, "precision.fp8=hybrid", "precision.recipe=delayed"))
TEACHERS: dict[str, tuple[Modules, tuple[str, ...]]] = {
    "bf16, Transformer Engine": ("bf16", (TE,)),
    "FP8 weights, tensorwise": ("tensorwise", (TE, "precision.teacher_fp8=weights")),
    "FP8 compute, tensorwise": ("tensorwise", (TE, "precision.teacher_fp8=compute")),
    "FP8 weights, blockwise": ("blockwise", (TE, "precision.teacher_fp8=weights", BLOCKWISE)),
    "bf16, own modules": ("own", (OWN,)),
}


def all_cases(model: Workload, blocks: Workload, lengths: Iterable[int]) -> list[Case]:
    """Return every case, the most important first: student update and teacher pass of `model`, FP8 against bf16 in
    `blocks` of another size, and each method's cost on one sequence of each of `lengths` tokens."""
    trained = block_weights(model) + model.vocabulary * model.hidden
    cases = [
        Case("student update", name + ending, model, settings, modules, passes=3, repeated=repeated, trained=trained)
        for repeated, ending in ((1, ""), (0, NOT_RECOMPUTED))
        for name, (modules, settings) in STUDENTS.items()
    ]
    cases += [
        Case("teacher pass", name, model, settings, modules, passes=1) for name, (modules, settings) in TEACHERS.items()
    ]
    parts: tuple[tuple[Part, int], ...] = (("blocks, forward and backward", 3), ("blocks, forward", 1))
    for name, (modules, settings) in {**STUDENTS, "FP8 delayed": DELAYED}.items():
        kept = ALL_BLOCKS if "FP8" in name else ()
        cases += [Case(part, name, blocks, settings + kept, modules, passes, in_a_row=4) for part, passes in parts]
    compared = (OPRD, "OPRD, all tokens", "top-16", "full KL", AUTHORED)
    cases += [Case(COST_ON_TE, method, model, (TE,)) for method in compared]
    for length in lengths:
        workload = dataclasses.replace(model, responses=(length - model.prompt,))
        cases += [Case("cost", method, workload) for method in [*METHODS, AUTHORED]]
    return cases


def prepare(case: Case, device: torch.device, machine: Machine) -> Prepared:
    """Build the models of a case.

    Raises:
        UserError: the machine does not support the case.
        torch.OutOfMemoryError: the models do not fit.
    """
    if case.part == "cost":
        return Prepared(megatron_update(case.workload, case.name, device))
    if case.part == COST_ON_TE:
        config = case.workload.config(case.name, *case.settings)
        precision = plan_precision(config.precision, config.parallel, machine)
        return Prepared(megatron_update(case.workload, case.name, device, precision))
    if case.part == "teacher pass":
        return teacher_case(Scene.of(case, device, machine))
    return student_case(Scene.of(case, device, machine), case.part)


@dataclass(frozen=True)
class Scene:
    """Configuration, layout and batch of a case."""

    workload: Workload
    config: Config
    precision: Precision
    topology: Topology
    planned: PlannedTeacher
    global_batch: GlobalBatch
    micro_batches: list[DeviceBatch]

    @classmethod
    def of(cls, case: Case, device: torch.device, machine: Machine) -> Scene:
        """Build the scene of a case; start a process group of one process if there is none."""
        workload, spec = case.workload, case.workload.spec
        recompute = "full" if case.repeated else "none"
        config = workload.config(OPRD, f"recompute.granularity={recompute}", *case.settings)
        planned = plan_teacher(config, spec, spec)
        precision = plan_precision(config.precision, config.parallel, machine)
        check_precision(config, precision, spec, planned.plan.student_stages, {"": planned})
        start_process(device)
        topology = build_topology(config.parallel, device, seed=0)
        rollouts = tuple(workload.rollouts())
        teachers = (0,) * len(rollouts)
        global_batch = GlobalBatch(rollouts, teachers, config.loss, config.batch, spec, precision.pad_tokens)
        micro_batches = global_batch.micro_batches(topology)
        return cls(workload, config, precision, topology, planned, global_batch, micro_batches)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.precision.dtype]


def student_case(scene: Scene, part: Part) -> Prepared:
    """Prepare the student's part of an update on random targets, with or without the optimizer step."""
    config, topology, plan, batches = scene.config, scene.topology, scene.planned.plan, scene.micro_batches
    stage = build_model(
        scene.workload.spec,
        topology,
        scene.dtype,
        ModelPart(plan.student_stages),
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
        student_step(student, scene.global_batch, batches, targets())

    def passes() -> None:
        tap = stage_loss(student, config.loss, batches[0], targets().of(0))
        accumulate_gradients(student, batches, [tap])

    def forward() -> None:
        run_teacher(Teacher(lambda: stage, topology, plan, scene.workload.hidden), scene)

    of_part: dict[Part, Update] = {
        "student update": update,
        "blocks, forward and backward": passes,
        "blocks, forward": forward,
    }
    return Prepared(of_part[part])


def teacher_case(scene: Scene) -> Prepared:
    """Prepare a teacher pass over the micro-batch."""
    stage = frozen_teacher(scene)
    teacher = Teacher(lambda: stage, scene.topology, scene.planned.plan, scene.workload.hidden)
    return Prepared(lambda: run_teacher(teacher, scene), held_bytes(stage))


def frozen_teacher(scene: Scene) -> torch.nn.ModuleList:
    """Build a frozen teacher as `train` does, with random weights."""
    precision = scene.precision.teacher
    stage = build_frozen(scene.planned, scene.topology, scene.dtype, precision)
    fill_randomly(stage)
    if precision.scaled_weights:
        quantize_weights(stage, precision.keep_bf16)
    stage.eval().requires_grad_(False)
    return stage


def run_teacher(teacher: Teacher, scene: Scene) -> None:
    targets, _ = teacher_pass([teacher], scene.global_batch, scene.micro_batches, scene.topology)
    micro_batch_targets = targets.of(0)  # a streamed teacher runs here, once
    for layer in micro_batch_targets:
        micro_batch_targets.take(layer)


def held_bytes(model: torch.nn.Module, belongs: Callable[[str], bool] = lambda name: True) -> int:
    """Return the bytes of the parameters whose names satisfy `belongs`.

    Transformer Engine's FP8 parameters report bf16 as their dtype, so their data, transposed copy and scales are
    counted.
    """
    total = 0
    for name, parameter in model.named_parameters():
        if not belongs(name):
            continue
        own = {key: value for key, value in vars(parameter).items() if torch.is_tensor(value)}
        parts = [value for key, value in own.items() if key.endswith(("_data", "_transpose", "_scale_inv"))]
        total += sum(part.numel() * part.element_size() for part in parts or [parameter])
    return total
