"""No more of the teacher's states exist than the student is about to read."""

import pytest

from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.testing.replayed_run import some_rollouts
from tests.helpers.training import megatron_update

HIDDEN, LAYERS, FLOAT = 64, 4, 4
SELECTED = [sum(rollout.response_mask) for rollout in some_rollouts(131)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [save(random_hf_model("Qwen3", seed=s, num_hidden_layers=LAYERS), folder / str(s)) for s in (0, 1)]


def held(world_size, models, *overrides):
    """The most bytes that each rank held at one time."""
    updates = run_distributed(world_size, megatron_update, *models, "batch.packing=false", *overrides)
    return [update.metrics["teacher/target_bytes"] for update in updates]


@pytest.mark.parametrize("overrides", [(), ("recompute.granularity=full",)])
def test_a_streamed_teacher_holds_one_micro_batch(models, overrides):
    assert held(1, models, *overrides) == [LAYERS * max(SELECTED) * HIDDEN * FLOAT]


def test_between_pipeline_stages_the_selected_rows_of_a_stages_layers_are_held(models):
    assert held(2, models, "parallel.pipeline=2") == [LAYERS // 2 * sum(SELECTED) * HIDDEN * FLOAT] * 2


def test_sequence_and_context_parallel_ranks_hold_their_own_rows(models):
    overrides = ("parallel.tensor=2", "parallel.sequence=true", "parallel.context=2", "parallel.pipeline=1")
    ranks = held(4, models, *overrides, "teacher.parallel={tensor: 1}")  # in its own layout: all rows at once
    assert sum(ranks) == LAYERS * sum(SELECTED) * HIDDEN * FLOAT
