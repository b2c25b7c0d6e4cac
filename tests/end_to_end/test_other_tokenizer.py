"""A teacher with another tokenizer: what is read of both, and what is refused in one line before anything is built."""

import json
import shutil

import pytest

from megatron_oprd.config import load_config
from megatron_oprd.launch.assemble import build_run
from megatron_oprd.launch.inputs import read_inputs
from megatron_oprd.launch.step_data import align
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.train import one_step
from megatron_oprd.training.state import TrainState
from megatron_oprd.types import UserError
from tests.helpers.commands import run
from tests.helpers.scene import Scene, make_scene, refuse, save_model
from tests.helpers.tokenizer import CHAT_TEMPLATE, byte_tokenizer
from tests.helpers.vocabularies import llama_3_tokenizer

FULL_KL = "loss.output.objective=full_kl"
A_BRIDGE = "loss.representation.bridge=bridge.safetensors"


@pytest.fixture(scope="module")
def complete_scene(tmp_path_factory):
    """Make the scene with three teachers and rollouts that have the teacher's prompts.

    `other` has another tokenizer, `short` few positions, and `bare` the student's tokenizer without its files.
    """
    scene = make_scene(tmp_path_factory.mktemp("whole"))
    byte_tokenizer(chat=CHAT_TEMPLATE).save_pretrained(scene.student)
    teacher = llama_3_tokenizer()
    for seed, (name, sizes) in enumerate({"other": {}, "short": {"max_position_embeddings": 30}}.items(), start=2):
        model = random_hf_model("Qwen3", seed, vocab_size=1010, num_hidden_layers=2, hidden_size=32, **sizes)
        teacher.save_pretrained(save(model, scene.folder / name))
    save_model(scene.bare, 4)
    for file in scene.bare.glob("tokenizer*"):
        file.unlink()
    scene.write("replay.jsonl", [rollout(n) for n in range(12)])
    return scene


@pytest.fixture
def scene(complete_scene, tmp_path):
    shutil.copytree(complete_scene.folder, tmp_path / "scene")
    return Scene(tmp_path / "scene")


def rollout(number, **values):
    ids = {"prompt_ids": [number, 2], "response_ids": [83, 72, 200 + number], "teacher_prompt_ids": [258, number]}
    return {key: value for key, value in {**ids, **values}.items() if value is not ...}


def read(scene, *overrides, teacher="other", replay=True, fitting=True):
    options = scene.options if replay else scene.generating
    arguments = [*options(f"teacher.path={scene.folder / teacher}"), *overrides]
    return read_inputs(load_config(None, arguments), fitting=fitting)


def refused(scene, *words, **options):
    overrides = options.pop("overrides", ())
    with pytest.raises(UserError) as caught:
        read(scene, *overrides, **options)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("replay", [False, True])
def test_a_step_compares_states_at_sync_points(scene, replay):
    scene.write("replay.jsonl", [rollout(n, teacher_prompt_ids=[1009, n]) for n in range(4)])
    inputs = read(scene, "rollout.max_new_tokens=12", replay=replay)
    assert inputs.own_teacher_prompts and inputs.vocab_size == 259  # the teacher's 1010 say nothing about the student's
    if not replay:
        tokenizer = llama_3_tokenizer()
        for prompt in inputs.prompts.prompts:
            assert tokenizer.decode(prompt.teacher_prompt_ids).startswith("<|begin_of_text|><|start_header_id|>user")
    _, metrics, rollouts = one_step(build_run(inputs), TrainState())
    assert 0 < metrics["align/coverage"] <= 1 and metrics["align/teacher_tokens"] > 0
    kept = sum(len(one.alignment.comparable(range(len(one.response_ids)))[0]) for one in rollouts)
    assert metrics["rep/num_tokens"] == kept
    assert metrics["align/coverage"] == kept / sum(len(one.response_ids) for one in rollouts)


