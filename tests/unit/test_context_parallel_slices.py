"""Context parallelism gives every rank the same work, and every row belongs to one rank."""

import itertools

import pytest
import torch

from megatron_oprd.data.context_parallel_slices import zigzag_rows


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_row_is_on_one_rank_and_causal_work_is_equal(size):
    bounds = list(itertools.accumulate([2 * size, 6 * size, 4 * size], initial=0))
    rows_of_ranks = [zigzag_rows(bounds, rank, size) for rank in range(size)]
    assert torch.equal(torch.cat(rows_of_ranks).sort().values, torch.arange(bounds[-1]))
    starts = torch.repeat_interleave(torch.tensor(bounds[:-1]), torch.tensor(bounds).diff())
    work = {int((rows - starts[rows] + 1).sum()) for rows in rows_of_ranks}
    assert len(work) == 1, "each row attends to those before it in its sequence"


def test_a_rank_has_a_chunk_from_each_end():
    assert zigzag_rows([0, 8], 0, 2).tolist() == [0, 1, 6, 7]
    assert zigzag_rows([0, 8], 1, 2).tolist() == [2, 3, 4, 5]
