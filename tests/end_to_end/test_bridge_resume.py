"""A fit, or a run with a bridge, that is killed and restarted gives the same files as an uninterrupted one."""

import json
import shutil
import signal
import time

import pytest

from megatron_oprd.testing.models import random_hf_model, save
from tests.helpers.bridges import save_random_bridge
from tests.helpers.commands import run
from tests.helpers.killable import Command, DieBefore, finish
from tests.helpers.runs import VOCAB_SIZE, assert_same_export, in_folder, metrics, prompt_run, replay_run
from tests.helpers.scene import assert_refused
from tests.helpers.tokenizer import CHAT_TEMPLATE, byte_tokenizer

STEPS = 8
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_key_value_heads": 4, "intermediate_size": 64}


@pytest.fixture(scope="module")
def complete_fit(tmp_path_factory):
    """Return the arguments of a fit of eight steps, and the folder of an uninterrupted fit."""
    folder = tmp_path_factory.mktemp("fit")
    arguments = prompt_run(folder, 1, **SIZES)
    with (folder / "many.jsonl").open("w") as file:
        for number in range(2 * STEPS):
            file.write(json.dumps({"prompt": f"{number}*3="}) + "\n")
    teacher = save(random_hf_model("Qwen3", 7, vocab_size=VOCAB_SIZE, **{**SIZES, "hidden_size": 48}), folder / "wide")
    byte_tokenizer(chat=CHAT_TEMPLATE).save_pretrained(teacher)
    arguments += [
        f"teacher.path={teacher}",
        f"data.prompts=[{folder / 'many.jsonl'}]",
        f"bridge.prompts={2 * STEPS}",
        "bridge.ranks=[2,4]",
        "bridge.held_out_fraction=0.25",
        "bridge.save_every=2",
    ]
    finish(in_folder(arguments, folder / "expected"), folder / "expected.log", module="bridge.fit")
    return arguments, folder / "expected" / "bridge"


