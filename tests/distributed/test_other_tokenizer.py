"""A teacher with another tokenizer runs on its own tokens of the student's responses, in every layout."""

import dataclasses
import random

import pytest

from megatron_oprd.data.alignment import align_rollouts, make_aligner
from megatron_oprd.data.end_tokens import end_of_turn_id
from megatron_oprd.data.tokenizer import load_tokenizer
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.launch.assemble import build_run
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.testing.reference_update import reference_update
from megatron_oprd.testing.replayed_run import make_config, make_inputs
from megatron_oprd.testing.update import assert_same_update, difference, measure_update
from megatron_oprd.train import one_step
from megatron_oprd.types import Rollout
from tests.helpers.bridges import save_random_bridge
from tests.helpers.layouts import FEW_LAYOUTS
from tests.helpers.responses import random_text
from tests.helpers.tokenizer import byte_tokenizer
from tests.helpers.vocabularies import llama_3_tokenizer

ROOM = 32
LAYOUTS = {
    **FEW_LAYOUTS,
    "the teacher's own": (2, ("teacher.parallel={tensor: 2, pipeline: 1}", "loss.representation.pairs=[[1,3],[4,2]]")),
    "the student's own": (2, ("parallel.tensor=2", "parallel.sequence=true", "teacher.parallel={tensor: 1}")),
}
# The second teacher spells what it reads byte by byte, so that some of it is cut; which tokens the loss reads.
CASES = {
    "fewer tokens": (("bytes", "llama_3"), ("loss.representation.k=5",)),
    "more tokens": (("llama_3", "bytes"), ("loss.representation.positions=all", "loss.representation.shift=-1")),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the folder of models of equal width, each with its own tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, tokenizer) in enumerate({"bytes": byte_tokenizer(), "llama_3": llama_3_tokenizer()}.items()):
        model = random_hf_model("Qwen3", seed, num_hidden_layers=4, vocab_size=len(tokenizer), eos_token_id=258)
        tokenizer.save_pretrained(save(model, folder / name))
    return folder


def aligner_of(student, teacher):
    tokenizers = load_tokenizer(student), load_tokenizer(teacher)
    eos_ids, end = read_model_spec(student).eos_token_ids, end_of_turn_id(tokenizers[1])
    return make_aligner(*tokenizers, student_eos_ids=eos_ids, teacher_end_of_turn_id=end)


def spoken(student, teacher):
    """Return responses of the student: some end with EOS, one is empty, and one has no text."""
    generator, (student_tokenizer, other) = random.Random(3), (load_tokenizer(path) for path in (student, teacher))
    responses = [[], [student_tokenizer.convert_tokens_to_ids(student_tokenizer.eos_token)] * 2]
    while len(responses) < 9:
        ids = student_tokenizer(random_text(generator), add_special_tokens=False)["input_ids"][:20]
        responses += [ids + [258] * generator.choice([0, 1])] if len(ids) > 5 else []
    rollouts = []
    for number, ids in enumerate(responses):
        prompts = [
            tuple(generator.choices(range(len(one)), k=1 + (number + more) % 7))
            for more, one in enumerate((student_tokenizer, other))
        ]
        mask = (1,) * len(ids) if number % 2 else tuple(generator.choices([0, 1, 1], k=len(ids)))
        rollouts.append(Rollout(prompts[0], tuple(ids), mask, "replay", teacher_prompt_ids=prompts[1]))
    return rollouts


def _update(rank, student, teacher, overrides, rollouts):
    """Run a step that aligns the rollouts itself. Equal widths need no bridge."""
    config = make_config(student, teacher, *overrides, f"rollout.prompts_per_step={len(rollouts)}")
    inputs = dataclasses.replace(make_inputs(config, rollouts), aligner=aligner_of(student, teacher))
    return measure_update(build_run(inputs), one_step)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_the_update_equals_the_reference_on_sync_points(models, case, layout):
    (world, overrides), (names, choice) = LAYOUTS[layout], CASES[case]
    student, teacher = (models / name for name in names)
    overrides = (*choice, *overrides, f"batch.max_tokens_per_micro_batch={ROOM}")
    rollouts = spoken(student, teacher)
    aligned = align_rollouts(aligner_of(student, teacher), rollouts, ROOM)
    update = run_distributed(world, _update, student, teacher, overrides, rollouts)[0]
    expected = reference_update(student, teacher, *overrides, rollouts=aligned)
    assert_same_update(update, expected)
    assert 0 < update.metrics["align/coverage"] < 1
    assert (update.metrics["align/teacher_tokens_cut"] > 0) == (case == "more tokens")


@pytest.fixture(scope="module")
def bridged(models):
    """Return the folders of a student, a deeper and wider teacher with another tokenizer, and a bridge."""
    teacher, tokenizer = models / "wide", llama_3_tokenizer()
    sizes = {"num_hidden_layers": 6, "hidden_size": 96, "vocab_size": len(tokenizer)}
    tokenizer.save_pretrained(save(random_hf_model("Qwen2", 5, **sizes, eos_token_id=258), teacher))
    return models / "bytes", teacher, save_random_bridge(models / "bridge", models / "bytes", teacher, rank=4)


@pytest.mark.parametrize("layout", ["one", "tensor and sequence", "pipeline", "a teacher cut otherwise"])
def test_a_bridge_compares_states_at_sync_points(bridged, layout):
    student, teacher, bridge = bridged
    world, overrides = {**LAYOUTS, "a teacher cut otherwise": (2, ("teacher.parallel={tensor: 2}",))}[layout]
    overrides = (*overrides, f"loss.representation.bridge={bridge}", f"batch.max_tokens_per_micro_batch={ROOM}")
    rollouts = spoken(student, teacher)
    update = run_distributed(world, _update, student, teacher, overrides, rollouts)[0]
    aligned = align_rollouts(aligner_of(student, teacher), rollouts, ROOM)
    assert_same_update(update, reference_update(student, teacher, *overrides, rollouts=aligned))
    assert 0 < update.metrics["align/coverage"] < 1


def test_other_pairs_of_tokens_give_another_gradient(models):
    """A check of the reference: it depends on the sync points."""
    student, teacher = models / "bytes", models / "llama_3"
    aligned = align_rollouts(aligner_of(student, teacher), spoken(student, teacher), ROOM)
    expected = reference_update(student, teacher, rollouts=aligned)
    moved = [dataclasses.replace(rollout, alignment=later(rollout.alignment)) for rollout in aligned]
    assert difference(reference_update(student, teacher, rollouts=moved), expected).gradient > 0.01


def later(alignment):
    """Return an alignment that pairs each student token with the teacher token of the next sync point."""
    student, teacher = alignment.student_positions, alignment.teacher_positions
    return dataclasses.replace(alignment, student_positions=student[:-1], teacher_positions=teacher[1:])
