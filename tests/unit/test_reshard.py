"""Every missing row of every layer arrives once, from a near rank, and replicas share the sending."""

from collections import Counter

import pytest
import torch

from megatron_oprd.parallel.reshard import Shard, Transfer, minimum_rows, moved_bytes, plan_transfers


def layout(world, tensor=1, pipeline=1, context=1, *, rows=101, layers=(1, 2, 3, 4, 6, 7), later=0, seed=0, deal=True):
    """Return the shard of each rank. Ranks are numbered as in Megatron: tensor fastest, then context, data, pipeline.

    Data-parallel replicas share all rows in an order of their own; `deal` says whether rows are dealt out at random or
    cut in order. Context-parallel ranks have the two slices of a zig-zag. Stages have consecutive layers, each but the
    first beginning `later` layers after the even cut.
    """
    generator = torch.Generator().manual_seed(seed)
    data = world // (tensor * context * pipeline)
    numbers = torch.randperm(rows, generator=generator) if deal else torch.arange(rows)
    replicas = [part[torch.randperm(len(part), generator=generator)] for part in numbers.tensor_split(data)]
    shards = []
    for rank in range(world):
        c, d, p = rank // tensor % context, rank // (tensor * context) % data, rank // (tensor * context * data)
        slices = replicas[d].tensor_split(2 * context)
        own = torch.cat([slices[c], slices[-1 - c]])
        cuts = [len(layers) * stage // pipeline + later * (0 < stage < pipeline) for stage in (p, p + 1)]
        shards.append(Shard(tuple(layers[cuts[0] : cuts[1]]), own))
    return shards


TEACHERS = {
    "tp4": {"tensor": 4},
    "tp2": {"tensor": 2},
    "dp4": {},
    "pp4": {"pipeline": 4},
    "tp2_pp2": {"tensor": 2, "pipeline": 2},
}
STUDENT = {"tensor": 2, "pipeline": 2, "later": 1}


def random_shards(world, seed):
    """Return random rows and layers for each rank. Every (layer, row) that a rank needs is on some rank."""
    generator = torch.Generator().manual_seed(seed)

    def some(items, share):
        return items[torch.rand(len(items), generator=generator) < share]

    def shard(share):
        rows = some(torch.randperm(60, generator=generator), share)
        return Shard(tuple(some(torch.arange(1, 6), 0.6).tolist()), rows)

    available = [shard(0.4) for _ in range(world - 1)]
    return [*available, Shard((1, 2, 3, 4, 5), torch.randperm(60, generator=generator))], [
        shard(0.5) for _ in range(world)
    ]


CASES = {
    **{
        f"{name}-{seed}": (layout(4, **parallel, seed=seed), layout(4, **STUDENT, seed=seed + 9))
        for name, parallel in TEACHERS.items()
        for seed in range(3)
    },
    **{f"random-{seed}": random_shards(5, seed) for seed in range(8)},
    "context": (layout(16, 2, 1, 4), layout(16, 1, 2, 2, seed=1)),
    "context_of_the_teacher": (layout(8, context=4, pipeline=2), layout(8, tensor=4, seed=2)),
    "large": (layout(64, 8, 2, rows=2000), layout(64, 2, 4, 2, rows=2000, seed=3)),
    "fewer_rows_than_replicas": (layout(8, rows=3), layout(8, 2, rows=3, seed=1)),
    "no_rows": (layout(4, rows=0), layout(4, 2, rows=0)),
}


@pytest.mark.parametrize(("available", "needed"), CASES.values(), ids=CASES)
def test_every_missing_row_arrives_exactly_once_from_a_rank_that_has_it(available, needed):
    has = [{(layer, row) for layer in shard.layers for row in shard.rows.tolist()} for shard in available]
    lacks = [
        {(layer, row) for layer in shard.layers for row in shard.rows.tolist()} - has[rank]
        for rank, shard in enumerate(needed)
    ]
    arrived = [Counter() for _ in needed]
    transfers = plan_transfers(available, needed)
    for transfer in transfers:
        assert transfer.source != transfer.target
        assert transfer.layers == tuple(sorted(set(transfer.layers)))
        assert transfer.layers and len(transfer.rows) and transfer.rows.dtype == torch.int64
        pairs = [(layer, row) for layer in transfer.layers for row in transfer.rows.tolist()]
        assert has[transfer.source].issuperset(pairs)
        arrived[transfer.target].update(pairs)
    assert arrived == [Counter(dict.fromkeys(pairs, 1)) for pairs in lacks]
    assert minimum_rows(available, needed) == sum(map(len, lacks)) == moved_bytes(transfers, 1)
    assert moved_bytes(transfers, 96) == 96 * moved_bytes(transfers, 1)
    ways = [(transfer.source, transfer.target, transfer.layers) for transfer in transfers]
    assert len(ways) == len(set(ways)), "rows of the same layers between two ranks must be one message"


@pytest.mark.parametrize(("available", "needed"), [CASES["random-1"], CASES["large"]])
def test_equal_input_gives_an_equal_plan(available, needed):
    def copies(shards):
        return [Shard(tuple(shard.layers), shard.rows.clone()) for shard in shards]

    first, second = plan_transfers(available, needed), plan_transfers(copies(available), copies(needed))
    assert [(t.source, t.target, t.layers, t.rows.tolist()) for t in first] == [
        (t.source, t.target, t.layers, t.rows.tolist()) for t in second
    ]


@pytest.mark.parametrize("parallel", [*TEACHERS.values(), {"context": 2, "tensor": 2}])
def test_equal_layouts_move_nothing_whatever_the_order_of_rows(parallel):
    available = layout(8, **parallel)
    assert plan_transfers(available, available) == []
    assert minimum_rows(available, available) == 0
    assert plan_transfers(available, [Shard(shard.layers, shard.rows.flip(0)) for shard in available]) == []


def test_nothing_moves_if_every_rank_has_all_states():
    assert plan_transfers(layout(4, tensor=4), layout(4, **STUDENT)) == []


def test_a_stage_sends_all_its_layers_in_one_message():
    rows = torch.arange(10)
    available = [Shard((1, 2), rows), Shard((3, 4), rows)]
    needed = [Shard((1, 2, 3, 4), rows.flip(0)), Shard((), rows)]
    (transfer,) = plan_transfers(available, needed)
    assert (transfer.source, transfer.target, transfer.layers) == (1, 0, (3, 4))
    assert sorted(transfer.rows.tolist()) == rows.tolist()


def test_replicas_share_the_sending():
    rows, nothing = torch.arange(12), torch.arange(0)
    available = [Shard((1, 2), rows)] * 4 + [Shard((1, 2), nothing)] * 4
    needed = [Shard((1, 2), nothing)] * 4 + [Shard((1, 2), rows)] * 4
    assert sorted(t.source for t in plan_transfers(available, needed)) == [0, 1, 2, 3]
    # Each of two replicas of eight lacks what the other has.
    sent = Counter()
    for transfer in plan_transfers(layout(16, 8, rows=64, deal=False), layout(16, 16, rows=64, deal=False, seed=1)):
        sent[transfer.source] += len(transfer.rows)
    assert len(sent) == 16 and len(set(sent.values())) == 1


def test_a_source_in_the_same_block_of_ranks_is_preferred():
    rows, nothing = torch.arange(12), torch.arange(0)
    holders = {1, 6, 9, 14}
    available = [Shard((5,), rows if rank in holders else nothing) for rank in range(16)]
    plan = plan_transfers(available, [Shard((5,), rows)] * 16)
    assert len(plan) == 12
    for transfer in plan:
        assert transfer.source // 4 == transfer.target // 4


@pytest.mark.parametrize(
    ("layers", "row", "missing"), [((1, 2), 7, "layer 1 of row 7"), ((2, 3), 4, "layer 3 of row 4")]
)
def test_a_row_that_no_rank_has_is_named(layers, row, missing):
    available = [Shard((1, 2), torch.arange(5)), Shard((2,), torch.arange(3))]
    needed = [Shard((1,), torch.arange(5)), Shard(layers, torch.tensor([row]))]
    with pytest.raises(ValueError, match=f"rank 1 wants {missing}"):
        plan_transfers(available, needed)


def test_lists_of_different_lengths_raise_an_error():
    with pytest.raises(ValueError, match="not the same ranks"):
        plan_transfers(layout(2), layout(4))


def test_bytes_count_every_layer_of_every_row():
    assert moved_bytes([Transfer(0, 1, (1, 4), torch.arange(3)), Transfer(1, 0, (2,), torch.arange(5))], 10) == 110
