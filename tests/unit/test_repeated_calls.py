"""A trace that repeats equal calls and equal operations counts the same bytes as one that makes them all."""

import pytest
import torch

from megatron_oprd.models.recompute import Recomputation
from megatron_oprd.planning.known_results import KnownResults
from megatron_oprd.planning.memory_trace import LiveBytes
from megatron_oprd.planning.update_trace import traced_update
from megatron_oprd.testing.distributed import result_of
from tests.helpers.planning import dense_spec, expert_spec, filling_rollouts, hybrid_spec, planned_run, replay_config

SIZES = dict(layers=4, hidden=128, vocabulary=8192)
OUTPUT = ("loss.output.objective=full_kl", "loss.output.chunk_tokens=48")
# Model, processes, settings.
RUNS = {
    "dense": (dense_spec, 1, OUTPUT),
    "experts": (expert_spec, 2, ("parallel.tensor=2", "parallel.expert=2", "parallel.sequence=true")),
    "hybrid": (hybrid_spec, 1, OUTPUT),
    "all logits at once": (dense_spec, 1, ("loss.output.objective=topk_surrogate", "loss.output.chunk_tokens=null")),
    "pipeline": (dense_spec, 2, ("parallel.pipeline=2", *OUTPUT)),
    "teacher in its own layout": (dense_spec, 2, ("teacher.parallel.tensor=2", "recompute.granularity=full", *OUTPUT)),
}
IN_CI = ("experts", "all logits at once")


def _footprints(name, repeating):
    """Return the footprints of three traces, the bytes of each block, and the operations that were made one by one.

    This process ends afterwards, so the methods that it replaces come back by themselves.
    """
    spec, world_size, settings = RUNS[name]
    run = planned_run(replay_config(256, "loss.representation.layers=all", *settings), spec(**SIZES), world_size)
    calls = []

    def count(results, func, args, kwargs, inputs):
        calls.append(func)
        return func(*args, **(kwargs or {}))

    if not repeating:
        LiveBytes.repeat = lambda live, key, call: call()
        KnownResults.apply = count
    with traced_update(run, filling_rollouts(256), rank=world_size - 1, micro_batches=3) as update:
        choices = [None, Recomputation(frozenset({"layernorm"}), 1), None]
        return [update.footprint(choice) for choice in choices], update.stored, len(calls)


@pytest.mark.parametrize(
    "name", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.nightly) for name in RUNS]
)
def test_repeated_calls_and_operations_change_no_byte(name):
    *repeated, _ = result_of(_footprints, name, True)
    *made, operations = result_of(_footprints, name, False)
    assert repeated == made and operations > 1000


def _peaks_of_calls():
    """Return the peaks of three equal calls, how often the function ran, and the peak of a call that keeps a tensor."""
    kept, runs = [], []

    def work(keep):
        runs.append(keep)
        first = torch.empty(100)
        if keep:
            kept.append(torch.empty(50))
        return (first[:10] + 1,)

    with torch._subclasses.FakeTensorMode(), LiveBytes() as live:
        before = torch.empty(1000)  # must count in every peak
        peaks, results = [], []
        for _ in range(3):
            live.reset_peak()
            results.append(live.repeat("equal", lambda: work(keep=False)))
            peaks.append(live.at_peak.total())
        for _ in range(2):
            live.repeat("keeps", lambda: work(keep=True))
        return peaks, runs, live.bytes.total() - before.nbytes


def test_a_call_that_leaves_more_than_its_results_is_made_again():
    peaks, runs, live_bytes = result_of(_peaks_of_calls)
    assert peaks == [4440, 4480, 4520]  # the work, and the results so far
    assert runs == [False, True, True]
    assert live_bytes == 5 * 40 + 2 * 200 - 2 * 40  # the results of the last calls are not kept
