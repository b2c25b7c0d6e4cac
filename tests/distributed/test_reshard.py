"""After an exchange every rank has the rows that it needs, in the right order."""

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
    """Return states whose values encode their layer and row, exactly in bfloat16 too."""
    rows = shard.rows
    return {
        layer: torch.stack([torch.full_like(rows, layer), rows % 256, rows // 256, 0 * rows], 1).to(dtype)
        for layer in shard.layers
    }


def exchanged(rank, available, needed, transfers, dtype=torch.float32):
    plan = RankExchange(rank, available, needed, transfers)
    result = exchange(states_of(available, dtype), plan, TargetShape(HIDDEN, dtype), CPU, CPU)
    expected = states_of(needed, dtype)
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
    available, needed = layouts(teacher)
    transfers = plan_transfers(available, needed)
    for dtype in (torch.float32, torch.bfloat16):
        exchanged(rank, available[rank], needed[rank], transfers, dtype)
    row_bytes = HIDDEN * torch.bfloat16.itemsize
    assert moved_bytes(transfers, row_bytes) == row_bytes * minimum_rows(available, needed)
    return len(transfers)


@pytest.mark.parametrize("teacher", [*TEACHERS, "random"])
def test_every_rank_receives_the_states_that_it_needs(teacher):
    counts = run_distributed(4, check_every_rank, teacher)
    assert len(set(counts)) == 1
    assert (counts[0] == 0) == (teacher == "tp4"), "nothing moves only if every rank has all states"


def check_order_within_a_pair(rank):
    """Send several messages of equal size from one rank to another, and as many back."""
    rows = torch.arange(12)
    available = [Shard((1, 2), rows[:6]), Shard((1, 2), rows[6:])]
    needed = [Shard((1, 2), rows.flip(0)), Shard((1, 2), rows)]
    transfers = [
        Transfer(source, target, (layer,), part)
        for source, target in ((0, 1), (1, 0))
        for part in available[source].rows.split(2)
        for layer in (2, 1)
    ]
    exchanged(rank, available[rank], needed[rank], transfers)


def test_messages_between_two_ranks_keep_their_order():
    run_distributed(2, check_order_within_a_pair)


def test_an_exchange_without_transfers_needs_no_process_group():
    available = Shard((1, 2, 5), torch.tensor([4, 900, 0, 7]))
    needed = Shard((2, 5), torch.tensor([7, 4, 900]))
    states = states_of(available, torch.float32)
    others = [Transfer(1, 2, (1,), torch.arange(3))]
    result = exchange(states, RankExchange(0, available, needed, others), TargetShape(HIDDEN, torch.float32), CPU)
    for layer in needed.layers:
        assert torch.equal(result[layer], states[layer][[3, 0, 1]])
        result[layer].zero_()
    assert torch.equal(states[5], states_of(available, torch.float32)[5]), "the result shares memory with the states"


@pytest.mark.parametrize(
    ("transfers", "message"),
    [
        ([], "not the 2 rows"),
        ([Transfer(1, 0, (3,), torch.tensor([8]))], "not the 2 rows"),
        ([Transfer(1, 0, (3,), torch.tensor([8, 5]))], "names rows"),
        ([Transfer(0, 1, (3,), torch.tensor([8]))], "names rows"),
    ],
)
def test_a_wrong_plan_raises_an_error_before_anything_is_sent(transfers, message):
    available, needed = Shard((3,), torch.tensor([2])), Shard((3,), torch.tensor([9, 2, 8]))
    states = states_of(available, torch.float32)
    with pytest.raises(ValueError, match=message):
        exchange(states, RankExchange(0, available, needed, transfers), TargetShape(HIDDEN, torch.float32), CPU)
