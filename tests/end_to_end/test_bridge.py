"""Fit a bridge between two unlike models and train a student with it, by the commands."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_oprd.bridge.ps_bank import write_ps_bank
from megatron_oprd.bridge.store import read_bridge
from megatron_oprd.rollout.replay import load_replay
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.types import LayerPair
from tests.helpers.commands import run
from tests.helpers.killable import finish
from tests.helpers.runs import in_folder, metrics, prompt_run, read_lines
from tests.helpers.tokenizer import CHAT_TEMPLATE, byte_tokenizer
from tests.helpers.vocabularies import llama_3_tokenizer

STEPS = 2
PAIRS = [LayerPair(1, 1), LayerPair(2, 4)]
FIT = ("bridge.prompts=4", "bridge.ranks=[2,4]", "bridge.held_out_fraction=0.5")
TOKENIZERS = {"same tokenizer": lambda: byte_tokenizer(chat=CHAT_TEMPLATE), "another tokenizer": llama_3_tokenizer}
# Losses of a step in two layouts differ by rounding.
one_tokenizer = pytest.mark.parametrize("fitted", ["same tokenizer"], indirect=True, scope="module")
LAYOUTS = {
    "tensor, the teacher's own": ("parallel.tensor=2", "teacher.parallel={tensor: 1, pipeline: 2}"),
    "pipeline, the teacher's own": ("parallel.pipeline=2", "teacher.parallel={tensor: 2, pipeline: 1}"),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def fitted(request, tmp_path_factory):
    """Return the folder of a fit, the arguments of runs with its models, and the output of the fit."""
    folder = tmp_path_factory.mktemp("bridge")
    sizes = {"num_key_value_heads": 4, "intermediate_size": 64}
    arguments = prompt_run(folder, STEPS, num_hidden_layers=2, hidden_size=32, **sizes)
    tokenizer = TOKENIZERS[request.param]()
    teacher = random_hf_model("Qwen2", 7, vocab_size=1010, num_hidden_layers=4, hidden_size=48, **sizes)
    tokenizer.save_pretrained(save(teacher, folder / "unlike"))
    arguments = [*arguments, f"teacher.path={folder / 'unlike'}", "health.every=0"]
    arguments.append("loss.representation.aggregation=token_mean")
    log = finish([*in_folder(arguments, folder / "fit"), *FIT], folder / "fit.log", module="bridge.fit")
    return folder, arguments, log


def with_bridge(fitted, rank=4, bridge=None):
    folder, arguments, _ = fitted
    return [*arguments, f"loss.representation.bridge={bridge or folder / 'fit' / 'bridge' / f'rank_{rank}'}"]


@pytest.fixture(scope="module")
def trained(fitted):
    """Return the folder of a training run with the bridge, and its output."""
    folder = fitted[0] / "trained"
    return folder, finish(in_folder(with_bridge(fitted), folder), fitted[0] / "train.log")


def test_a_fit_writes_bridges_and_prints_how_to_use_them(fitted):
    folder, _, log = fitted
    results = json.loads((folder / "fit" / "bridge" / "fit.json").read_text())
    for rank in (2, 4):
        path = folder / "fit" / "bridge" / f"rank_{rank}"
        assert f"loss.representation.bridge={path}\n" in log
        bridge = read_bridge(path)
        assert bridge.rank == rank and list(bridge.maps) == PAIRS == list(bridge.statistics)
        rows = [row for row in results["fits"] if row["rank"] == rank]
        assert [row["error"] for row in rows] == [one.error for one in bridge.statistics.values()]
    counts = results["origin"]["counts"]
    assert (counts["prompts"], counts["sequences"]) == (4, 8)
    assert 0 < counts["held_out_tokens"] < counts["tokens"]
    another = results["origin"]["teacher"]["tokenizer"] != results["origin"]["student"]["tokenizer"]
    coverage = results["origin"]["coverage"]
    assert 0 < coverage <= 1 if another else coverage is None


def test_a_student_trained_with_a_bridge_opens_in_transformers(fitted, trained):
    folder, log = trained
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["loss"] == pytest.approx(10 * row["rep/mse"]) and row["loss"] > 0
        assert row["rep/mse/layer_2"] == pytest.approx(2 * (1 - row["rep/cosine/layer_2"]) / 4, rel=1e-4)
    assert "does not say" not in log
    AutoTokenizer.from_pretrained(folder / "hf")
    student = fitted[0] / "student"
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (student, folder / "hf"))
    assert {name for name, tensor in before.items() if torch.equal(tensor, after[name])} == {"lm_head.weight"}


@one_tokenizer
def test_a_dry_run_describes_a_run_with_a_bridge(fitted, tmp_path):
    outcome = run(tmp_path, "train", "--dry-run", *with_bridge(fitted))
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "loss.representation.bridge=" in outcome.stdout and "targets" in outcome.stdout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_losses_do_not_depend_on_the_layout(fitted, trained, tmp_path, layout):
    """Both runs replay the answers of the fit: sampling may differ between layouts if two tokens are almost equal."""
    replayed = (
        "rollout.engine=replay",
        f"rollout.path={fitted[0] / 'fit' / 'bridge' / 'rollouts.jsonl'}",
        "checkpoint.every=0",
        "checkpoint.export_hf=false",
    )
    for world, name, overrides in ((1, "one", ()), (2, "other", LAYOUTS[layout])):
        run_dir = in_folder([*with_bridge(fitted), *replayed, *overrides], tmp_path / name)
        finish(run_dir, tmp_path / f"{name}.log", world_size=world)
    one, other = ([row["loss"] for row in metrics(tmp_path / name)] for name in ("one", "other"))
    assert other == pytest.approx(one, rel=1e-5) and len(one) == STEPS
    assert one[0] == pytest.approx(metrics(trained[0])[0]["loss"], rel=1e-6)  # the first step's prompts are the fit's


def test_the_stored_answers_are_a_replay_file_for_another_fit(fitted, tmp_path):
    folder, arguments, _ = fitted
    stored = folder / "fit" / "bridge" / "rollouts.jsonl"
    assert len(load_replay(stored)) == 8
    replay = ("rollout.engine=replay", f"rollout.path={stored}")
    finish([*in_folder(arguments, tmp_path / "again"), *FIT, *replay], tmp_path / "log", module="bridge.fit")
    assert not (tmp_path / "again" / "bridge" / "rollouts.jsonl").exists()
    for rank in (2, 4):
        first, again = (
            load_file(of / "bridge" / f"rank_{rank}" / "bridge.safetensors")
            for of in (folder / "fit", tmp_path / "again")
        )
        assert all(torch.equal(first[name], again[name]) for name in first | again)


@one_tokenizer
def test_a_bridge_of_the_authors_trains_to_the_same_losses(fitted, trained, tmp_path):
    write_ps_bank(tmp_path / "bank", read_bridge(fitted[0] / "fit" / "bridge" / "rank_4").maps)
    path = tmp_path / "bank" / "ps_bank.pt"
    log = finish(in_folder(with_bridge(fitted, bridge=path), tmp_path / "run"), tmp_path / "log")
    assert metrics(tmp_path / "run") == metrics(trained[0])
    (line,) = [line for line in log.splitlines() if "nothing checks" in line]
    for words in (str(path), "the student's weights", "the teacher's tokenizer", "the positions"):
        assert words in line


@one_tokenizer
def test_other_ranks_of_a_finished_fit_reuse_its_moments(fitted, tmp_path):
    """Also with a configuration that already uses a bridge."""
    folder, arguments, _ = fitted
    run_dir = folder / "fit"
    kept = [run_dir / "bridge" / "rollouts.jsonl", *(run_dir / "bridge" / "moments").rglob("*.safetensors")]
    before = [path.read_bytes() for path in kept]
    wanted = [*in_folder(with_bridge(fitted), run_dir), *FIT, "bridge.ranks=[3]", "loss.representation.weight=3"]
    log = finish(wanted, tmp_path / "log", module="bridge.fit")
    assert "rank_3" in log and read_bridge(run_dir / "bridge" / "rank_3").rank == 3
    assert [path.read_bytes() for path in kept] == before
    of_four, of_three = (read_bridge(run_dir / "bridge" / f"rank_{rank}").maps for rank in (4, 3))
    for pair in PAIRS:
        assert torch.equal(of_four[pair].teacher_map[:3], of_three[pair].teacher_map)
    outcome = run(tmp_path, "bridge.fit", *in_folder(arguments, run_dir), *FIT, "rollout.max_new_tokens=5")
    assert outcome.code == 2 and outcome.stderr.count("\n") == 1
    assert "holds a fit with another rollout" in outcome.stderr
    assert len(read_lines(run_dir / "bridge" / "rollouts.jsonl")) == 8
