"""The subspace cosine of a bridge is the mean over all held-out tokens, at every rank."""

import pytest
import torch

from megatron_oprd.bridge.fitting.adamw import initial_map
from megatron_oprd.bridge.fitting.cosines import SubspaceCosines
from megatron_oprd.bridge.fitting.moments import Moments
from megatron_oprd.bridge.fitting.solve import fit_pair
from megatron_oprd.types import LayerPair

PAIR, SEED = LayerPair(2, 5), 7


def test_only_held_out_tokens_count():
    generator = torch.Generator().manual_seed(0)
    moments = Moments.empty(6, 8)
    states = [(torch.randn(n, 6, generator=generator), torch.randn(n, 8, generator=generator)) for n in (30, 1, 9)]
    for one in states:
        moments.add(*one)
    fits = fit_pair(moments, moments, (2, 4), (0.1,))
    cosines = SubspaceCosines({PAIR: fits}, SEED, torch.device("cpu"))
    held_out = [torch.rand(len(student), generator=generator) < 0.5 for student, _ in states]
    held_out[1][:] = False  # a batch without any
    for one, mask in zip(states, held_out, strict=True):
        cosines.add(PAIR, *one, mask)
    x, y = (torch.cat([one[side][mask] for one, mask in zip(states, held_out, strict=True)]) for side in (0, 1))
    assert 0 < len(x) < 40
    for rank, found in cosines.means([])[PAIR].items():
        bridge = fits[rank].bridge
        target = (y - bridge.teacher_mean) @ bridge.teacher_map.T
        for student_map, value in zip((initial_map(rank, 6, SEED, 2, 5), bridge.student_map), found, strict=True):
            expected = torch.nn.functional.cosine_similarity(x @ student_map.T, target).mean()
            assert value == pytest.approx(expected.item(), abs=1e-6)


def test_cosines_without_tokens_are_zero():
    moments = Moments.empty(6, 8)
    moments.add(torch.randn(30, 6), torch.randn(30, 8))
    cosines = SubspaceCosines({PAIR: fit_pair(moments, moments, (2,), (0.1,))}, SEED, torch.device("cpu"))
    cosines.add(PAIR, torch.zeros(0, 6), torch.zeros(0, 8), torch.zeros(0, dtype=torch.bool))
    assert cosines.means([]) == {PAIR: {2: (0.0, 0.0)}}
