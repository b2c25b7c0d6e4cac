"""Build a run on stored rollouts, without files but the models, for tests that take a training step.

The settings make one step easy to check: SGD moves every weight by LEARNING_RATE times its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_oprd.bridge.origin import expected_origin, load_bridge
from megatron_oprd.config import Config, load_config
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.launch.assemble import Run, build_run
from megatron_oprd.launch.inputs import Inputs
from megatron_oprd.launch.layouts import plan_teacher, world_size
from megatron_oprd.launch.missing_inputs import MissingInputs
from megatron_oprd.launch.setup import Setup
from megatron_oprd.models.precision import Precision
from megatron_oprd.types import Rollout

# One step at this rate moves the weights by far more than float32 rounding, so that the change shows the gradient.
LEARNING_RATE = 1e4
PRECISION = Precision()  # of `make_inputs`
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
# Response masks: uneven lengths, an empty response, and a response with tokens that the student did not sample.
SOME = ((1,) * 7, (), (1,), (1, 1, 0, 0, 1, 1, 1, 1, 0, 1), (1,) * 5)
FEW = ((1,) * 6, ())  # one sequence with response tokens
MANY = (*SOME, *((1,) * (3 * number % 11) for number in range(1, 36)))  # several micro-batches on each of eight ranks

Teachers = Path | dict[str, Path]  # one teacher, or several by the data_source that each of them teaches


def some_rollouts(vocab_size: int, seed: int = 5, masks: Sequence[tuple[int, ...]] = SOME) -> list[Rollout]:
    """Return rollouts of random token ids with the given response masks and prompts of one to five tokens."""
    generator = torch.Generator().manual_seed(seed)
    rollouts = []
    for number, mask in enumerate(masks):
        prompt = torch.randint(0, vocab_size, (1 + number % 5,), generator=generator).tolist()
        response = torch.randint(0, vocab_size, (len(mask),), generator=generator).tolist()
        rollouts.append(Rollout(tuple(prompt), tuple(response), mask, "replay"))
    return rollouts


def make_config(student: Path, teacher: Teachers, *overrides: str) -> Config:
    """Return a configuration with SETTINGS and these models; `overrides` win."""
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


def build_replayed_run(
    student: Path, teacher: Teachers, *overrides: str, rollouts: Sequence[Rollout] | None = None
) -> Run:
    """Build a run before its first step. Without `rollouts`, they are `some_rollouts`. Collective over the world."""
    rollouts = some_rollouts(read_model_spec(student).vocab_size) if rollouts is None else rollouts
    config = make_config(student, teacher, *overrides, f"rollout.prompts_per_step={len(rollouts)}")
    return build_run(make_inputs(config, rollouts))
