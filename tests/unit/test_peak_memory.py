"""The dry run's prediction: the rollouts that it takes for the fullest, the ranks that it takes for alike, and what it
says of an update that cannot be traced."""

import sys

import pytest

from megatron_oprd.config import load_config
from megatron_oprd.launch.layouts import plan_teacher
from megatron_oprd.launch.lengths import Lengths
from megatron_oprd.planning.peak_memory import NotTraced, alike, fullest_micro_batch, predict_peaks
from tests.helpers.specs import tiny_spec


def config_of(*overrides):
    paths = [f"{key}=unused" for key in ("student.path", "teacher.path", "train.run_dir", "rollout.path")]
    return load_config(None, [*paths, "rollout.engine=replay", *overrides])


LENGTHS = Lengths(sequence=100, response=80)
# Settings, processes, then the tokens of each sequence of the fullest micro-batch, and how many of those a step has.
# A step has 16 rollouts.
BATCHES = {
    "the longest fill it": (["positions=all"], 250, 1, [84, 83, 83], 6),
    "shorter ones, of which the loss reads as much": (["positions=last_k", "k=24"], 250, 1, [25] * 10, 2),
    "no more than there are": (["positions=last"], 320, 1, [20] * 16, 1),
    "no more than a replica has": (["positions=last_k", "k=24"], 1000, 8, [100] * 2, 1),
    "one too long for all": (["positions=all"], 90, 1, [90], 16),
}


@pytest.mark.parametrize("name", BATCHES)
def test_the_fullest_micro_batch_has_the_most_to_read(name):
    settings, room, world, sizes, count = BATCHES[name]
    config = config_of(*(f"loss.representation.{one}" for one in settings), f"batch.max_tokens_per_micro_batch={room}")
    rollouts, micro_batches = fullest_micro_batch(config, LENGTHS, world=world)
    assert [len(one.prompt_ids) + len(one.response_ids) for one in rollouts] == sizes
    assert micro_batches == count
    assert all(0 < len(one.response_ids) <= LENGTHS.response and one.prompt_ids for one in rollouts)


def test_a_pipeline_is_filled_with_the_longest():
    config = config_of("parallel.pipeline=2", "loss.representation.k=24", "batch.max_tokens_per_micro_batch=250")
    rollouts, micro_batches = fullest_micro_batch(config, LENGTHS, world=2)
    assert (len(rollouts), micro_batches) == (3, 6)


def test_without_packing_a_micro_batch_is_one_sequence():
    config = config_of("batch.packing=false", "batch.max_tokens_per_micro_batch=250")
    rollouts, micro_batches = fullest_micro_batch(config, LENGTHS, world=1)
    assert (len(rollouts), micro_batches) == (1, 16)


def test_ranks_are_alike_that_hold_the_same_stages():
    assert alike(1, [1, 1]) == [range(1)]
    assert alike(8, [2, 1]) == [range(4), range(4, 8)]
    assert alike(8, [2, 4]) == [range(2), range(2, 4), range(4, 6), range(6, 8)]


def test_every_kind_of_rank_has_its_peak(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    config, spec = config_of("parallel.pipeline=2"), tiny_spec(num_layers=3, vocab_size=1024)
    peaks = predict_peaks(config, spec, [plan_teacher(config, spec, spec)], LENGTHS, world=4)
    assert list(peaks) == [range(2), range(2, 4)]
    first, last = peaks.values()
    assert first.weights > last.weights > 0  # two blocks and the embedding; one block and the head
    assert first.targets > last.targets > 0


def test_what_cannot_be_traced_says_why(monkeypatch):
    config, spec = config_of(), tiny_spec()
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(NotTraced, match="exit code 1"):
        predict_peaks(config, spec, [plan_teacher(config, spec, spec)], LENGTHS, world=1)
