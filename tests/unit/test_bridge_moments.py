"""Streamed moments equal those of the full matrix of states, for any split and for a large mean."""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_oprd.bridge.fitting import moments as module
from megatron_oprd.bridge.fitting.moments import Moments
from megatron_oprd.testing.distributed import run_distributed

STUDENT, TEACHER = 7, 11


def states(tokens, mean=1e3, seed=0):
    """Return correlated states with a mean much larger than their spread, float64."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 3, dtype=torch.float64, generator=generator)

    def of(width):
        own = torch.randn(tokens, width, dtype=torch.float64, generator=generator)
        mix = torch.randn(3, width, dtype=torch.float64, generator=generator)
        return mean * torch.randn(width, dtype=torch.float64, generator=generator) + own + shared @ mix

    return of(STUDENT), of(TEACHER)


def streamed(student, teacher, sizes):
    moments = Moments.empty(STUDENT, TEACHER)
    for x, y in zip(student.split(sizes), teacher.split(sizes), strict=True):
        moments.add(x, y)
    return moments


def assert_moments_of(moments, student, teacher, tolerance=1e-9):
    x, y = student - student.mean(dim=0), teacher - teacher.mean(dim=0)
    expected = [student.mean(dim=0), teacher.mean(dim=0), x.T @ x, y.T @ y, x.T @ y]
    found = [value for name, value in moments.tensors().items() if name != "tokens"]
    assert moments.tokens == len(student)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("sizes", [[3000], [1] * 3000, [1000, 1, 0, 1999]])
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
def test_moments_do_not_depend_on_the_split(sizes, mean, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_TOKENS", 700)
    student, teacher = states(3000, mean)
    assert_moments_of(streamed(student, teacher, sizes), student, teacher)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moments_are_float64_for_states_of_any_dtype(dtype):
    student, teacher = (x.to(dtype) for x in states(500, mean=10.0))
    moments = streamed(student, teacher, [100] * 5)
    assert_moments_of(moments, student.double(), teacher.double())
    assert {tensor.dtype for name, tensor in moments.tensors().items() if name != "tokens"} == {torch.float64}


def test_merged_moments_equal_those_of_all_tokens():
    student, teacher = states(1000)
    parts = [streamed(student[a:b], teacher[a:b], [50] * ((b - a) // 50)) for a, b in ((0, 0), (0, 600), (600, 1000))]
    total = Moments.empty(STUDENT, TEACHER)
    for part in parts:
        total.merge(part)
    total.merge(Moments.empty(STUDENT, TEACHER))
    assert_moments_of(total, student, teacher)
    assert_moments_of(parts[2], student[600:], teacher[600:])


def test_different_numbers_of_states_are_refused():
    with pytest.raises(ValueError, match="3 states of the student, 2 of the teacher"):
        Moments.empty(STUDENT, TEACHER).add(torch.zeros(3, STUDENT), torch.zeros(2, TEACHER))


def test_moments_are_unchanged_by_a_file(tmp_path):
    student, teacher = states(100)
    moments = streamed(student, teacher, [100])
    save_file(moments.tensors(), tmp_path / "moments.safetensors")
    again = Moments.from_tensors(load_file(tmp_path / "moments.safetensors"))
    for name, tensor in moments.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)
    again.add(student, teacher)
    assert_moments_of(again, student.repeat(2, 1), teacher.repeat(2, 1))


CUTS = [0, 400, 400, 1000]  # the second rank has no token


def reduced(rank):
    student, teacher = states(1000)
    part = slice(CUTS[rank], CUTS[rank + 1])
    moments = Moments.empty(STUDENT, TEACHER)
    moments.add(student[part], teacher[part])
    pair = dist.new_group([0, 1])
    if rank < 2:
        within = Moments.empty(STUDENT, TEACHER)
        within.merge(moments)
        within.reduce(pair)
        assert_moments_of(within, student[:400], teacher[:400])
    nothing = Moments.empty(STUDENT, TEACHER)
    nothing.reduce(dist.group.WORLD)
    assert nothing.tokens == 0
    assert not any(tensor.any() for tensor in nothing.tensors().values())
    moments.reduce(dist.group.WORLD)
    return {name: tensor.numpy() for name, tensor in moments.tensors().items()}


def test_reduced_moments_equal_those_of_all_tokens():
    results = [{name: torch.from_numpy(value) for name, value in one.items()} for one in run_distributed(3, reduced)]
    assert_moments_of(Moments.from_tensors(results[0]), *states(1000))
    for other in results[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in results[0].items())
