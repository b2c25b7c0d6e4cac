"""Bad input about teachers, their prompts and their LM heads: one clear line, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.commands import run
from tests.helpers.scene import Scene, accept, make_scene, refuse, save_model, waiting_for

FULL_KL = "loss.output.objective=full_kl"
SOLVED = "data.teacher_prompt_key=solved"
WITHOUT_LAYERS = (FULL_KL, "loss.representation.weight=0")


@pytest.fixture(scope="module")
def complete_scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Make the scene with teachers of more layers (`deep`), of another width (`wide`) and of few positions (`short`),
    with prompts and rollouts of two sources.
    """
    scene = make_scene(tmp_path_factory.mktemp("whole"))
    save_model(scene.deep, 2, num_hidden_layers=3)
    save_model(scene.wide, 3, hidden_size=48)
    save_model(scene.short, 4, max_position_embeddings=12)
    scene.write("prompts.jsonl", [prompt(n) for n in range(4)])
    scene.write("replay.jsonl", [rollout(n) for n in range(12)])
    return scene


@pytest.fixture
def scene(complete_scene: Scene, tmp_path: Path) -> Scene:
    shutil.copytree(complete_scene.folder, tmp_path / "scene")
    return Scene(tmp_path / "scene")


def prompt(number: int, **values: object) -> dict[str, object]:
    text = f"{number}+1"
    return {"prompt": text, "solved": f"{text}={number + 1}", "data_source": source(number), **values}


def rollout(number: int, **values: object) -> dict[str, object]:
    ids = {"prompt_ids": [number, 2], "response_ids": [3, 4, number]}
    return {key: value for key, value in {**ids, "data_source": source(number), **values}.items() if value is not ...}


def source(number: int) -> str:
    return ("math", "code")[number % 2]


def several(scene: Scene, *overrides: str, math: str = "teacher", code: str = "deep") -> list[str]:
    """Overrides for two teachers instead of one, `overrides` after them."""
    paths = {"math": scene.folder / math, "code": scene.folder / code}
    return ["teacher=null", *(f"teachers.{name}.path={path}" for name, path in paths.items()), *overrides]


def test_the_unbroken_scene_is_accepted(scene):
    """Nothing is refused of what each test breaks one thing in."""
    for options in (
        scene.options(*several(scene)),
        scene.generating(*several(scene, FULL_KL, SOLVED)),
    ):
        accept("train", *options)


def rewrite(name: str, **values: object) -> Callable[[Scene], None]:
    """Gives the sixth rollout, or the second prompt, other values."""
    one, count, changed = (prompt, 4, 1) if name == "prompts" else (rollout, 12, 5)
    rows = [one(number, **(values if number == changed else {})) for number in range(count)]
    return lambda scene: scene.write(f"{name}.jsonl", rows)


