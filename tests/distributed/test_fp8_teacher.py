"""A teacher with FP8 weights, without Transformer Engine, is close to itself in full in every layout, layer by layer.

One product in FP8 is 4 % off, and random blocks add theirs to a stream that is little but them: the bound is wider than
for a trained teacher (tests/end_to_end/test_teacher_in_fp8.py).
"""

import dataclasses
import json
import shutil

import pytest

from megatron_oprd import fp8_error, train
from megatron_oprd.config import load_config
from megatron_oprd.launch.assemble import build_run
from megatron_oprd.launch.inputs import read_inputs
from megatron_oprd.models.precision import ModelPrecision
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


def trained(rank, arguments):
    """Train with FP8 weights as the candidate of `auto`, as on a GPU; return the choice and the loss of each step."""
    inputs = read_inputs(load_config(None, arguments))
    candidate = ModelPrecision(scaled_weights=True, keep_bf16=(1, 1))
    precision = dataclasses.replace(inputs.setup.precision, fp8_candidate=candidate)
    inputs = dataclasses.replace(inputs, setup=dataclasses.replace(inputs.setup, precision=precision))
    state, _ = train.fit(build_run(inputs))
    lines = (inputs.run_dir / "metrics.jsonl").read_text().splitlines()
    return state.teacher_in_fp8, [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def automatic(tmp_path_factory):
    """Return the arguments of a run of three steps that saves after each."""
    folder = tmp_path_factory.mktemp("auto")
    settings = ("checkpoint.every=1", "checkpoint.keep=9", "checkpoint.export_hf=false", "optimizer.schedule=constant")
    return folder, [*replay_run(folder, 3, *settings, **SIZES), "loss.representation.positions=all"]


@pytest.mark.parametrize("layout", ["one rank", "pp2"])
def test_automatic_fp8_begins_after_step_1_if_its_error_is_a_small_share_of_the_loss(layout, automatic):
    folder, arguments = automatic
    world, parallel = (2, ["parallel.pipeline=2"]) if layout == "pp2" else (1, [])
    shares = {"off": 1e-9, "fp8": 1.0}
    results = {}
    for name, share in shares.items():
        settings = [f"precision.teacher_fp8_share={share}", f"train.run_dir={folder}/{layout}-{name}", *parallel]
        results[name], *others = run_distributed(world, trained, [*arguments, *settings])
        assert all(other == results[name] for other in others)
    (chosen_off, exact), (chosen_fp8, in_fp8) = results["off"], results["fp8"]
    assert (chosen_off, chosen_fp8) == (False, True)
    assert exact[0] == in_fp8[0] and exact[1] != in_fp8[1] and exact[1] == pytest.approx(in_fp8[1], rel=0.05)


def test_a_resumed_run_keeps_the_choice_of_automatic_fp8(automatic):
    folder, arguments = automatic
    first, again = folder / "first", folder / "again"
    settings = [*arguments, "precision.teacher_fp8_share=1.0"]
    ((_, losses),) = run_distributed(1, trained, [*settings, f"train.run_dir={first}"])
    shutil.copytree(first, again)
    for step in (2, 3):
        shutil.rmtree(again / "checkpoints" / f"step_{step:07d}")
    assert json.loads((again / "checkpoints/step_0000001/state.json").read_text())["teacher_in_fp8"] is True
    assert run_distributed(1, trained, [*settings, f"train.run_dir={again}"]) == [(True, losses)]
