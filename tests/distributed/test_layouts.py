"""Loss, norm and every gradient are the one-process reference's in every layout."""

import pytest

from tests.helpers.distributed import run_distributed
from tests.helpers.models import random_hf_model, save
from tests.helpers.training import assert_same_update, megatron_update, reference_update

LAYOUTS = {
    "data 2": (2,),
    "tensor 2": (2, "parallel.tensor=2"),
    "pipeline 2": (2, "parallel.pipeline=2"),
    "data 4, two ranks without a selected token": (4, "loss.representation.positions=last"),
    "tensor 2, data 2": (4, "parallel.tensor=2"),
    "tensor 2, pipeline 2": (4, "parallel.tensor=2", "parallel.pipeline=2"),
    "pipeline 2, last stage skipped": (2, "parallel.pipeline=2", "loss.representation.layers=[1,2]"),
    "pipeline 2, full recomputation": (2, "parallel.pipeline=2", "recompute.granularity=full"),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_update_does_not_depend_on_the_layout(name, tied, tmp_path):
    world_size, *overrides = LAYOUTS[name]
    student = save(random_hf_model("Qwen3", seed=0, tie_word_embeddings=tied), tmp_path / "s")
    teacher = save(random_hf_model("Qwen3", seed=1, tie_word_embeddings=tied), tmp_path / "t")
    expected = reference_update(student, teacher, *overrides)
    for update in run_distributed(world_size, megatron_update, student, teacher, *overrides):
        assert_same_update(update, expected)


def test_a_shallower_student_is_compared_without_transport(tmp_path):
    student = save(random_hf_model("Qwen2", seed=2, num_hidden_layers=4), tmp_path / "s")
    teacher = save(random_hf_model("Qwen2", seed=3, num_hidden_layers=6), tmp_path / "t")
    expected = reference_update(student, teacher)
    for update in run_distributed(2, megatron_update, student, teacher, "parallel.pipeline=2"):
        assert_same_update(update, expected)
