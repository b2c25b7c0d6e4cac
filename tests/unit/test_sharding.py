"""Every item goes to exactly one rank, in order. The numbers of items differ by at most one."""

import pytest

from megatron_oprd.data.sharding import split


@pytest.mark.parametrize("count", [0, 1, 3, 7, 8, 9, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 13])
def test_the_parts_in_rank_order_are_the_items(count, size):
    items = [f"item {i}" for i in range(count)]
    parts = [split(items, rank, size) for rank in range(size)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("rank", "size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_outside_the_group_is_refused(rank, size):
    with pytest.raises(ValueError, match="rank"):
        split([1, 2, 3], rank, size)
