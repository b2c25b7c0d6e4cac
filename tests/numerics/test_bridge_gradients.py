"""With a bridge, every mode of the loss moves the weights by the gradient that autograd computes in float64, and a
trained P_S by its own."""

import dataclasses

import pytest
import torch

from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.testing.reference_update import reference_map_gradients, reference_update
from megatron_oprd.testing.replayed_run import LEARNING_RATE
from megatron_oprd.testing.update import assert_same_update
from megatron_oprd.train import one_step
from megatron_oprd.training.state import TrainState
from megatron_oprd.types import PairBridge
from tests.helpers.bridges import random_maps, save_bridge, save_random_bridge
from tests.helpers.layouts import FEW_LAYOUTS
from tests.helpers.training import make_run, megatron_update

RANK = 5
# Layers and hidden size of the student and of each teacher.
SIZES = {"student": (4, 32), "narrow": (4, 24), "wide": (4, 48), "shallow": (2, 32), "deep": (7, 32), "unlike": (6, 48)}
TRAINED = "train_bridge=true"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save all models, and a random bridge from the student to each teacher."""
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, (layers, width)) in enumerate(SIZES.items()):
        shape = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 48, "num_key_value_heads": 4}
        save(random_hf_model("Qwen3", seed, **shape), folder / name)
        save_random_bridge(folder / f"to_{name}", folder / "student", folder / name, RANK, positions=None)
    return folder


def settings(folder, teacher, *overrides):
    """Return the folders of both models, and the overrides of a run with the bridge between them."""
    of_loss = (f"bridge={folder / f'to_{teacher}'}", *(one for one in overrides if "." not in one.split("=")[0]))
    others = (one for one in overrides if "." in one.split("=")[0])
    return folder / "student", folder / teacher, *(f"loss.representation.{one}" for one in of_loss), *others


MODES = [
    ("unlike",),
    ("unlike", "positions=all", "shift=-1"),
    ("unlike", "final_norm=false"),
    ("unlike", "aggregation=token_mean", "positions=first_k", "k=3"),
    ("unlike", "normalize=none", "weight=0.5"),
    ("unlike", "normalize=none", "aggregation=token_mean", "shift=-1", "final_norm=false"),
    ("unlike", "layers=[2,3]", "positions=last"),
    ("unlike", "layers=even"),
    ("unlike", "layers=last", "positions=last_k", "k=2"),
    ("unlike", "pairs=[[1,6],[3,2],[4,2]]"),
    ("unlike", "loss.output.objective=full_kl"),
    ("unlike", TRAINED),
    ("narrow",),
    ("wide", "normalize=none"),
    ("shallow", "layers=odd"),
    ("deep",),
    ("student",),
]


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_every_mode_moves_the_weights_by_its_gradient(folder, mode):
    given = settings(folder, *mode)
    assert_same_update(megatron_update(0, *given), reference_update(*given))


@pytest.mark.parametrize("mode", MODES[:2] + MODES[4:5], ids="-".join)
def test_bfloat16_stays_near(folder, mode):
    """Rounding is 2^-8 a number: a loss of a few layers is within a few per cent, and no number runs away."""
    given = settings(folder, *mode)
    update, expected = megatron_update(0, *given, "precision.dtype=bf16"), reference_update(*given)
    assert update.loss == pytest.approx(expected.loss, rel=0.05)
    assert update.grad_norm == pytest.approx(expected.grad_norm, rel=0.1)
    assert all(gradient.isfinite().all() for gradient in update.gradients.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("normalize", ["none", "l2"])
def test_a_student_that_is_its_teacher_through_one_map_has_loss_zero(folder, tmp_path, dtype, normalize):
    student = folder / "student"
    same = {
        pair: PairBridge(one.teacher_map, one.teacher_map, torch.zeros_like(one.teacher_mean))
        for pair, one in random_maps(*[read_model_spec(student)] * 2, RANK).items()
    }
    bridge = save_bridge(tmp_path / "bridge", student, student, same)
    representation = (f"bridge={bridge}", f"normalize={normalize}")
    overrides = (f"precision.dtype={dtype}", *(f"loss.representation.{one}" for one in representation))
    update = megatron_update(0, student, student, *overrides)
    assert update.loss == 0.0 and update.grad_norm == 0.0
    assert not any(gradient.any() for gradient in update.gradients.values())
    moved = {pair: dataclasses.replace(one, teacher_mean=one.teacher_mean + 1.0) for pair, one in same.items()}
    save_bridge(tmp_path / "moved", student, student, moved)
    assert megatron_update(0, student, student, *overrides, f"loss.representation.bridge={tmp_path / 'moved'}").loss > 0


LAYOUTS = {
    **FEW_LAYOUTS,
    "tensor": (2, ("parallel.tensor=2",)),
    "all at once": (
        4,
        ("parallel.tensor=2", "parallel.sequence=true", "recompute.granularity=full", "teacher.parallel={tensor: 1}"),
    ),
}


def _matrices(run):
    return {(layer, name): one for layer, of in run.student.maps.items() for name, one in of.parameters.items()}


def _map_gradients(rank, *given):
    """Return the gradient of each matrix, from the change in a plain SGD step. All ranks must have equal matrices."""
    run = make_run(*given)
    before = {key: matrix.clone() for key, matrix in _matrices(run).items()}
    one_step(run, TrainState())
    after = _matrices(run)
    gathered = {}
    for of_rank in gather_objects(after, torch.distributed.group.WORLD):
        for key, matrix in of_rank.items():
            assert torch.equal(matrix, gathered.setdefault(key, matrix)), key
    gradients = {key: (before[key] - after[key]).double() / LEARNING_RATE for key in after}
    parts = gather_objects(gradients, torch.distributed.group.WORLD)
    return {key: gradient for part in parts for key, gradient in part.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [(), ("normalize=none", "shift=-1", "aggregation=token_mean", "weight=3.0")])
def test_a_trained_map_moves_by_its_gradient_on_every_rank(folder, layout, options):
    given = settings(folder, "unlike", TRAINED, *options)
    _assert_map_gradients(layout, given, {(layer, "map") for layer in (1, 2, 3, 4)})


def test_a_map_of_full_width_moves_by_its_gradient_on_every_rank(folder):
    student, teacher, *_ = settings(folder, "unlike")
    overrides = ("map.kind=mlp", "map.hidden_multiple=2", "layers=[2,4]")
    given = (student, teacher, *(f"loss.representation.{one}" for one in overrides))
    _assert_map_gradients("all at once", given, {(layer, name) for layer in (2, 4) for name in ("first", "second")})


def _assert_map_gradients(layout, given, keys):
    world, overrides = LAYOUTS[layout]
    found = run_distributed(world, _map_gradients, *given, *overrides)[0]
    expected = reference_map_gradients(*given)
    assert found.keys() == expected.keys() == keys
    for key, gradient in expected.items():
        assert ((found[key] - gradient).norm() / gradient.norm()).item() < 1e-5, key


def test_a_frozen_map_stays_as_it_is(folder):
    run = make_run(*settings(folder, "unlike"))
    before = {layer: one.weight.clone() for layer, one in run.student.maps.items()}
    one_step(run, TrainState())
    assert len(before) == 4
    assert all(
        torch.equal(one.weight, before[layer]) and one.gradient is None for layer, one in run.student.maps.items()
    )
