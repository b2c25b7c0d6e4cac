"""Invalid bridges and fits end with one clear line and exit code 2, and write nothing that looks like a bridge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.commands import run, run_ranks
from tests.helpers.killable import finish
from tests.helpers.scene import Scene, assert_refused, make_scene, refuse, save_model

MAKE_A_BRIDGE = "-m megatron_oprd.bridge.fit"
FIT = ("bridge.prompts=4", "bridge.ranks=[2]", "bridge.held_out_fraction=0.5", "bridge.ridges=[1e-2]")


@pytest.fixture(scope="module")
def shared_scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Create a scene with an unlike teacher (`unlike`) and two fits: `of_all` layers and `of_one` layer."""
    scene = make_scene(tmp_path_factory.mktemp("scene"))
    save_model(scene.unlike, 5, "Qwen2", num_hidden_layers=3, hidden_size=48)
    for name, layers in (("of_all", "all"), ("of_one", "[1]")):
        run_dir = f"train.run_dir={scene.folder / name}"
        options = scene.generating(*unlike(scene), *FIT, run_dir, f"loss.representation.layers={layers}")
        finish(options, scene.folder / f"rank-{name}.log", module="bridge.fit")
    return scene


@pytest.fixture
def scene(shared_scene: Scene, tmp_path: Path) -> Scene:
    shutil.copytree(shared_scene.folder, tmp_path / "scene")
    return Scene(tmp_path / "scene")


def unlike(scene: Scene, *overrides: str) -> list[str]:
    return [f"teacher.path={scene.unlike}", "health.every=0", *overrides]


def bridged(scene: Scene, *overrides: str, bridge: str = "of_all/bridge/rank_2") -> list[str]:
    """Return the arguments of a run of one step with a bridge, on generated rollouts."""
    return scene.generating(*unlike(scene), f"loss.representation.bridge={scene.folder / bridge}", *overrides)


def test_the_unmodified_scene_runs(scene):
    """The other tests change one thing in this scene."""
    outcome = run(scene.folder, "train", *bridged(scene))
    assert outcome.code == 0, outcome.stderr
    assert (scene.run / "hf").exists()


def scale(name: str) -> Callable[[Scene], None]:
    """Return a change that scales the weights of a model."""

    def change(scene: Scene) -> None:
        path = scene.folder / name / "model.safetensors"
        save_file({key: tensor * 1.5 for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})

    return change