PROMPTS: dict[str, tuple[Callable[[Scene], object], list[str], tuple[str, ...]]] = {
    "without a teacher": (
        rewrite("prompts", data_source="poetry"),
        [],
        ("data_source 'poetry' of 1 prompts has no teacher; teachers has math, code",),
    ),
    "without a source": (
        rewrite("prompts", data_source=None),
        [],
        ("data_source 'prompts' of 1 prompts has no teacher",),  # the name of the file
    ),
    "no column for the teacher": (
        lambda s: None,
        ["data.teacher_prompt_key=solution"],
        ("prompts.jsonl, line 1", "no 'solution' (data.teacher_prompt_key)", "it has: prompt, solved, data_source"),
    ),
    "a number for the teacher": (
        rewrite("prompts", solved=7),
        [SOLVED],
        ("prompts.jsonl, line 2", "'solved' must be a string or a list", "not a int"),
    ),
    "an empty conversation for the teacher": (
        rewrite("prompts", solved=[]),
        [SOLVED],
        ("prompts.jsonl, line 2", "'solved' must be a string or a list", "not an empty list"),
    ),
    "nothing for the teacher": (
        lambda s: s.write("prompts.jsonl", [prompt(n, solved="") for n in range(4)]),
        [SOLVED],
        ("no prompt is left", "4 not usable (first: row 1: the teacher's prompt: the prompt is empty)"),
    ),
    "too long for the teacher": (
        lambda s: None,
        [SOLVED, "data.max_prompt_tokens=4"],
        ("no prompt is left", "4 too long", "data.max_prompt_tokens=4"),
    ),
    "too long with the answer": (
        lambda s: None,
        [SOLVED, "batch.max_tokens_per_micro_batch=8"],
        ("max_tokens_per_micro_batch=8 does not hold the longest prompt", "raise it to 9"),
    ),
    "no room for an answer": (
        rewrite("prompts", prompt="1" * 20),
        ["student.path={short}"],
        ("the longest prompt has 20 tokens", "short has 12 positions", "lower data.max_prompt_tokens to 11"),
    ),
    "no room for an answer in an evaluation": (
        lambda s: s.write("evaluation.jsonl", [prompt(0), prompt(0, prompt="1" * 12)]),
        ["student.path={short}", "evaluation.every=1", "evaluation.data=[{short}/../evaluation.jsonl]"],
        ("the longest prompt has 12 tokens", "short has 12 positions"),
    ),
    "too few positions": (
        lambda s: None,
        ["teachers.code.path={short}", "rollout.max_new_tokens=10"],
        ("teachers.code.path=", "short has 12 positions", "needs 13; lower rollout.max_new_tokens to 9"),
    ),
    "too few positions for the teacher's prompts": (
        lambda s: None,
        ["teachers.code.path={short}", "rollout.max_new_tokens=9", SOLVED],
        ("teachers.code.path=", "short has 12 positions", "needs 14; lower rollout.max_new_tokens to 7"),
    ),
    "too few positions for what the student has room for": (
        lambda s: None,
        ["student.path={short}", "teachers.code.path={short}", "rollout.max_new_tokens=100", SOLVED],
        ("teachers.code.path=", "needs 14; lower rollout.max_new_tokens to 7"),
    ),
    "too few positions for a prompt": (
        rewrite("prompts", solved="1" * 12),
        ["teachers.code.path={short}", SOLVED],
        ("teachers.code.path=", "needs 16; lower data.max_prompt_tokens below 12"),
    ),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_without_a_teacher_are_refused(case, scene):
    damage, overrides, words = PROMPTS[case]
    damage(scene)
    overrides = [override.format(short=scene.short) for override in overrides]
    refuse(scene, words, "train", *scene.generating(*several(scene, *overrides)))


def test_what_fits_the_positions_of_a_teacher_exactly_is_not_refused(scene):
    """Three tokens and nine, asked for or all that the student has room for."""
    for overrides in (["rollout.max_new_tokens=9"], ["student.path={short}", "rollout.max_new_tokens=100"]):
        overrides = [override.format(short=scene.short) for override in overrides]
        options = scene.generating(*several(scene, *overrides, code="short"))
        accept("train", *options)


def test_an_only_teacher_with_too_few_positions_is_refused(scene):
    words = ("error: teacher.path=", "short has 12 positions", "lower rollout.max_new_tokens to 9")
    overrides = (f"teacher.path={scene.short}", "rollout.max_new_tokens=10")
    refuse(scene, words, "train", *scene.generating(*overrides))


REPLAYS: dict[str, tuple[dict[str, object], list[str], tuple[str, ...]]] = {
    "without a teacher": ({"data_source": "poetry"}, [], ("data_source 'poetry' of 1 rollouts has no teacher",)),
    "without a source": (
        {"data_source": ...},
        [],
        ("1 rollouts of ", "replay.jsonl have no data_source", "teachers has math, code"),
    ),
    "words for ids": ({"teacher_prompt_ids": ["a"]}, [], ("line 6", "teacher_prompt_ids must be a list of integers")),
    "beyond the vocabulary": ({"teacher_prompt_ids": [259]}, [], ("line 6", "teacher_prompt_ids contains 259")),
    "too long for a micro-batch": (
        {"teacher_prompt_ids": [1] * 20},
        ["batch.max_tokens_per_micro_batch=22"],
        ("max_tokens_per_micro_batch=22", "(23 tokens)"),
    ),
    "too long for the teacher": (
        {"teacher_prompt_ids": [1] * 10},
        ["teachers.code.path={short}"],
        ("replay.jsonl, line 6: 13 tokens", "teachers.code.path=", "short has 12 positions"),
    ),
    "too long for the student": (
        {"response_ids": [1] * 11},
        ["student.path={short}"],
        ("replay.jsonl, line 6: 13 tokens", "student.path=", "short has 12 positions"),
    ),
}


@pytest.mark.parametrize("case", REPLAYS)
def test_rollouts_without_a_teacher_are_refused(case, scene):
    values, overrides, words = REPLAYS[case]
    rewrite("replay", **values)(scene)
    overrides = [override.format(short=scene.short) for override in overrides]
    refuse(scene, words, "train", *scene.options(*several(scene, *overrides)))


def test_a_rollout_must_fit_its_own_teacher(scene):
    rewrite("replay", teacher_prompt_ids=[1] * 10)(scene)  # of code
    options = scene.options(*several(scene, math="short"))
    accept("train", *options)
    words = ("line 6: 13 tokens", " teacher.path=", "short has 12 positions")  # the only one reads all
    refuse(scene, words, "train", *scene.options(f"teacher.path={scene.short}"))


LAYOUTS: dict[str, tuple[int, list[str], tuple[str, ...]]] = {
    "heads": (
        3,
        ["teachers.math.parallel.tensor=3"],
        ("teachers.math.parallel.tensor=3", "teacher math's attention heads (8)", "use one of 1, 2"),
    ),
    "no multiple": (
        2,
        ["teachers.code.parallel={tensor: 2, pipeline: 2}"],
        ("teachers.code.parallel.tensor=2 x teachers.code.parallel.pipeline=2", "multiple of 4 processes, not 2"),
    ),
    "more stages than layers": (
        4,
        ["teachers.code.parallel.pipeline=4"],
        ("teachers.code.parallel.pipeline=4", "3 layers", "use teachers.code.parallel.pipeline of at most 3"),
    ),
    "experts of a dense model": (
        2,
        ["teachers.code.parallel.expert=2"],
        ("teachers.code.parallel.expert=2", "no experts", "use teachers.code.parallel.expert=1"),
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_impossible_layouts_of_several_teachers_are_refused(case, scene):
    world_size, overrides, words = LAYOUTS[case]
    refuse(scene, words, "train", *scene.options(*several(scene, *overrides)), environment=waiting_for(world_size))


def test_a_layout_that_does_not_divide_the_second_teacher_is_refused(scene):
    scene.edit("deep/config.json", intermediate_size=111)
    words = ("parallel.tensor=2", "teacher code's intermediate size (111)", "use one of 1")
    options = scene.options(*several(scene, "parallel.tensor=2"))
    refuse(scene, words, "train", *options, environment=waiting_for(2))


def test_layer_pairs_that_the_second_teacher_lacks_are_refused(scene):
    words = ("with teachers.code: loss.representation.pairs: teacher layer 3 does not exist; layers go from 1 to 2",)
    options = scene.options(*several(scene, "loss.representation.pairs=[[1, 3]]", math="deep", code="teacher"))
    refuse(scene, words, "train", *options)


def test_another_width_is_refused_if_hidden_states_are_compared(scene):
    words = ("hidden_size 32 differs from teachers.code hidden_size 48", "loss.representation.weight=0")
    refuse(scene, words, "train", *scene.options(*several(scene, FULL_KL, code="wide")))
    for name, overrides in (("one", [f"teacher.path={scene.wide}"]), ("two", several(scene, code="wide"))):
        run_dir = f"train.run_dir={scene.folder / name}"
        outcome = run(scene.folder, "train", *scene.options(*overrides, *WITHOUT_LAYERS, run_dir))
        assert (outcome.code, outcome.stderr) == (0, "")


def head_apart(scene: Scene) -> Path:
    """Puts the LM head of `deep` into a file of its own."""
    tensors = load_file(scene.deep / "model.safetensors")
    (scene.deep / "model.safetensors").unlink()
    files = {name: "head.safetensors" if name == "lm_head.weight" else "rest.safetensors" for name in tensors}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(part, scene.deep / file, metadata={"format": "pt"})
    (scene.deep / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return scene.deep / "head.safetensors"


def no_head(scene: Scene) -> None:
    tensors = load_file(scene.deep / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, scene.deep / "model.safetensors", metadata={"format": "pt"})


def cut_head(scene: Scene) -> None:
    file = head_apart(scene)
    file.write_bytes(file.read_bytes()[:500])


def short_head(scene: Scene) -> None:
    file = head_apart(scene)
    save_file({"lm_head.weight": load_file(file)["lm_head.weight"][:100].clone()}, file)


def other_ids(scene: Scene) -> None:
    values = json.loads((scene.deep / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (scene.deep / "tokenizer.json").write_text(json.dumps(values))


BROKEN: dict[str, tuple[Callable[[Scene], object], tuple[str, ...]]] = {
    "not there": (lambda s: shutil.rmtree(s.deep), ("deep is not a folder",)),
    "no head": (no_head, ("deep holds no lm_head.weight; if it is the embedding, set tie_word_embeddings",)),
    "head not there": (lambda s: head_apart(s).unlink(), ("deep/head.safetensors is missing",)),
    "head cut": (cut_head, ("deep/head.safetensors is truncated or corrupt",)),
    "head of another vocabulary": (short_head, ("deep: lm_head.weight has shape [100, 32]", "asks for [259, 32]")),
    "other ids": (other_ids, ("tokenizers of student.path=", "teachers.code.path=", "other ids")),
    "smaller vocabulary": (
        lambda s: save_model(s.deep, 2, vocab_size=250),
        ("ids up to 258", "teachers.code.path=", "vocabulary of 250"),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_second_teacher_is_refused(case, scene):
    damage, words = BROKEN[case]
    damage(scene)
    refuse(scene, words, "train", *scene.generating(*several(scene, FULL_KL)))


def test_an_evaluation_needs_no_teachers(scene):
    scene.write("questions.jsonl", [{"prompt": "1+1", "reward_model": {"ground_truth": "2"}}])
    data = f"evaluation.data=[{scene.folder / 'questions.jsonl'}]"
    small = (data, "evaluation.samples=1", "evaluation.max_new_tokens=2")
    teachers = several(scene, SOLVED, *WITHOUT_LAYERS, math="nowhere", code="nowhere")
    outcome = run(scene.folder, "evaluate", *scene.generating(*teachers, *small))
    assert (outcome.code, outcome.stderr) == (0, "")
