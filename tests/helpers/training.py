"""One update of a tiny student by the package, and by Hugging Face's models under the float64 reference."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from megatron_oprd.bridge.origin import expected_origin, load_bridge
from megatron_oprd.config import Config, load_config
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.export import gather_hf_tensors
from megatron_oprd.hf.load import named_parameters, parameter_table
from megatron_oprd.launch.assemble import Run, build_run
from megatron_oprd.launch.inputs import Inputs
from megatron_oprd.launch.layouts import plan_teacher, world_size
from megatron_oprd.launch.missing_inputs import MissingInputs
from megatron_oprd.launch.setup import Setup
from megatron_oprd.models.precision import Precision
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.train import one_step
from megatron_oprd.training import overlap
from megatron_oprd.training import student as student_module
from megatron_oprd.training.overlap import wait_for_gather
from megatron_oprd.training.state import TrainState
from megatron_oprd.types import Rollout

# A rate at which one step moves the weights by far more than a float32 rounding of them: the change is the gradient.
LEARNING_RATE = 1e4
LOSS_TOLERANCE = 1e-6
PRECISION = Precision()  # of `make_inputs`
BUCKET_PARAMETERS = 4_000  # most matrices of the tiny models have one each
SETTINGS = (
    "train.run_dir=unused",
    "rollout.engine=replay",
    "rollout.path=unused",
    "rollout.samples_per_prompt=1",
    "precision.dtype=fp32",
    "optimizer.name=sgd",
    f"optimizer.lr={LEARNING_RATE}",
    "optimizer.schedule=constant",
    "optimizer.clip_grad=0",
    "train.steps=1",
    "batch.max_tokens_per_micro_batch=16",
)


# AdamW without memory or decay, under an epsilon far above any gradient: its step is the gradient too.
ADAM_EPSILON = 2.0**27
ADAMW = (
    "optimizer.name=adamw",
    "optimizer.betas=[0.0,0.0]",
    "optimizer.weight_decay=0",
    f"optimizer.lr={LEARNING_RATE * ADAM_EPSILON}",
)

# Response masks. Uneven lengths, an empty response, and one with tokens in between that the student did not sample.
SOME = ((1,) * 7, (), (1,), (1, 1, 0, 0, 1, 1, 1, 1, 0, 1), (1,) * 5)
FEW = ((1,) * 6, ())  # one sequence to learn from
MANY = (*SOME, *((1,) * (3 * number % 11) for number in range(1, 36)))  # several micro-batches on each of eight ranks


def some_rollouts(vocab_size: int, seed: int = 5, masks: Sequence[tuple[int, ...]] = SOME) -> list[Rollout]:
    """Random token ids under the given response masks, after prompts of one to five tokens."""
    generator = torch.Generator().manual_seed(seed)
    rollouts = []
    for number, mask in enumerate(masks):
        prompt = torch.randint(0, vocab_size, (1 + number % 5,), generator=generator).tolist()
        response = torch.randint(0, vocab_size, (len(mask),), generator=generator).tolist()
        rollouts.append(Rollout(tuple(prompt), tuple(response), mask, "replay"))
    return rollouts


@dataclass(frozen=True)
class Update:
    """What one step did: the change over -lr of every Hugging Face tensor that moved, the loss and the norm.

    `magnitude`, of the reference: the loss with the absolute value of every token's term. It is larger where terms have
    both signs (`sampled`, `topk_surrogate`) and may nearly cancel; rounding goes by it, not by what they leave.
    """

    loss: float
    grad_norm: float
    metrics: dict[str, float]
    gradients: dict[str, torch.Tensor]
    magnitude: float | None = None


Teachers = Path | dict[str, Path]  # one, or several by the data_source that they teach


def make_config(student: Path, teacher: Teachers, *overrides: str) -> Config:
    named = {f"teachers.{name}": path for name, path in teacher.items()} if isinstance(teacher, dict) else {}
    paths = [f"{key}.path={path}" for key, path in (named or {"teacher": teacher}).items()]
    return load_config(None, [f"student.path={student}", *paths, *SETTINGS, *overrides])


def make_inputs(config: Config, rollouts: Sequence[Rollout]) -> Inputs:
    """Return the inputs of a replayed run with the given rollouts, without reading them from a file."""
    student = read_model_spec(config.student.path)
    teachers = {
        name: plan_teacher(config, student, read_model_spec(teacher.path), name)
        for name, teacher in config.named_teachers.items()
    }
    stages = next(iter(teachers.values())).plan.student_stages
    bridge = origin = None
    if config.loss.representation.bridge is not None:
        (teacher,) = teachers.values()
        origin = expected_origin(config, student, teacher, (None, None))
        bridge = load_bridge(config, teacher.plan.pairs, origin)
    return Inputs(
        config=config,
        setup=Setup(student, stages, teachers, PRECISION, world_size(), None),
        tokenizer=None,
        aligner=None,
        prompts=None,
        evaluation_prompts=None,
        replayed=list(rollouts),
        bridge=bridge,
        bridge_origin=origin,
        missing=MissingInputs(),
    )


def megatron_update(
    rank: int, student: Path, teacher: Teachers, *overrides: str, rollouts: Sequence[Rollout] | None = None
) -> Update:
    """One step of the package on this rank, from rollouts to the moved weights; the gradients, whole, on rank 0."""
    return update_of(make_run(student, teacher, *overrides, rollouts=rollouts))


def make_run(student: Path, teacher: Teachers, *overrides: str, rollouts: Sequence[Rollout] | None = None) -> Run:
    """A run that has not stepped yet. Collective over the world."""
    rollouts = some_rollouts(read_model_spec(student).vocab_size) if rollouts is None else rollouts
    config = make_config(student, teacher, *overrides, f"rollout.prompts_per_step={len(rollouts)}")
    with _adam_epsilon() if config.optimizer.name == "adamw" else contextlib.nullcontext():
        return build_run(make_inputs(config, rollouts))


def update_of(run: Run) -> Update:
    """The first step of a run. Collective over the world."""
    parameters = named_parameters(run.student.stage)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    _, metrics, _ = one_step(run, TrainState())
    wait_for_gather(run.student.ddp)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_((before[name] - parameter) / LEARNING_RATE)
    assert_copies_agree(parameters, run)
    changes = dict(gather_hf_tensors(run.student.stage, run.inputs.setup.student, run.topology))
    return Update(metrics["loss"], metrics["grad_norm"], metrics, changes)


def undone_step(run: Run) -> None:
    """A step whose change of the weights is taken back. Collective over the world."""
    parameters = named_parameters(run.student.stage)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    one_step(run, TrainState())
    wait_for_gather(run.student.ddp)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(before[name])


@contextlib.contextmanager
def small_buckets() -> Iterator[None]:
    """DDP built inside cuts gradients into buckets that tiny models fill too."""
    original = overlap.DistributedDataParallelConfig
    patched = functools.partial(original, bucket_size=BUCKET_PARAMETERS)
    with mock.patch.object(overlap, "DistributedDataParallelConfig", patched):
        yield


@contextlib.contextmanager
def _adam_epsilon() -> Iterator[None]:
    """Optimizers built inside have ADAM_EPSILON, which no key of the configuration sets."""
    original = student_module.MegatronOptimizerConfig
    patched = functools.partial(original, adam_eps=ADAM_EPSILON)
    with mock.patch.object(student_module, "MegatronOptimizerConfig", patched):
        yield


def assert_copies_agree(parameters: dict[str, torch.Tensor], run: Run) -> None:
    """What several ranks hold is the same on all of them, bit for bit."""
    table, topology = parameter_table(run.inputs.setup.student), run.topology
    mine = {}
    for name, parameter in parameters.items():
        entry = table[name]
        digest = hashlib.sha256(parameter.detach().float().contiguous().numpy().tobytes()).hexdigest()
        mine[entry.megatron, topology.tensor_rank if entry.cut else 0, digest] = topology.rank
    held = {}
    for of_rank in gather_objects(mine, torch.distributed.group.WORLD):
        for (name, shard, digest), rank in of_rank.items():
            first, owner = held.setdefault((name, shard), (digest, rank))
            assert digest == first, f"{name} differs between ranks {owner} and {rank}"


@dataclass(frozen=True)
class Difference:
    """How far one update is from another, relative to the other; `parameter` is the one of the worst gradient."""

    loss: float
    grad_norm: float
    gradient: float  # infinite: a parameter that moved without a gradient, or is not there
    parameter: str
    cosine: float  # the smallest of a parameter

    def explain(self, tolerance: float = 1e-5) -> str | None:
        """The first thing that is too far off, or None."""
        if not self.loss <= LOSS_TOLERANCE:
            return f"loss: relative error {self.loss:.1e}"
        if not self.gradient <= tolerance:
            return f"{self.parameter}: relative error {self.gradient:.1e}"
        return None if self.grad_norm <= tolerance else f"gradient norm: relative error {self.grad_norm:.1e}"


def difference(actual: Update, expected: Update) -> Difference:
    """Between the update of rank 0 and the reference's. What has no gradient there must not have moved."""
    worst, parameter, cosine = -1.0, "", 1.0
    for name in sorted({*actual.gradients, *expected.gradients}):
        gradient, change = expected.gradients.get(name), actual.gradients.get(name)
        if gradient is None or not gradient.any():
            error = float("inf") if change is not None and change.any() else 0.0
        elif change is None or change.shape != gradient.shape:
            error = float("inf")
        else:
            change, scale = change.double(), gradient.norm()
            error = torch.nan_to_num((change - gradient).norm() / scale, nan=float("inf")).item()
            cosine = min(cosine, ((change * gradient).sum() / (change.norm() * scale).clamp_min(1e-300)).item())
        if error > worst:
            worst, parameter = error, name
    loss = (actual.loss - expected.loss) / (expected.magnitude or expected.loss)
    norm = (actual.grad_norm - expected.grad_norm) / expected.grad_norm
    return Difference(abs(loss), abs(norm), worst, parameter, cosine)


def assert_same_update(actual: Update, expected: Update, tolerance: float = 1e-5) -> None:
    """Loss, norm and every parameter's gradient, of the update of rank 0."""
    found = difference(actual, expected)
    assert found.explain(tolerance) is None, found
