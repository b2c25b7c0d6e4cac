"""Each rollout is compared with its own teacher, on that teacher's prompt, in every layout."""

import dataclasses

import pytest

from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.testing.reference_update import reference_update
from megatron_oprd.testing.replayed_run import some_rollouts
from megatron_oprd.testing.update import assert_same_update, difference
from tests.helpers.layouts import FEW_LAYOUTS
from tests.helpers.training import megatron_update

OBJECTIVE = ("loss.output.objective=full_kl", "loss.output.chunk_tokens=3")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the folders of a student and two teachers. The second teacher has more layers."""
    folder = tmp_path_factory.mktemp("models")
    return [
        save(random_hf_model("Qwen3", seed, num_hidden_layers=4 + 2 * (seed == 2)), folder / str(seed))
        for seed in range(3)
    ]


def taught(first="math", second="code"):
    """Return rollouts of two data sources, alternating."""
    return [
        dataclasses.replace(rollout, data_source=first if number % 2 else second)
        for number, rollout in enumerate(some_rollouts(131))
    ]


def with_hints():
    """Return rollouts of which some have a longer or shorter prompt for the teacher."""
    return [
        dataclasses.replace(
            rollout, teacher_prompt_ids=(7, *rollout.prompt_ids, 9, 11)[number:] if number % 3 else None
        )
        for number, rollout in enumerate(some_rollouts(131))
    ]


def update(world, student, teachers, overrides, rollouts):
    return run_distributed(world, _update, student, teachers, overrides, rollouts)[0]


def _update(rank, student, teachers, overrides, rollouts):
    return megatron_update(rank, student, teachers, *overrides, rollouts=rollouts)


@pytest.mark.parametrize("layout", FEW_LAYOUTS)
def test_every_rollout_is_compared_with_its_own_teacher(models, layout):
    world, overrides = FEW_LAYOUTS[layout]
    student, math, code = models
    teachers = {"math": math, "code": code}
    expected = reference_update(student, teachers, *OBJECTIVE, rollouts=taught())
    for memory in ("all", "one"):
        settings = (*OBJECTIVE, *overrides, f"teachers_in_memory={memory}")
        assert_same_update(update(world, student, teachers, settings, taught()), expected)
    swapped = reference_update(student, teachers, *OBJECTIVE, rollouts=taught("code", "math"))
    assert difference(swapped, expected).gradient > 0.1


@pytest.mark.parametrize("layout", FEW_LAYOUTS)
def test_the_teachers_states_come_after_its_own_prompts(models, layout):
    world, overrides = FEW_LAYOUTS[layout]
    student, teacher, _ = models
    expected = reference_update(student, teacher, *OBJECTIVE, rollouts=with_hints())
    assert_same_update(update(world, student, teacher, (*OBJECTIVE, *overrides), with_hints()), expected)
    plain = reference_update(student, teacher, *OBJECTIVE, rollouts=some_rollouts(131))
    assert difference(plain, expected).gradient > 0.01
