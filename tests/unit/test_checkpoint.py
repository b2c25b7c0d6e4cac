"""Choosing, loading and refusing checkpoints, and the run log after a killed process."""

import dataclasses
import json
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_oprd.checkpoint.saver import Saver
from megatron_oprd.checkpoint.training_state import MARK, latest_checkpoint, load_checkpoint, prune_checkpoints
from megatron_oprd.config import CheckpointConfig, load_config
from megatron_oprd.launch.assemble import build_run
from megatron_oprd.launch.inputs import read_inputs
from megatron_oprd.launch.run_folder import find_checkpoint, record_prompts
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.train import one_step
from megatron_oprd.training.curves import TensorBoardCurves
from megatron_oprd.training.run_log import RunLog
from megatron_oprd.training.state import Identity, TrainState
from megatron_oprd.training.step_line import StepLine
from megatron_oprd.types import Prompt, UserError
from tests.helpers.killable import finish
from tests.helpers.runs import metrics, replay_run


def marked(folder, step, mark=True):
    path = folder / f"step_{step:07d}"
    (path / "model").mkdir(parents=True)
    (path / "model" / "weights").write_text("x")
    if mark:
        (path / MARK).touch()
    return path


def test_the_newest_complete_checkpoint_is_found(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    marked(tmp_path, 8)
    newest = marked(tmp_path, 10)
    marked(tmp_path, 12, mark=False)
    (marked(tmp_path, 14, mark=False)).rename(tmp_path / "step_0000014.partial")
    assert latest_checkpoint(tmp_path) == newest


def test_pruning_keeps_the_newest_checkpoints_and_removes_leftovers_of_killed_processes(tmp_path):
    for step in (2, 4, 6):
        marked(tmp_path, step)
    marked(tmp_path, 3, mark=False)
    marked(tmp_path, 5, mark=False).rename(tmp_path / "step_0000005.partial")
    unrelated = marked(tmp_path, 1).rename(tmp_path / "step_of_my_own")
    prune_checkpoints(tmp_path, 2)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "step_0000004", tmp_path / "step_0000006", unrelated]


def test_pruning_removes_the_mark_before_the_files(tmp_path, monkeypatch):
    old, _ = marked(tmp_path, 2), marked(tmp_path, 4)

    def killed(path):
        assert not (path / MARK).exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoints(tmp_path, 1)
    assert (old / "model" / "weights").exists()
    assert latest_checkpoint(tmp_path) == tmp_path / "step_0000004"


BEST = {"metric": "accuracy/mean@1", "step": 1, "value": 0.5, "later": 0}
PENDING = {"version": 1, "prompts": {"epoch": 0, "position": 2}, "sha256": "0" * 64}
TEACHER = {"path": "/a", "hash": "sha256:0", "pairs": [[1, 1]], "bridge": None}
WRONG_STATES = (
    {"step": 5},
    {"step": "1.5"},
    {"step": None},
    {"step": True},
    {"prompts": {"epoch": 0, "position": -1}},
    {"prompts": {"epoch": 0, "position": 0.5}},
    {"prompts": {}},
    {"prompts": 7},
    {"student": [1]},
    {"student": {"path": "/a"}},
    {"student": {"path": "/a", "hash": 3}},
    {"teachers": [TEACHER]},
    {"teachers": {"": {"path": "/a"}}},
    {"teachers": {"": TEACHER | {"pairs": [[1]]}}},
    {"teachers": {"": TEACHER | {"pairs": ["11"]}}},
    {"teachers": {"": TEACHER | {"bridge": ["sha256:0"]}}},
    {"best": 0.5},
    {"best": BEST | {"step": 7}},
    {"best": BEST | {"step": "one"}},
    {"best": BEST | {"value": "high"}},
    {"best": BEST | {"value": float("nan")}},
    {"best": BEST | {"later": -1}},
    {"best": BEST | {"metric": None}},
    {"layer_squares": {"steps": 1}},
    {"layer_squares": {"steps": "1", "means": {"1": 1.0, "2": 1.0}}},
    {"layer_squares": {"steps": 1, "means": {"1": 1.0, "2": "big"}}},
    {"layer_squares": {"steps": 1, "means": {"1": 1.0}}},
    {"layer_squares": {"steps": 1, "means": {"1": 1.0, "2": 0.0}}},
    {"pending": True},
    {"pending": PENDING | {"version": "x"}},
    {"pending": PENDING | {"version": -1}},
    {"pending": PENDING | {"prompts": {"epoch": 0}}},
    {"pending": PENDING | {"sha256": None}},
)


