"""A plan counts the student's answers in evaluations like rollouts with the same prompts and lengths."""

import dataclasses

import pytest

from megatron_oprd.launch.lengths import Lengths
from megatron_oprd.planning.evaluation_plan import evaluation_run, evaluation_seconds
from megatron_oprd.planning.hardware import H100
from megatron_oprd.planning.memory_plan import EVALUATES, GENERATES, MemoryPlan
from megatron_oprd.planning.plan_device import PlanDevice
from megatron_oprd.planning.rollout_memory import plan_cache
from megatron_oprd.planning.step_time import estimate_step
from megatron_oprd.planning.update_trace import Footprint
from tests.helpers.planning import LENGTHS, dense_spec, planned_run, replay_config

SPEC = dense_spec(layers=2, hidden=128, vocabulary=512)
EVALUATION = ("evaluation.every=5", "evaluation.data=[unused]", "evaluation.samples=2", "evaluation.max_new_tokens=100")
PROMPTS = (30, 50, 20)


def run_with(*settings, lengths=LENGTHS, prompts=PROMPTS):
    run = planned_run(replay_config(512, "data.prompts=[unused]", *settings), SPEC, lengths=lengths)
    return dataclasses.replace(run, evaluation_prompts=prompts)


@pytest.mark.parametrize("engine", ["megatron", "replay"])
def test_an_evaluation_is_planned_like_rollouts_of_its_size(engine):
    evaluated = run_with(*EVALUATION, f"rollout.engine={engine}")
    sizes = ("rollout.prompts_per_step=3", "rollout.samples_per_prompt=2", "rollout.max_new_tokens=100")
    equal = run_with("rollout.engine=megatron", *sizes, lengths=Lengths(150, 100, 150))
    cache = plan_cache(evaluation_run(evaluated), 0)
    assert cache == plan_cache(equal, 0) and (cache.rows, cache.length) == (6, 150)
    assert evaluation_seconds(evaluated, H100) == estimate_step(equal).rollout_seconds > 0


def test_the_largest_phase_may_be_an_evaluation():
    config = replay_config(512, "checkpoint.every=0")
    device = PlanDevice("cpu", "a CPU", 10**12, 1, 10, 10**12, None)
    peak = Footprint(weights=100, activations=60)
    rollouts, answers = (plan_cache(evaluation_run(run_with(*EVALUATION, prompts=n * PROMPTS)), 0) for n in (1, 2))
    memory = MemoryPlan({range(1): peak}, rollouts, device, config, evaluation_cache=answers)
    assert memory.phase == EVALUATES and memory.needed == 110 + 2 * rollouts.num_bytes
    assert memory.phases(peak)[GENERATES] == 110 + rollouts.num_bytes


@pytest.mark.parametrize("setting", ["evaluation.every=0", "evaluation.samples=0"])
def test_without_answers_of_the_student_nothing_is_planned(setting):
    run = run_with(*EVALUATION, setting)
    assert evaluation_run(run) is None and evaluation_seconds(run, H100) is None
    assert evaluation_run(run_with(*EVALUATION, prompts=())) is None
