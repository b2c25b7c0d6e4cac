"""After an exchange every layer of the student's side has the right rows, in its own order."""

import pytest
import torch

from megatron_oprd.parallel.reshard import (
    RankExchange,
    Shard,
    TargetShape,
    Transfer,
    exchange,
    minimum_rows,
    moved_bytes,
    plan_transfers,
)
from megatron_oprd.testing.distributed import run_distributed
from tests.unit.test_reshard import STUDENT, TEACHERS, layout, random_shards

HIDDEN = 4
CPU = torch.device("cpu")


def states_of(shard, dtype):
    """States whose values say which layer and row they are of, exactly even in bfloat16."""
    rows = shard.rows
    return {
        layer: torch.stack([torch.full_like(rows, layer), rows % 256, rows // 256, 0 * rows], 1).to(dtype)
        for layer in shard.layers
    }


def exchanged(rank, held, wanted, transfers, dtype=torch.float32):
    plan = RankExchange(rank, held, wanted, transfers)
    result = exchange(states_of(held, dtype), plan, TargetShape(HIDDEN, dtype), CPU, CPU)
    expected = states_of(wanted, dtype)
    assert result.keys() == expected.keys()
    for layer, state in result.items():
        assert state.dtype == dtype
        assert torch.equal(state, expected[layer]), f"layer {layer}"
    return result


def layouts(teacher):
    if teacher == "random":
        return random_shards(4, 3)
    return layout(4, **TEACHERS[teacher], rows=701), layout(4, **STUDENT, rows=701, seed=1)


def check_every_rank(rank, teacher):
    held, wanted = layouts(teacher)
    transfers = plan_transfers(held, wanted)
    for dtype in (torch.float32, torch.bfloat16):
        exchanged(rank, held[rank], wanted[rank], transfers, dtype)
    row_bytes = HIDDEN * torch.bfloat16.itemsize
    assert moved_bytes(transfers, row_bytes) == row_bytes * minimum_rows(held, wanted)
    return len(transfers)


@pytest.mark.parametrize("teacher", [*TEACHERS, "random"])
def test_every_rank_has_the_states_it_wants(teacher):
    counts = run_distributed(4, check_every_rank, teacher)
    assert len(set(counts)) == 1
    assert (counts[0] == 0) == (teacher == "tp4"), "only a teacher that is whole on every rank moves nothing"


def check_order_within_a_pair(rank):
    """Several messages of equal size from one rank to another, and as many back."""
    rows = torch.arange(12)
    held = [Shard((1, 2), rows[:6]), Shard((1, 2), rows[6:])]
    wanted = [Shard((1, 2), rows.flip(0)), Shard((1, 2), rows)]
    transfers = [
        Transfer(source, target, (layer,), part)
        for source, target in ((0, 1), (1, 0))
        for part in held[source].rows.split(2)
        for layer in (2, 1)
    ]
    exchanged(rank, held[rank], wanted[rank], transfers)


def test_messages_of_one_pair_do_not_change_places():
    run_distributed(2, check_order_within_a_pair)


def test_nothing_to_move_needs_no_process_group():
    held = Shard((1, 2, 5), torch.tensor([4, 900, 0, 7]))
    wanted = Shard((2, 5), torch.tensor([7, 4, 900]))
    states = states_of(held, torch.float32)
    others = [Transfer(1, 2, (1,), torch.arange(3))]
    result = exchange(states, RankExchange(0, held, wanted, others), TargetShape(HIDDEN, torch.float32), CPU)
    for layer in wanted.layers:
        assert torch.equal(result[layer], states[layer][[3, 0, 1]])
        result[layer].zero_()
    assert torch.equal(states[5], states_of(held, torch.float32)[5]), "the result shares memory with the states"


@pytest.mark.parametrize(
    ("transfers", "message"),
    [
        ([], "not the 2 rows"),
        ([Transfer(1, 0, (3,), torch.tensor([8]))], "not the 2 rows"),
        ([Transfer(1, 0, (3,), torch.tensor([8, 5]))], "names rows"),
        ([Transfer(0, 1, (3,), torch.tensor([8]))], "names rows"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_anything_is_sent(transfers, message):
    held, wanted = Shard((3,), torch.tensor([2])), Shard((3,), torch.tensor([9, 2, 8]))
    states = states_of(held, torch.float32)
    with pytest.raises(ValueError, match=message):
        exchange(states, RankExchange(0, held, wanted, transfers), TargetShape(HIDDEN, torch.float32), CPU)
