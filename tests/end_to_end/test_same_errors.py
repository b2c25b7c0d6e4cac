"""Training and evaluation refuse the same mistake in models, layouts or precision with the same line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_oprd.config import load_config
from megatron_oprd.launch.evaluation_inputs import read_evaluation_inputs
from megatron_oprd.launch.inputs import read_inputs
from megatron_oprd.runtime.environment import Machine
from megatron_oprd.types import UserError
from tests.helpers.scene import Scene, make_scene, save_model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Make an unbroken scene with a model of experts (`experts`)."""
    scene = make_scene(tmp_path_factory.mktemp("original"))
    save_model(scene.experts, 2, "Qwen3Moe")
    return scene


@pytest.fixture
def scene(original: Scene, tmp_path: Path) -> Scene:
    shutil.copytree(original.folder, tmp_path / "scene")
    return Scene(tmp_path / "scene")


def options(scene: Scene, *overrides: str) -> list[str]:
    evaluation = ("evaluation.every=1", f"evaluation.data=[{scene.folder / 'prompts.jsonl'}]")
    return scene.generating(*evaluation, *overrides)


def cut_weights(scene: Scene) -> None:
    path = scene.student / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def nothing(scene: Scene) -> None:
    pass


OVERLAP = ("parallel.tensor=2", "parallel.sequence=true", "parallel.tp_comm_overlap=true")
IN_FP8 = ("precision.dtype=bf16", "precision.fp8=hybrid")
# Number of processes, what breaks, settings, part of the error.
MISTAKES: dict[str, tuple[int, Callable[[Scene], object], tuple[str, ...], str]] = {
    "processes": (3, nothing, ("parallel.tensor=2",), "multiple of 2 processes, not 3"),
    "another number of processes": (2, nothing, ("parallel.world_size=4",), "made for 4 processes"),
    "heads": (3, nothing, ("parallel.tensor=3",), "does not divide the student's attention heads"),
    "stages": (4, nothing, ("parallel.pipeline=4",), "more stages than the model's 2 layers"),
    "experts": (2, nothing, ("parallel.expert=2",), "the model has no experts"),
    "experts of whole tokens": (2, nothing, ("student.path={experts}", "parallel.tensor=2"), "parallel.sequence=true"),
    "recomputation": (
        2,
        nothing,
        ("parallel.pipeline=2", "recompute.granularity=full", "recompute.num_layers=2"),
        "does not divide the blocks of every pipeline stage",
    ),
    "overlap on a CPU": (2, nothing, OVERLAP, "parallel.tp_comm_overlap=true needs a CUDA device"),
    "device": (1, nothing, ("train.device=cuda",), "train.device=cuda"),
    "Transformer Engine": (1, nothing, ("precision.attention=te",), "Transformer Engine is not installed"),
    "FP8 on a CPU": (1, nothing, IN_FP8, "precision.fp8=hybrid needs Transformer Engine"),
    "config": (1, lambda s: (s.student / "config.json").unlink(), (), "config.json"),
    "weights": (1, cut_weights, (), "model.safetensors is truncated or corrupt"),
    "tokenizer": (1, lambda s: [path.unlink() for path in s.student.glob("tokenizer*")], (), "no tokenizer in"),
    "prompts": (1, lambda s: s.write("prompts.jsonl", [{"question": "1+1"}]), (), "no 'prompt'"),
    "run folder": (1, nothing, ("train.run_dir={experts}/config.json",), "cannot write"),
}


def refusal(read: Callable[..., object], arguments: list[str]) -> str:
    with pytest.raises(UserError) as refused:
        read(load_config(None, arguments))
    return str(refused.value)


@pytest.mark.parametrize("case", MISTAKES)
def test_training_and_evaluation_refuse_a_mistake_with_the_same_line(case, scene, monkeypatch):
    world_size, damage, overrides, words = MISTAKES[case]
    damage(scene)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    arguments = options(scene, *(override.format(experts=scene.experts) for override in overrides))
    line = refusal(read_evaluation_inputs, arguments)
    assert words in line and "\n" not in line
    assert refusal(read_inputs, arguments) == line


def test_sizes_without_fp8_products_are_refused_with_the_same_line(scene, monkeypatch):
    h100 = Machine("2.11.0", (9, 0), (13, 0))
    monkeypatch.setattr("megatron_oprd.launch.setup.find_machine", lambda: h100)
    scene.edit("student/config.json", intermediate_size=100)
    line = refusal(read_evaluation_inputs, options(scene, *IN_FP8))
    assert "the student's intermediate size is 100 on each rank" in line
    assert refusal(read_inputs, options(scene, *IN_FP8)) == line


def test_an_evaluation_on_the_teachers_answers_warns_of_libraries_once(scene, monkeypatch):
    checked = []
    monkeypatch.setattr("megatron_oprd.launch.setup.check_libraries", checked.append)
    scene.write("prompts.jsonl", [{"prompt": "1+1"}])
    inputs = read_evaluation_inputs(load_config(None, options(scene, "evaluation.teacher_answers=true")))
    assert inputs.setup.teachers and len(checked) == 1


def test_both_accept_the_scene(scene):
    arguments = options(scene)
    assert read_inputs(load_config(None, arguments)).evaluation_prompts is not None
    assert len(read_evaluation_inputs(load_config(None, arguments)).prompts.prompts) == 4
