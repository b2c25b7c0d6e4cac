"""AdamW on the streamed gradient equals AdamW with autograd, and never has less error than the closed form."""

import pytest
import torch
import torch.distributed as dist

from megatron_oprd.bridge.fitting import moments as moments_module
from megatron_oprd.bridge.fitting.adamw import AdamWFit, initial_map
from megatron_oprd.bridge.fitting.solve import describe, fit_pair, held_out_error, teacher_directions
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.types import LayerPair
from tests.unit.test_bridge_solve import moments_of, states

PAIRS = [LayerPair(1, 1), LayerPair(2, 3)]
RANKS = [2, 5]
LR = 1e-2


def data(tokens=200):
    return {pair: states(tokens, seed=10 * number) for number, pair in enumerate(PAIRS)}


def directions():
    return {pair: teacher_directions(moments_of(*both), max(RANKS)) for pair, both in data().items()}


def fit_of(teachers, ranks=RANKS, lr=LR):
    return AdamWFit(teachers, 12, ranks, lr=lr, seed=3, num_pairs=len(PAIRS))


def autograd_maps(teachers, steps, rank):
    """Yield the maps after each step of AdamW with autograd, on the mean of `mse_loss` over pairs, in one batch."""
    layers = {}
    for pair in PAIRS:
        layers[pair] = torch.nn.Linear(12, rank, bias=False, dtype=torch.float64)
        layers[pair].weight.data.copy_(initial_map(rank, 12, 3, pair.student, pair.teacher))
    optimizer = torch.optim.AdamW([layer.weight for layer in layers.values()], lr=LR, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = []
        for pair, (student, teacher) in data().items():
            targets = (teacher - teachers[pair].mean) @ teachers[pair].directions[:rank].T
            losses.append(torch.nn.functional.mse_loss(layers[pair](student), targets))
        torch.stack(losses).mean().backward()
        optimizer.step()
        yield {pair: layer.weight.detach().clone() for pair, layer in layers.items()}


def test_every_step_equals_autograd(monkeypatch):
    monkeypatch.setattr(moments_module, "_CHUNK_TOKENS", 30)
    teachers = directions()
    fit = fit_of(teachers)
    for expected in autograd_maps(teachers, 30, rank=5):
        for pair, (student, teacher) in data().items():
            for cut in (slice(0, 70), slice(70, 70), slice(70, 200)):
                fit.add(pair, student[cut], teacher[cut])
        fit.step([])
        for pair in PAIRS:
            assert (fit._maps[pair] - expected[pair]).abs().max() < 1e-10


def test_a_smaller_rank_is_the_first_rows_of_the_largest():
    teachers = directions()
    *_, alone = autograd_maps(teachers, 30, rank=2)
    *_, largest = autograd_maps(teachers, 30, rank=5)
    for pair in PAIRS:
        assert (alone[pair] - largest[pair][:2]).abs().max() < 1e-5 * largest[pair].abs().max()


def test_the_initial_map_is_distributed_as_in_a_linear_layer():
    drawn = initial_map(40, 50, 7, 1, 2)
    assert torch.equal(drawn[:3], initial_map(3, 50, 7, 1, 2))
    assert not torch.equal(drawn, initial_map(40, 50, 7, 2, 1))
    assert drawn.dtype == torch.float32
    torch.manual_seed(0)
    reference = torch.nn.Linear(50, 4000, bias=False).weight
    many = initial_map(4000, 50, 0)
    assert many.abs().max() <= 50**-0.5
    assert many.std() == pytest.approx(reference.std().item(), rel=0.02)
    assert many.abs().max() == pytest.approx(reference.abs().max().item(), rel=0.01)


def test_a_pair_without_tokens_is_unchanged():
    fit = fit_of(directions())
    for _ in range(2):
        fit.add(PAIRS[0], *data()[PAIRS[0]])
        fit.add(PAIRS[1], *data()[PAIRS[1]])
        fit.step([])
    before = {pair: fit._maps[pair].detach().clone() for pair in PAIRS}
    fit.add(PAIRS[0], *data()[PAIRS[0]])
    fit.step([])
    assert not torch.equal(fit._maps[PAIRS[0]], before[PAIRS[0]])
    assert torch.equal(fit._maps[PAIRS[1]], before[PAIRS[1]])


def test_the_best_epoch_of_each_rank_is_kept():
    teachers = directions()
    held_out = {pair: moments_of(*states(100, seed=99)) for pair in PAIRS}
    fit = fit_of(teachers, lr=0.5)  # so large that it overshoots
    history = []
    for _ in range(4):
        for pair, both in data().items():
            fit.add(pair, *both)
        fit.step([])
        history.append(fit.snapshot(held_out))
    for pair in PAIRS:
        for rank in RANKS:
            errors = [epoch[pair][rank] for epoch in history]
            best = fit.best[pair][rank]
            assert best.error == min(errors) == held_out_error(best.bridge, held_out[pair])
            assert min(errors) < errors[-1]
            assert best.ridge is None
            assert best.bridge.student_map.shape == (rank, 12)


@pytest.mark.parametrize("lr", [1e-4, 1e-2, 1e-1])
def test_the_closed_form_has_no_more_error(lr):
    train, held_out = states(4000), moments_of(*states(1000, seed=1))
    moments = moments_of(*train)
    teacher = teacher_directions(moments, 5)
    fit = AdamWFit({PAIRS[0]: teacher}, 12, RANKS, lr=lr, seed=3, num_pairs=1)
    start = {rank: held_out_error_of_start(rank, teacher, held_out) for rank in RANKS}
    for _ in range(20):
        for cut in range(0, 4000, 100):
            fit.add(PAIRS[0], train[0][cut : cut + 100], train[1][cut : cut + 100])
            fit.step([])
        fit.snapshot({PAIRS[0]: held_out})
    for rank, closed in fit_pair(moments, held_out, RANKS, [0.0, 1e-6, 1e-4, 1e-2]).items():
        assert closed.error <= fit.best[PAIRS[0]][rank].error < start[rank]


def held_out_error_of_start(rank, teacher, held_out):
    return describe(initial_map(rank, 12, 3, 1, 1).double(), teacher, held_out).error


def stepped(rank):
    """Return the maps after five steps with tokens split over two groups; one rank has no token of the second pair."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    fit = fit_of(directions())
    for _ in range(5):
        for number, (pair, (student, teacher)) in enumerate(data().items()):
            cuts = [0, 20, 70, 180, 200] if number == 0 else [0, 150, 150, 200, 200]
            part = slice(cuts[rank], cuts[rank + 1])
            fit.add(pair, student[part], teacher[part])
        fit.step([pairs[rank // 2], across[rank % 2]])
    return [fit._maps[pair].detach().numpy() for pair in PAIRS]


def test_several_ranks_take_the_steps_of_one():
    *_, expected = autograd_maps(directions(), 5, rank=5)
    results = run_distributed(4, stepped)
    for maps in results:
        for found, pair in zip(maps, PAIRS, strict=True):
            assert (torch.from_numpy(found) - expected[pair]).abs().max() < 1e-10
            assert (found == results[0][PAIRS.index(pair)]).all()