def contents(folder):
    """Return the names of all files of a fit, and the bytes of its results."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    results = [folder / "fit.json", folder / "rollouts.jsonl", *sorted(folder.glob("rank_*/*"))]
    return names, {str(path.relative_to(folder)): path.read_bytes() for path in results}


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_when(reached, arguments, log):
    """Start a fit and kill it as soon as `reached` returns True."""
    command = Command(arguments, log, module="bridge.fit")
    while not reached() and command.is_running:
        time.sleep(0.0002)
    command.kill()


@pytest.mark.nightly
def test_a_killed_fit_resumes(complete_fit, tmp_path):
    """Kill a fit while it writes answers and while it sums moments; try again if a kill came too late."""
    arguments, expected = complete_fit
    for attempt in range(10):
        run_dir = tmp_path / f"run_{attempt}"
        here, folder, log = in_folder(arguments, run_dir), run_dir / "bridge", tmp_path / f"{attempt}.log"
        kill_when(lambda answers=folder / "rollouts.jsonl": lines(answers) >= 5, here, log)
        while_written = 5 <= lines(folder / "rollouts.jsonl") < 4 * STEPS
        kill_when(lambda sums=folder / "moments" / "step_0000002": sums.exists(), here, log)
        while_summed = not any(folder.glob("moments/step_0000008*"))
        if while_written and while_summed:
            break
    else:
        pytest.fail("it was never killed in time")
    assert lines(folder / "rollouts.jsonl") == 4 * STEPS and not (folder / "fit.json").exists()
    finish(here, log, module="bridge.fit")
    assert contents(folder) == contents(expected)


# The call before which the process dies, the saved steps of the moments, and a description.
CRASHES = [
    (DieBefore("os.rename", r"/asked\.json\."), [], "the folder made, nothing in it"),
    (DieBefore("open", r"/rollouts\.jsonl$"), [], "no answer written yet"),
    (DieBefore("os.rename", r"/step_0000002\.partial$"), [], "the first sums whole but not renamed"),
    (DieBefore("shutil.rmtree", r"/step_0000002$"), [2, 4], "the older sums not removed yet"),
    (DieBefore("os.rename", r"/step_0000008\.partial$"), [6], "the last sums whole but not renamed"),
    (DieBefore("os.mkdir", r"/rank_2\.partial$"), [8], "everything summed, nothing solved"),
    (DieBefore("os.rename", r"/rank_4\.partial$"), [8], "one bridge there, the other not renamed"),
    (DieBefore("os.rename", r"/fit\.json\."), [8], "both bridges there, the page of all not"),
]


def test_a_fit_resumes_after_a_crash_at_any_point(complete_fit, tmp_path):
    arguments, expected = complete_fit
    arguments, folder = in_folder(arguments, tmp_path / "run"), tmp_path / "run" / "bridge"
    for number, (die, kept, what) in enumerate(CRASHES):
        command = Command(arguments, tmp_path / f"{number}.log", module="bridge.fit", die=die)
        assert command.wait() == -signal.SIGKILL, (what, command.log.read_text())
        assert sorted(int(path.name[5:]) for path in folder.glob("moments/step_???????")) == kept, what
        if number == 1:
            (folder / "rollouts.jsonl").write_bytes((expected / "rollouts.jsonl").read_bytes()[:700])  # within a line
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    finish(arguments, tmp_path / "last.log", module="bridge.fit")
    assert contents(folder) == contents(expected)


def test_a_fit_on_two_ranks_resumes_after_a_crash(complete_fit, tmp_path):
    """Answers do not depend on the layout; sums may differ by rounding, so the expected fit has two ranks, too."""
    arguments, one = complete_fit
    expected, actual = tmp_path / "expected", tmp_path / "actual"
    finish(in_folder(arguments, expected), tmp_path / "log", module="bridge.fit", world_size=2)
    die = DieBefore("os.rename", r"/step_0000006\.partial$")
    options = {"module": "bridge.fit", "world_size": 2, "die": die}
    assert Command(in_folder(arguments, actual), tmp_path / "0.log", **options).wait() != 0
    finish(in_folder(arguments, actual), tmp_path / "1.log", module="bridge.fit", world_size=2)
    assert contents(actual / "bridge") == contents(expected / "bridge")
    assert (expected / "bridge" / "rollouts.jsonl").read_bytes() == (one / "rollouts.jsonl").read_bytes()


ANOTHER = {
    "rollout": "rollout.temperature=0.5",
    "loss.representation": "loss.representation.layers=[1]",
    "bridge": "bridge.held_out_fraction=0.5",
    "train.seed": "train.seed=1",
    "data": "data.shuffle=false",
    "precision": "precision.dtype=bf16",
}


@pytest.mark.parametrize("key", ANOTHER)
def test_another_fit_in_the_same_folder_is_refused(complete_fit, tmp_path, key):
    arguments, expected = complete_fit
    before = contents(expected)
    outcome = run(tmp_path, "bridge.fit", *in_folder(arguments, expected.parent), ANOTHER[key])
    assert_refused(outcome, str(expected), f"holds a fit with another {key};", "name a new train.run_dir")
    assert contents(expected) == before


@pytest.fixture(scope="module")
def bridged_run(tmp_path_factory):
    """Return the arguments of a run of four steps, and the settings of two bridges for it."""
    folder = tmp_path_factory.mktemp("led")
    arguments = replay_run(folder, 4, "health.every=0", "checkpoint.keep=4", **SIZES)
    teacher = save(random_hf_model("Qwen3", 7, vocab_size=VOCAB_SIZE, **{**SIZES, "hidden_size": 48}), folder / "wide")
    bridges = [save_random_bridge(folder / f"rank_{rank}", folder / "student", teacher, rank) for rank in (4, 3)]
    return [*arguments, f"teacher.path={teacher}"], *(f"loss.representation.bridge={path}" for path in bridges)


FADING_MAP = (
    *("loss.representation.bridge=null", "loss.representation.map.kind=mlp"),
    *("loss.representation.normalize=none", "loss.representation.layer_weights=inverse_square"),
    *("loss.output.objective=full_kl", "loss.schedule={representation: [[0, 1], [4, 0]], output: [[1, 0], [4, 1]]}"),
)
TRAINED = {
    "frozen": (1, ()),
    "trained by AdamW": (1, ("loss.representation.train_bridge=true",)),
    "trained by SGD": (1, ("loss.representation.train_bridge=true", "optimizer.name=sgd")),
    "trained on two stages": (2, ("loss.representation.train_bridge=true", "parallel.pipeline=2")),
    "a map of full width that fades out, on two parts of the data": (2, FADING_MAP),
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_with_a_bridge_resumes_exactly(bridged_run, tmp_path, name):
    world, settings = TRAINED[name]
    arguments, bridge, _ = bridged_run
    arguments = [*arguments, bridge, *settings]
    expected, actual = tmp_path / "expected", tmp_path / "actual"
    finish(in_folder(arguments, expected), tmp_path / "log", world_size=world)
    shutil.copytree(expected, actual)
    shutil.rmtree(actual / "checkpoints" / "step_0000004")
    shutil.rmtree(actual / "hf")
    finish(in_folder(arguments, actual), tmp_path / "resumed.log", world_size=world)
    assert metrics(actual) == metrics(expected)
    assert_same_export(actual, expected)
    maps = "checkpoints/step_0000004/maps.safetensors"
    assert (expected / maps).exists() == (name != "frozen")
    if name != "frozen":
        assert (actual / maps).read_bytes() == (expected / maps).read_bytes()
        assert (actual / maps).read_bytes() != (actual / maps.replace("04", "02", 1)).read_bytes()


def test_a_run_resumes_only_with_its_own_bridge(bridged_run, tmp_path):
    arguments, bridge, other = bridged_run
    train, frozen = (f"loss.representation.train_bridge={value}" for value in ("true", "false"))
    for name, first, refused in (
        (
            "another",
            (bridge,),
            {(other,): "was made with the bridge sha256:", (bridge, train): "made without a trained map"},
        ),
        (
            "trained",
            (bridge, train),
            {(bridge, frozen): "made with a trained map of hidden states, the configuration has none"},
        ),
    ):
        here = in_folder(arguments, tmp_path / name)
        finish([*here, *first, "train.steps=2", "checkpoint.export_hf=false"], tmp_path / f"{name}.log")
        before = metrics(tmp_path / name)
        for settings, words in refused.items():
            outcome = run(tmp_path, "train", *here, *settings)
            assert_refused(outcome, words, "name a new train.run_dir")
            assert metrics(tmp_path / name) == before