def load_and_refuse(rank, arguments):
    """Train a step, save, and load with other identities and after damage; return each result or error message."""
    run = build_run(read_inputs(load_config(None, arguments)))
    folder = run.inputs.run_dir / "checkpoints"
    state, _, _ = one_step(run, TrainState())
    marked(folder, 1, mark=False)  # left by a process that died between the rename and the mark
    Saver(folder, run.checkpoint_content, CheckpointConfig(keep=2, asynchronous=False)).save(state)
    found = find_checkpoint(run.inputs)
    own, results = run.identities[""], {}
    cases = {
        "teacher": Identity("/other", "sha256:" + "0" * 64, own.pairs),
        "pairs": Identity(own.path, own.hash, own.pairs[1:]),
        "base": Identity(own.path, own.hash, own.pairs, base="1.25 sha256:" + "1" * 64),
        "moved teacher": Identity("/moved", own.hash, own.pairs),
        "several": own,
        "own": own,
        "optimizer": own,
        "model": own,
        "state": own,
    }
    state_file = found / "state.json"
    content = state_file.read_text()
    for change in WRONG_STATES:
        state_file.write_text(json.dumps(json.loads(content) | change))
        try:
            results[str(change)] = load_checkpoint(found, run.checkpoint_content)
        except UserError as error:
            results[str(change)] = str(error)
    state_file.write_text(content)
    damage = {"optimizer": "optimizer/__0_0.distcp", "model": "model/__0_0.distcp", "state": "state.json"}
    for name, identity in cases.items():
        if name in damage:
            (found / damage[name]).write_bytes((found / damage[name]).read_bytes()[:100])
        try:
            named = {"math": identity} if name == "several" else {"": identity}
            results[name] = load_checkpoint(found, dataclasses.replace(run.checkpoint_content, teachers=named))
        except UserError as error:
            results[name] = str(error)
    return results


def test_other_teachers_other_layers_and_damage_are_refused_in_one_line(tmp_path):
    arguments = replay_run(tmp_path, 2, num_hidden_layers=2)
    (results,) = run_distributed(1, load_and_refuse, arguments)
    step = tmp_path / "run" / "checkpoints" / "step_0000001"
    assert results["own"] == results["moved teacher"] == TrainState(1)
    assert results["teacher"].startswith(f"{step} was made with another teacher ({tmp_path / 'teacher'}, sha256:")
    assert "teacher.path=/other (sha256:000000" in results["teacher"]
    assert results["several"].startswith(
        f"{step} was made with other teachers (a single teacher) than the configuration"
    )
    assert results["pairs"] == (
        f"{step} was made with the layer pairs [1-1, 2-2], the configuration asks for [2-2]; continue with those or "
        "name a new train.run_dir"
    )
    assert results["base"] == (
        f"{step} was made without a base, teacher.base asks for a run with the base sha256:{'1' * 12} and extrapolate "
        "1.25; continue as it was or name a new train.run_dir"
    )
    assert results["optimizer"].startswith(f"{step / 'optimizer' / '__0_0.distcp'} is truncated: 100 of ")
    assert results["optimizer"].endswith("remove this checkpoint to continue from the one before")
    assert "__0_0.distcp is truncated" in results["model"] and "copy the whole" not in results["model"]
    assert results["model"].endswith("remove this checkpoint to continue from the one before")
    assert "state.json" in results["state"]
    for change in map(str, WRONG_STATES):
        assert "state.json cannot be read (" in results[change], (change, results[change])
        assert results[change].endswith("remove this checkpoint to continue from the one before")
    for text in (results[name] for name in ("teacher", "pairs", "optimizer", "model", "state")):
        assert "\n" not in text and "Traceback" not in text and len(text) < 500, text