def test_an_answer_ends_for_both_models_where_the_student_stops(scene):
    """With a template that ends a turn in other ways, and configurations of the models that name other tokens."""
    path = scene.other / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|eot_id|>", "{{ end or '<|eot_id|>' }}"))
    scene.edit("student/config.json", eos_token_id=[17, 258])
    assert read(scene).aligner.student_eos_ids == {17, 258}
    for kwargs, end in (({}, 1004), ({"end": "<|end_of_text|>"}, 1001)):
        for key in ("chat_template_kwargs", "teacher_chat_template_kwargs"):
            assert read(scene, f"data.{key}={json.dumps(kwargs)}").aligner.end_of_turn_id == end


def test_a_student_samples_its_whole_vocabulary(scene):
    inputs = read(scene, f"student.path={scene.other}", teacher="student", replay=False)
    assert inputs.vocab_size == 1010


@pytest.mark.parametrize("fitting", [False, True])
def test_one_tokenizer_needs_no_alignment(scene, fitting):
    for replay in (False, True):
        inputs = read(scene, teacher="teacher", replay=replay, fitting=fitting)
        assert inputs.aligner is None and inputs.vocab_size == 259
        assert inputs.own_teacher_prompts == replay  # the stored ones have some
        if not replay:
            assert all(prompt.teacher_prompt_ids is None for prompt in inputs.prompts.prompts)
    assert read(scene, "data.teacher_chat_template_kwargs={}", teacher="teacher", replay=False).own_teacher_prompts


def test_another_tokenizer_without_a_bridge_is_refused_with_the_way_to_one(scene):
    words = ("tokenizers of student.path=", "teacher.path=", "other ids", "-m megatron_oprd.bridge.fit")
    refuse(scene, (*words, "loss.representation.bridge"), "train", *scene.generating(f"teacher.path={scene.other}"))


def test_distributions_over_two_vocabularies_are_refused(scene):
    for bridge in ((), (A_BRIDGE,)):
        words = ("other ids", "loss.output.objective=full_kl has no distributions to compare", "use none")
        refused(scene, *words, overrides=(FULL_KL, *bridge), replay=False, fitting=False)


def test_another_tokenizer_among_several_teachers_is_refused(scene):
    scene.write("prompts.jsonl", [{"prompt": "1+1", "data_source": source} for source in ("math", "code")])
    teachers = ["teacher=null", f"teachers.math.path={scene.teacher}", f"teachers.code.path={scene.other}"]
    words = ("teachers.code.path=", "other ids", "a bridge joins a single one (teacher.path)")
    refuse(scene, words, "train", *scene.generating(*teachers))


def test_a_bridge_needs_both_tokenizers(scene):
    for replay in (False, True):
        refused(scene, "no tokenizer in", "bare", teacher="bare", replay=replay)
    assert read(scene, teacher="bare", fitting=False).tokenizer is None  # stored ids need none
    for file in scene.student.glob("tokenizer*"):
        file.unlink()
    refused(scene, "no tokenizer in", "student")


def test_a_tokenizer_of_more_tokens_than_its_own_teacher_is_refused(scene):
    save(random_hf_model("Qwen3", 2, vocab_size=500, num_hidden_layers=2, hidden_size=32), scene.other)
    refused(scene, "ids up to 1004", "teacher.path=", "vocabulary of 500", replay=False)


def test_a_tokenizer_without_known_token_bytes_is_refused(scene):
    path = scene.other / "tokenizer.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "decoder": None}))
    refused(scene, "cannot be aligned with another one", str(scene.other))


REPLAYS = {
    "no prompt of the teacher's": ({"teacher_prompt_ids": ...}, (), ("line 6: teacher_prompt_ids is missing",)),
    "beyond the teacher's vocabulary": (
        {"teacher_prompt_ids": [1010]},
        (),
        ("line 6: teacher_prompt_ids contains 1010, but the vocabulary ends at 1009",),
    ),
    "beyond the student's": ({"response_ids": [259]}, (), ("line 6: response_ids contains 259",)),
    "no room in a micro-batch": (
        {"teacher_prompt_ids": [1] * 20},
        ("batch.max_tokens_per_micro_batch=20",),
        ("line 6: teacher_prompt_ids has 20 tokens and leaves no room", "batch.max_tokens_per_micro_batch=20"),
    ),
    "the student has no room": (
        {"response_ids": [1] * 20},
        ("batch.max_tokens_per_micro_batch=21",),
        ("max_tokens_per_micro_batch=21 does not hold the longest", "(22 tokens)"),
    ),
}