def other_ids(scene: Scene) -> None:
    values = json.loads((scene.unlike / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (scene.unlike / "tokenizer.json").write_text(json.dumps(values))


def no_bank(scene: Scene) -> None:
    torch.save({"model": torch.zeros(3)}, scene.folder / "other.pt")


nothing: Callable[[Scene], None] = lambda scene: None  # noqa: E731
BRIDGES: dict[str, tuple[Callable[[Scene], object], str, list[str], tuple[str, ...]]] = {
    "not there": (nothing, "nowhere", [], ("no bridge at", "nowhere", MAKE_A_BRIDGE)),
    "the folder above": (nothing, "of_all/bridge", [], ("no bridge at", "bridge.json is missing", MAKE_A_BRIDGE)),
    "half there": (
        lambda s: (s.of_all / "bridge" / "rank_2" / "bridge.safetensors").unlink(),
        "of_all/bridge/rank_2",
        [],
        ("bridge.safetensors is missing",),
    ),
    "of fewer layers": (
        nothing,
        "of_one/bridge/rank_2",
        [],
        ("of_one/bridge/rank_2 has no maps for student layer 2 and teacher layer 3", MAKE_A_BRIDGE),
    ),
    "no bank": (
        no_bank,
        "other.pt",
        [],
        ("other.pt is not a ps_bank file: state_dict must be a dictionary of tensors",),
    ),
    "no tensors": (
        lambda s: (s.folder / "other.pt").write_bytes(b"hello"),
        "other.pt",
        [],
        ("torch.load cannot read", "other.pt with weights_only=True"),
    ),
}


@pytest.mark.parametrize("case", BRIDGES)
def test_an_invalid_bridge_is_refused(case, scene):
    damage, bridge, overrides, words = BRIDGES[case]
    damage(scene)
    refuse(scene, words, "train", *bridged(scene, *overrides, bridge=bridge))


RUNS: dict[str, tuple[Callable[[Scene], object], list[str], tuple[str, ...]]] = {
    "other student": (scale("student"), [], ("was fitted for another student", "hash sha256:", MAKE_A_BRIDGE)),
    "other teacher": (scale("unlike"), [], ("was fitted for another teacher", "hash sha256:", MAKE_A_BRIDGE)),
    "other tokenizer": (other_ids, [], ("was fitted for another teacher", "tokenizer sha256:", MAKE_A_BRIDGE)),
    "another width": (
        lambda s: save_model(s.unlike, 5, "Qwen2", num_hidden_layers=3, hidden_size=64),
        [],
        ("was fitted for another teacher", "hidden_size 48", "hidden_size 64"),
    ),
    "positions": (nothing, ["positions=all"], ('with positions="last_k"', 'loss.representation.positions="all"')),
    "k": (nothing, ["k=5"], ("was fitted with k=2000", "loss.representation.k=5")),
    "shift": (nothing, ["shift=-1"], ("was fitted with shift=0", "loss.representation.shift=-1")),
    "final norm": (nothing, ["final_norm=false"], ("final_norm=true", "loss.representation.final_norm=false")),
    "trained without one": (
        nothing,
        ["bridge=null", "train_bridge=true"],
        ("loss.representation.train_bridge=true needs loss.representation.bridge",),
    ),
    "widths without one": (
        nothing,
        ["bridge=null"],
        ("hidden_size 32 differs from teacher hidden_size 48", "-m megatron_oprd.bridge.fit"),
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_bridge_that_does_not_fit_the_run_is_refused(case, scene):
    damage, overrides, words = RUNS[case]
    damage(scene)
    refuse(scene, words, "train", *bridged(scene, *(f"loss.representation.{one}" for one in overrides)))


def test_a_bridge_with_several_teachers_is_refused(scene):
    several = ("teacher=null", f"teachers.prompts.path={scene.unlike}")
    words = ("loss.representation.bridge joins the student with one teacher", "teacher.path")
    refuse(scene, words, "train", *bridged(scene, *several))
    words = ("a bridge joins the student with one teacher", "teacher.path")
    refuse(scene, words, "bridge.fit", *scene.generating(*unlike(scene), *FIT, *several))


FITS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "ranks above the width": (
        ["bridge.ranks=[2,33]"],
        ("bridge.ranks: 33 is more than 32", "student (32)", "teacher (48)", "ranks go up to 32"),
    ),
    "more prompts than there are": (
        ["bridge.prompts=5"],
        ("bridge.prompts=5", "rollout.prompts_per_step=2 needs 6 prompts, data.prompts has 4"),
    ),
    "nothing held out": (
        ["bridge.held_out_fraction=0.2"],
        ("bridge.held_out_fraction=0.2 of 4 prompts leaves 0 held out", "raise bridge.prompts"),
    ),
    "nothing to compare": (
        ["loss.representation.weight=0", "loss.output.objective=full_kl"],
        ("loss.representation.weight=0 compares no hidden states",),
    ),
    "too few rollouts": (
        ["rollout.engine=replay", "bridge.prompts=8"],
        ("rollout.path has 12 rollouts", "need 16: 4 lines are missing"),
    ),
    "no ranks": (["bridge.ranks=[]"], ("bridge.ranks=[]",)),
    "a fraction that is none": (["bridge.held_out_fraction=1.0"], ("bridge.held_out_fraction=1.0",)),
    "a layer that is not there": (
        ["loss.representation.layers=[3]"],
        ("loss.representation.layers: student layer 3", "from 1 to 2"),
    ),
    "several teachers, not one": (["teacher=null"], ("teacher is required",)),
}


@pytest.mark.parametrize("case", FITS)
def test_an_invalid_fit_is_refused(case, scene):
    overrides, words = FITS[case]
    refuse(scene, words, "bridge.fit", *scene.generating(*unlike(scene), *FIT, *overrides))


@pytest.mark.parametrize("method", ["closed_form", "adamw"])
@pytest.mark.parametrize(
    ("fraction", "what"), [(0.25, "held-out tokens, there are 2"), (0.75, "training tokens, there are 2")]
)
def test_too_few_tokens_are_refused_without_a_bridge(scene, method, fraction, what):
    """This is known only after generation: answers and moments are kept, but no bridge is written."""
    overrides = ("loss.representation.positions=last", "bridge.ranks=[4]", f"bridge.held_out_fraction={fraction}")
    options = scene.generating(*unlike(scene), *FIT, *overrides, f"bridge.method={method}")
    words = (f"bridge of rank 4 needs more than 4 {what}", "raise bridge.prompts")
    assert_refused(run(scene.folder, "bridge.fit", *options), *words)
    assert (scene.run / "bridge" / "rollouts.jsonl").exists()
    assert not [path for path in scene.run.rglob("*") if path.name.startswith("rank_") or path.name == "fit.json"]


def test_other_rollouts_under_the_same_name_are_refused(scene):
    options = scene.options(*unlike(scene), *FIT)
    assert run(scene.folder, "bridge.fit", *options).code == 0
    scene.write("replay.jsonl", [{"prompt_ids": [n, 2], "response_ids": [7, n]} for n in range(12)])
    refuse(scene, ("run/bridge holds a fit with another content of rollout.path",), "bridge.fit", *options)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:99])])
def test_a_damaged_moments_file_is_named(scene, damage):
    options = scene.generating(*unlike(scene), *FIT)
    assert run(scene.folder, "bridge.fit", *options).code == 0
    moments = scene.run / "bridge" / "moments"
    damage(moments / "step_0000002" / "student_2.teacher_3.safetensors")
    words = ("step_0000002/student_2.teacher_3.safetensors is missing or corrupt", f"remove {moments} to sum anew")
    refuse(scene, words, "bridge.fit", *options)
    shutil.rmtree(moments)
    assert run(scene.folder, "bridge.fit", *options).code == 0


@pytest.mark.parametrize("method", ["train", "bridge.fit"])
def test_every_rank_ends_and_one_prints_the_error(scene, method):
    if method == "train":
        scale("unlike")(scene)
        options, words = bridged(scene), ("was fitted for another teacher", "hash sha256:")
    else:
        options = scene.generating(*unlike(scene), *FIT, "loss.representation.positions=last", "bridge.ranks=[4]")
        words = ("a bridge of rank 4 needs more than 4 training tokens",)
    first, second = run_ranks(2, scene.folder, method, *options)
    assert_refused(first, *words)
    assert (second.code, second.stderr) == (2, "")
