"""A teacher with FP8 weights, without Transformer Engine, is close to itself in full in every layout, layer by layer.

One product in FP8 is 4 % off, and random blocks add theirs to a stream that is little but them: the bound is wider than
for a trained teacher (tests/end_to_end/test_teacher_in_fp8.py).
"""

import pytest

from megatron_oprd import fp8_error
from megatron_oprd.config import load_config
from megatron_oprd.launch.inputs import read_inputs
from megatron_oprd.testing.distributed import run_distributed
from tests.helpers.runs import replay_run

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "num_hidden_layers": 4,
    "initializer_range": 0.05,
}
EXPERTS = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": []}
LAYOUTS = {
    "tp2": (2, ["parallel.tensor=2"]),
    "tp2-sp": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "cp2-padded": (2, ["parallel.context=2", "precision.pad_tokens=16"]),
    "dp2-teacher-tp2": (2, ["teacher.parallel.tensor=2"]),
    "ep2": (2, ["parallel.expert=2"]),
}


def errors_in(rank, arguments):
    return fp8_error.measure(read_inputs(fp8_error.measuring_config(load_config(None, arguments))))


@pytest.fixture(scope="module")
def arguments_of(tmp_path_factory):
    def arguments(experts, *settings):
        folder = tmp_path_factory.mktemp("fp8")
        sizes = {"family": "Qwen3Moe", **EXPERTS} if experts else SIZES
        return [
            *replay_run(folder, 1, **sizes),
            "precision.teacher_fp8=weights",
            "loss.representation.positions=all",
            *settings,
        ]

    return arguments


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_error_is_small_in_every_layout(layout, arguments_of):
    world, settings = LAYOUTS[layout]
    experts = "ep2" in layout
    (alone,) = run_distributed(1, errors_in, arguments_of(experts))
    ranks = run_distributed(world, errors_in, arguments_of(experts, *settings))
    assert all(errors == ranks[0] for errors in ranks)
    assert ranks[0].keys() == alone.keys() == {1, 2, 3, 4}
    assert ranks[0][1].relative == 0 and ranks[0][1].floor == 0, "the first block stays as it is"
    for layer in (2, 3, 4):
        assert 1e-3 < ranks[0][layer].relative < 0.08
        assert ranks[0][layer].relative == pytest.approx(alone[layer].relative, rel=0.3)
        assert ranks[0][layer].floor > 0


def test_blocks_of_full_precision_are_counted_from_both_ends(arguments_of):
    kept = ("precision.keep_bf16.first=0", "precision.keep_bf16.last=4")
    (errors,) = run_distributed(1, errors_in, arguments_of(False, *kept))
    assert [error.relative for error in errors.values()] == [0, 0, 0, 0]
    (errors,) = run_distributed(1, errors_in, arguments_of(False, "precision.keep_bf16.first=0"))
    assert errors[1].relative > 0
