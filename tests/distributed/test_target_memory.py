"""Only the teacher states that the student still needs are in memory."""

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


def peak_bytes(world_size, models, *overrides):
    """Return the peak bytes of targets on each rank."""
    updates = run_distributed(world_size, megatron_update, *models, "batch.packing=false", *overrides)
    return [update.metrics["teacher/target_bytes"] for update in updates]


@pytest.mark.parametrize("overrides", [(), ("recompute.granularity=full",)])
def test_a_streamed_teacher_keeps_the_targets_of_one_micro_batch(models, overrides):
    assert peak_bytes(1, models, *overrides) == [LAYERS * max(SELECTED) * HIDDEN * FLOAT]


def test_a_pipeline_stage_keeps_the_selected_rows_of_its_own_layers(models):
    assert peak_bytes(2, models, "parallel.pipeline=2") == [LAYERS // 2 * sum(SELECTED) * HIDDEN * FLOAT] * 2


def test_sequence_and_context_parallel_ranks_keep_their_own_rows(models):
    overrides = ("parallel.tensor=2", "parallel.sequence=true", "parallel.context=2", "parallel.pipeline=1")
    ranks = peak_bytes(4, models, *overrides, "teacher.parallel={tensor: 1}")  # in its own layout: all rows at once
    assert sum(ranks) == LAYERS * sum(SELECTED) * HIDDEN * FLOAT
