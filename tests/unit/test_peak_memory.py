"""The dry run traces the fullest micro-batch, once for each group of ranks with the same stages."""

import sys

import pytest
import torch

from megatron_oprd.launch.lengths import Lengths
from megatron_oprd.planning import peak_memory
from megatron_oprd.planning.peak_memory import NotTraced, fullest_micro_batch, groups_of_ranks, predict_peaks
from megatron_oprd.testing.distributed import result_of
from tests.helpers.planning import planned_run, replay_config
from tests.helpers.specs import tiny_spec

LENGTHS = Lengths(sequence=100, response=80)


def run_of(tokens, world_size, *overrides):
    """Return a run of 16 rollouts per step."""
    return planned_run(
        replay_config(tokens, *overrides), tiny_spec(num_layers=3, vocab_size=1024), world_size, lengths=LENGTHS
    )


# Settings, tokens of a micro-batch, processes; then the tokens of each sequence of the fullest micro-batch, and the
# number of micro-batches in a step.
BATCHES = {
    "all tokens selected: the longest rollouts": (["positions=all"], 250, 1, [84, 83, 83], 6),
    "last k selected: many short rollouts": (["positions=last_k", "k=24"], 250, 1, [25] * 10, 2),
    "as many rollouts as a step has": (["positions=last"], 320, 1, [20] * 16, 1),
    "as many rollouts as a replica has": (["positions=last_k", "k=24"], 1000, 8, [100] * 2, 1),
    "a rollout longer than a micro-batch is cut": (["positions=all"], 90, 1, [90], 16),
}


@pytest.mark.parametrize("name", BATCHES)
def test_the_fullest_micro_batch_has_the_most_selected_tokens(name):
    settings, tokens, world_size, sizes, count = BATCHES[name]
    run = run_of(tokens, world_size, *(f"loss.representation.{setting}" for setting in settings))
    rollouts, micro_batches = fullest_micro_batch(run)
    assert [len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts] == sizes
    assert micro_batches == count
    assert all(0 < len(rollout.response_ids) <= LENGTHS.response and rollout.prompt_ids for rollout in rollouts)


def test_a_pipeline_gets_the_longest_rollouts():
    rollouts, micro_batches = fullest_micro_batch(run_of(250, 2, "parallel.pipeline=2", "loss.representation.k=24"))
    assert (len(rollouts), micro_batches) == (3, 6)


def test_without_packing_a_micro_batch_is_one_sequence():
    rollouts, micro_batches = fullest_micro_batch(run_of(250, 1, "batch.packing=false"))
    assert (len(rollouts), micro_batches) == (1, 16)


def test_ranks_with_the_same_pipeline_ranks_form_a_group():
    assert groups_of_ranks(1, [1, 1]) == [range(1)]
    assert groups_of_ranks(8, [2, 1]) == [range(4), range(4, 8)]
    assert groups_of_ranks(8, [2, 4]) == [range(2), range(2, 4), range(4, 6), range(6, 8)]


def test_every_group_of_ranks_has_a_footprint():
    peaks = result_of(predict_peaks, run_of(8192, 4, "parallel.pipeline=2"))
    assert list(peaks) == [range(2), range(2, 4)]
    first, last = peaks.values()
    assert first.weights > last.weights > 0  # two layers and the embedding; one layer and the head
    assert first.targets > last.targets > 0


def test_the_new_process_of_a_machine_with_cuda_traces_the_same(monkeypatch):
    run = run_of(8192, 1)
    forked = result_of(predict_peaks, run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert predict_peaks(run) == forked


def test_a_failed_trace_says_why(monkeypatch):
    run = run_of(8192, 1)
    with monkeypatch.context() as patch:
        patch.setattr(peak_memory.dist, "is_initialized", lambda: False)  # by another test: a fork has the patch below
        patch.setattr(peak_memory, "trace_update", lambda *_, **__: 1 // 0)
        with pytest.raises(NotTraced, match="ZeroDivisionError: integer division"):
            predict_peaks(run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(NotTraced, match="exit code 1"):
        predict_peaks(run)
