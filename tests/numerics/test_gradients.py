"""A plain SGD step moves every parameter by -lr times the gradient of Hugging Face's model in float64."""

import itertools

import pytest
import torch

from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.testing.reference_update import reference_update
from megatron_oprd.testing.update import assert_same_update
from tests.helpers.training import megatron_update

BATTERY = [
    *itertools.product(["layers=all"], ["all", "last", "last_k", "first_k"], ["none", "l2"], ["sequence_mean"]),
    *itertools.product(
        ["layers=last", "layers=even", "layers=odd", "layers=[2,4]"], ["last_k"], ["none"], ["token_mean"]
    ),
    *itertools.product(["pairs=[[1,2],[3,3],[5,5]]"], ["all"], ["none", "l2"], ["token_mean", "sequence_mean"]),
    ("layers=[1,2]", "all", "none", "sequence_mean"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return save(random_hf_model("Qwen3", seed=0), folder / "s"), save(random_hf_model("Qwen3", seed=1), folder / "t")


def check(student, teacher, *overrides):
    overrides = tuple(f"loss.representation.{override}" for override in overrides)
    assert_same_update(megatron_update(0, student, teacher, *overrides), reference_update(student, teacher, *overrides))


@pytest.mark.parametrize(("layers", "positions", "normalize", "aggregation"), BATTERY)
def test_every_mode_moves_the_weights_by_its_gradient(models, layers, positions, normalize, aggregation):
    check(*models, layers, f"positions={positions}", "k=3", f"normalize={normalize}", f"aggregation={aggregation}")


@pytest.mark.parametrize("override", ["shift=-1", "final_norm=false", "weight=2.5"])
def test_every_option_moves_the_weights_by_its_gradient(models, override):
    check(*models, override, "positions=all")


@pytest.mark.parametrize(("student_layers", "teacher_layers"), [(4, 6), (6, 4), (1, 3), (5, 1)])
def test_models_of_another_depth_are_paired_by_the_map(tmp_path, student_layers, teacher_layers):
    student = save(random_hf_model("Qwen2", seed=2, num_hidden_layers=student_layers), tmp_path / "s")
    teacher = save(random_hf_model("Qwen2", seed=3, num_hidden_layers=teacher_layers), tmp_path / "t")
    if (student_layers, teacher_layers) == (5, 1):
        check(student, teacher, "pairs=[[3,1]]")
    else:
        check(student, teacher, "layers=all")


def test_a_tied_head_moves_through_the_embedding(tmp_path):
    student = save(random_hf_model("Qwen3", seed=4, tie_word_embeddings=True), tmp_path / "s")
    teacher = save(random_hf_model("Qwen3", seed=5, tie_word_embeddings=True), tmp_path / "t")
    check(student, teacher, "layers=all")


@pytest.mark.parametrize("freeze", ["embedding", "lm_head"])
def test_a_frozen_tied_matrix_does_not_move(tmp_path, freeze):
    student = save(random_hf_model("Qwen3", seed=4, tie_word_embeddings=True), tmp_path / "s")
    update = megatron_update(0, student, student, f"student.freeze=[{freeze}]", "loss.representation.normalize=l2")
    assert not update.gradients["model.embed_tokens.weight"].any()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("normalize", ["none", "l2"])
def test_a_student_that_is_its_teacher_has_loss_zero_and_does_not_move(models, dtype, normalize):
    student, _ = models
    update = megatron_update(
        0, student, student, f"precision.dtype={dtype}", f"loss.representation.normalize={normalize}"
    )
    assert update.loss == 0.0 and update.grad_norm == 0.0
    assert not any(gradient.any() for gradient in update.gradients.values())


@pytest.mark.parametrize(
    "recompute",
    [
        ("granularity=full", "method=uniform"),
        ("granularity=full", "method=uniform", "num_layers=5"),
        ("granularity=full", "method=block", "num_layers=2"),
        ("granularity=selective",),
        ("granularity=selective", "parts=[layernorm,activation]"),
        ("granularity=full", "method=block", "num_layers=2", "parts=[layernorm,mlp]"),
    ],
)
@pytest.mark.parametrize("freeze", [(), ("student.freeze=[embedding]",)])
def test_recomputation_changes_nothing(models, recompute, freeze):
    update = megatron_update(0, *models, *freeze, *(f"recompute.{override}" for override in recompute))
    plain = megatron_update(0, *models, *freeze)
    assert_same_update(update, plain)
    if recompute != ("granularity=selective",):  # Megatron-Core's `core_attn` adds gradients in another order
        assert all(torch.equal(gradient, update.gradients[name]) for name, gradient in plain.gradients.items())
    if not freeze:
        assert_same_update(update, reference_update(*models))