@pytest.mark.parametrize("case", REPLAYS)
def test_bad_stored_rollouts_are_refused(case, scene):
    values, overrides, words = REPLAYS[case]
    scene.write("replay.jsonl", [rollout(n, **(values if n == 5 else {})) for n in range(12)])
    refused(scene, *words, overrides=overrides)


def test_a_stored_prompt_that_leaves_the_teacher_no_position_is_refused(scene):
    for length, works in ((29, True), (30, False)):
        scene.write("replay.jsonl", [rollout(n, teacher_prompt_ids=[1] * length) for n in range(4)])
        if works:
            (one, *_) = align(read(scene, teacher="short"), read(scene, teacher="short").replayed)
            assert len(one.alignment.teacher_ids) == 1 and one.alignment.teacher_tokens_cut > 0
        else:
            words = ("line 1: teacher_prompt_ids has 30 tokens", "short has 30 positions")
            refused(scene, *words, teacher="short")


def test_a_prompt_that_leaves_the_teacher_no_room_is_refused_and_a_long_answer_is_not(scene):
    inputs = read(
        scene, "rollout.max_new_tokens=60", "batch.max_tokens_per_micro_batch=200", teacher="short", replay=False
    )
    longest = max(len(prompt.teacher_prompt_ids) for prompt in inputs.prompts.prompts)
    assert longest + 60 > 30
    scene.edit("short/config.json", max_position_embeddings=longest + 1)
    read(scene, teacher="short", replay=False)
    scene.edit("short/config.json", max_position_embeddings=longest)
    words = (f"the teacher's longest prompt has {longest} tokens and leaves no room", f"has {longest} positions")
    refused(scene, *words, f"lower data.max_prompt_tokens to {longest - 1}", teacher="short", replay=False)


@pytest.mark.parametrize(("student", "teacher"), [("student", "other"), ("other", "student")])
def test_a_micro_batch_holds_the_students_longest_answer(scene, student, teacher):
    """Whichever has the longer prompt: the teacher's reading is cut."""

    def limited(tokens):
        return f"student.path={scene.folder / student}", "rollout.max_new_tokens=50", limit.format(tokens)

    limit = "batch.max_tokens_per_micro_batch={}"
    scene.write("prompts.jsonl", [{"prompt": "Permission is hereby granted, free of charge"}])
    prompts = read(scene, *limited(1000), teacher=teacher, replay=False).prompts.prompts
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    of_teacher = max(len(prompt.teacher_prompt_ids) for prompt in prompts)
    assert longest != of_teacher and (longest < of_teacher) == (student == "other")
    room = longest + 50
    read(scene, *limited(room), teacher=teacher, replay=False)
    words = (f"max_tokens_per_micro_batch={room - 1} does not hold the longest prompt", f"raise it to {room}")
    refused(scene, *words, overrides=limited(room - 1), teacher=teacher, replay=False)


def test_an_evaluation_needs_no_teacher(scene):
    scene.write("questions.jsonl", [{"prompt": "1+1", "reward_model": {"ground_truth": "2"}}])
    data = f"evaluation.data=[{scene.folder / 'questions.jsonl'}]"
    small = (data, "evaluation.samples=1", "evaluation.max_new_tokens=2", "data.teacher_chat_template_kwargs={a: 1}")
    byte_tokenizer(chat="{{ raise_exception('no a') if a else messages[0].content }}").save_pretrained(scene.student)
    outcome = run(scene.folder, "evaluate", *scene.generating(f"teacher.path={scene.other}", *small))
    assert (outcome.code, outcome.stderr) == (0, "")