def test_a_refused_run_leaves_the_folder_unchanged(tmp_path):
    arguments = replay_run(tmp_path, 2, "checkpoint.export_hf=false", num_hidden_layers=2)
    finish(arguments, tmp_path / "log")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for settings, message in (
        (["loss.representation.layers=[2]"], "was made with the layer pairs [1-1, 2-2]"),
        ([f"teacher.path={tmp_path / 'student'}"], "was made with another teacher"),
        (["checkpoint.resume=never"], "holds a run"),
    ):
        with pytest.raises(AssertionError, match="exit code 2") as caught:
            finish([*arguments, "train.steps=2", *settings], tmp_path / f"{message[:9]}.log")
        assert message in str(caught.value)
        assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_resumed_run_says_that_its_prompts_have_changed(tmp_path, capsys):
    prompts = [Prompt(0, (1, 2)), Prompt(1, (3,))]
    changed = [Prompt(0, (1,)), Prompt(1, (2, 3))]
    (tmp_path / "configs").mkdir()
    for given, first_step, printed in (
        (prompts, 1, ""),
        (prompts, 5, ""),
        (changed, 7, "the prompts have changed (2 before, 2 now): from step 7 on, some of this epoch may come twice"),
        (changed, 9, ""),
        (prompts, 1, ""),  # a run that starts anew in the same folder
    ):
        record_prompts(tmp_path, given, first_step)
        output = capsys.readouterr().out
        assert output.startswith(printed) and bool(output) == bool(printed)


def opened(run_dir, start):
    log = RunLog(run_dir, StepLine(4, ("loss", "rep/cosine"), 4), [TensorBoardCurves(run_dir)])
    log.open(start)
    return log


def step_values(step):
    names = ("loss", "grad_norm", "lr", "rep/cosine", "rollout/length_mean", "time/step")
    return {"step": step, **dict.fromkeys(names, float(step))}


def test_the_log_continues_after_the_checkpoint(tmp_path):
    log = opened(tmp_path, 0)
    log.evaluation(0, "before", {"sums": {"avg@1": 0.5}})
    for step in (1, 2, 3):
        log.step(step_values(step))
    log.evaluation(3, "step 3", {"sums": {"avg@1": 0.5}})
    # The process is killed here: tensorboard is not closed, a line and a replaced file are half-written.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 1')
    (tmp_path / "metrics.jsonl.77.tmp").write_text('{"step": 1}')
    (tmp_path / "rollouts" / "step_0000004.jsonl.77.tmp").touch()
    log = opened(tmp_path, 2)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]
    log.step(step_values(3))
    log.evaluation(3, "step 3", {"sums": {"avg@1": 0.5}})
    log.close()
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]
    names = [json.loads(line)["name"] for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert names == ["before", "step 3"]
    assert not list(tmp_path.rglob("*.tmp"))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3]
    assert [event.step for event in board.Scalars("evaluation/sums/avg@1")] == [0, 3]


def test_a_run_that_starts_again_from_step_0_logs_its_first_evaluation_once(tmp_path):
    for _ in range(2):
        opened(tmp_path, 0).evaluation(0, "before", {"sums": {"avg@1": 0.5}})
    assert len((tmp_path / "evaluations.jsonl").read_text().splitlines()) == 1
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(board.Scalars("evaluation/sums/avg@1")) == 1
