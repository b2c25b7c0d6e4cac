"""A run that is killed at any moment and started again ends exactly like an undisturbed run."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.killable import Command, DieAfterStep, DieBefore, finish
from tests.helpers.runs import (
    SOURCES,
    assert_same_export,
    complete_steps,
    in_folder,
    last_step,
    metrics,
    prompt_run,
    replay_run,
)

EVERY = 2
STEPS = 16
SEED = 20


def assert_same_run(actual, expected):
    """Compare every metric, the exported weights bit by bit, the curves and the names of all files."""
    assert [row["step"] for row in metrics(actual)] == list(range(1, len(metrics(expected)) + 1))
    assert metrics(actual) == metrics(expected)
    assert_same_export(actual, expected)
    assert curve(actual) == curve(expected)
    assert files(actual) == files(expected)


def curve(run_dir):
    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return [(event.step, event.value) for event in board.Scalars("loss")]


def files(run_dir):
    paths = (path.relative_to(run_dir) for path in run_dir.rglob("*"))
    return sorted(str(path) for path in paths if path.parts[0] not in ("tensorboard", "wandb", "replaced"))


def wandb_losses(folder):
    """Return the id of the run in an offline folder of Weights & Biases, and the loss of each step that it has."""
    from wandb.proto.wandb_internal_pb2 import Record

    run_id, losses = "", []
    for data in leveldb_records(next(folder.glob("run-*.wandb")).read_bytes()):
        record = Record.FromString(data)
        run_id = record.run.run_id or run_id
        items = {item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item}
        losses += [(record.history.step.num, json.loads(items["loss"]))] if "loss" in items else []
    return run_id, losses


def leveldb_records(data, block=32768):
    """Yield the records of a file in LevelDB's log format, as wandb writes it: parts with a header of 7 bytes."""
    position, record = 7, b""  # the file has a header of its own
    while position + 7 <= len(data):
        if block - position % block < 7:  # too short for a header
            position += block - position % block
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # complete, or the last part
            yield record
            record = b""


class Killer:
    """Starts `train` again and again, kills it, and checks how many steps each kill loses."""

    def __init__(self, arguments, folder, run_dir, pace, draw):
        self.arguments, self.folder, self.run_dir, self.pace, self.draw = arguments, folder, run_dir, pace, draw
        self.attempts = 0
        self.within_a_write = 0

    def log(self):
        self.attempts += 1
        return self.folder / f"attempt_{self.attempts}.log"

    def kill_on_the_clock(self, step):
        command = Command(self.arguments, self.log())
        self._wait(command, lambda: last_step(self.run_dir) >= step)
        time.sleep(self.draw.uniform(0, 2 * self.pace))
        assert command.kill() == -signal.SIGKILL, command.log.read_text()

    def kill_a_real_command(self, step):
        with self.log().open("w") as log:
            command = [sys.executable, "-m", "megatron_oprd.train", *self.arguments]
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            while last_step(self.run_dir) < step and process.poll() is None:
                time.sleep(0.001)
            time.sleep(self.draw.uniform(0, 2 * self.pace))
            process.kill()
            assert process.wait() == -signal.SIGKILL

    def kill_while_writing(self, step):
        command = Command(self.arguments, self.log())
        checkpoints = self.run_dir / "checkpoints"
        self._wait(command, lambda: any(path.name >= f"step_{step:07d}" for path in checkpoints.glob("*.partial")))
        time.sleep(self.draw.uniform(0, self.pace / 2))
        assert command.kill() == -signal.SIGKILL, command.log.read_text()

    def die_at_an_operation(self, step):
        die = DieAfterStep(self.run_dir, step, self.draw.randrange(60))
        command = Command(self.arguments, self.log(), die=die)
        assert command.wait() == -signal.SIGKILL, command.log.read_text()

    def check(self, before):
        """Check that at most the steps since the last checkpoint are lost; return the step of that checkpoint."""
        complete = complete_steps(self.run_dir)
        kept = complete[-1] if complete else 0
        assert kept >= before
        assert last_step(self.run_dir) - kept <= EVERY
        self.within_a_write += any((self.run_dir / "checkpoints").glob("*.partial"))
        return kept

    def _wait(self, command, reached):
        while not reached():
            assert command.is_running, command.log.read_text()
            time.sleep(0.0005)


def first_step(log):
    return int(re.search(r"^ *(\d+)/\d+  loss", log, re.MULTILINE)[1])


def kill_and_compare(arguments, tmp_path, moments, seed, way_names):
    """Run once undisturbed and once with a kill at each of the ascending `moments` (steps), and compare both runs."""
    expected, actual = tmp_path / "expected", tmp_path / "actual"
    finish(in_folder(arguments, expected), tmp_path / "expected.log")
    # Without the time to start the process: otherwise a short run could end before the kill.
    seconds = [json.loads(line)["time/step"] for line in (expected / "metrics.jsonl").read_text().splitlines()]
    pace = sum(seconds) / len(seconds)
    killer = Killer(in_folder(arguments, actual), tmp_path, actual, pace, random.Random(seed))
    kept = 0
    for step, name in zip(moments, way_names, strict=True):
        getattr(killer, name)(step)
        kept = killer.check(kept)
    log = finish(killer.arguments, killer.log())
    assert first_step(log) == kept + 1
    assert_same_run(actual, expected)
    return killer


@pytest.mark.nightly
def test_ten_kills_do_not_change_the_result(tmp_path):
    # The layers are wide, so that writing a checkpoint takes long enough to be interrupted.
    arguments = replay_run(tmp_path, STEPS, hidden_size=192, intermediate_size=768, num_hidden_layers=2)
    draw = random.Random(SEED)
    ways = (
        ["kill_on_the_clock"] * 2 + ["kill_while_writing"] * 3 + ["die_at_an_operation"] * 4 + ["kill_a_real_command"]
    )
    draw.shuffle(ways)
    killer = kill_and_compare(arguments, tmp_path, sorted(draw.choices(range(STEPS - 3), k=10)), SEED, ways)
    assert killer.within_a_write


def test_generated_rollouts_and_evaluations_resume_exactly(tmp_path):
    horizon = "rollout.horizon={start: 2, grow: 1, every: 3}"
    settings = ("evaluation.every=3", "evaluation.teacher_answers=true", "evaluation.best=reverse_kl", horizon)
    arguments = prompt_run(tmp_path, 8, *settings, num_hidden_layers=2)
    kill_and_compare(
        arguments, tmp_path, [0, 3, 5], SEED, ["die_at_an_operation", "kill_while_writing", "kill_on_the_clock"]
    )
    rows = [json.loads(line) for line in (tmp_path / "actual" / "evaluations.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["before", "step 3", "step 6", "after"]
    horizons = [row["rollout/horizon"] for row in metrics(tmp_path / "actual")]
    assert horizons == [2, 2, 2, 3, 3, 3, 4, 4]
    for name in ["evaluations.jsonl", "best.json", *(f"evaluations/step_{step:07d}.jsonl" for step in (0, 3, 6, 8))]:
        assert (tmp_path / "actual" / name).read_text() == (tmp_path / "expected" / name).read_text()


def test_rollouts_generated_ahead_resume_exactly(tmp_path):
    arguments = prompt_run(tmp_path, 6, "rollout.ahead=1", num_hidden_layers=2)
    kill_and_compare(arguments, tmp_path, [2, 4], SEED, ["die_at_an_operation", "kill_while_writing"])
    assert [row["rollout/staleness"] for row in metrics(tmp_path / "actual")] == [0, 1, 1, 1, 1, 1]


@pytest.mark.nightly
def test_twenty_kills_do_not_change_rollouts_generated_ahead(tmp_path):
    arguments = prompt_run(tmp_path, 40, "rollout.ahead=1", num_hidden_layers=2)
    draw = random.Random(SEED)
    ways = ["kill_on_the_clock"] * 6 + ["kill_while_writing"] * 6 + ["die_at_an_operation"] * 8
    draw.shuffle(ways)
    kill_and_compare(arguments, tmp_path, sorted(draw.choices(range(37), k=20)), SEED, ways)


@pytest.mark.nightly
def test_an_output_objective_on_generated_rollouts_resumes_exactly(tmp_path):
    settings = ("objective=sampled", "metrics_every=2", "teacher_temperature=1.2")
    arguments = prompt_run(
        tmp_path, 6, *(f"loss.output.{one}" for one in settings), "rollout.temperature=0.8", num_hidden_layers=2
    )
    kill_and_compare(arguments, tmp_path, [3], SEED, ["die_at_an_operation"])
    measured = [row["step"] for row in metrics(tmp_path / "actual") if "output/reverse_kl" in row]
    assert measured == [1, 2, 4, 6]


# (operation before which the process dies, steps of the complete checkpoints left, situation)
CRASHES = [
    (DieBefore("os.remove", r"^common\.pt$"), [4], "the checkpoint of step 2 half-removed"),
    (DieBefore("os.rename", r"/metrics\.jsonl\."), [4], "the log not yet shortened to the checkpoint"),
    (DieBefore("open", r"/step_0000006/complete\."), [4], "a checkpoint renamed but not marked"),
    (DieBefore("os.rename", r"/step_0000006\.partial$"), [4], "a checkpoint complete but not renamed"),
    (DieBefore("os.rename", r"/hf\.new\.partial$"), [6], "the export complete but not renamed"),
    (DieBefore("os.rename", r"/hf\.new$"), [6], "the old export removed, the new one not renamed"),
    (DieBefore("os.rename", r"/report\.html\."), [6], "the export written, the report not"),
]


def test_no_crash_point_does_harm(tmp_path):
    arguments = replay_run(tmp_path, 6, "checkpoint.keep=1", num_hidden_layers=1)
    expected, actual = tmp_path / "expected", tmp_path / "actual"
    finish(in_folder(arguments, expected), tmp_path / "log")
    arguments = in_folder(arguments, actual)
    for number, (die, complete, what) in enumerate(CRASHES):
        command = Command(arguments, tmp_path / f"{number}.log", die=die)
        assert command.wait() == -signal.SIGKILL, (what, command.log.read_text())
        assert complete_steps(actual) == complete, what
        if number == 0:
            assert (actual / "checkpoints" / "step_0000002").exists()
            with (actual / "metrics.jsonl").open("a") as file:
                file.write('{"step": 5, "lo')
    finish(arguments, tmp_path / "last.log")
    assert_same_run(actual, expected)


# The same for asynchronous checkpoints. Beginning a checkpoint first completes the one before.
CRASHES_OF_THE_THREAD = [
    (
        DieBefore("open", r"/step_0000004\.partial/optimizer/__0_0\.distcp$"),
        [2],
        "the model written, its optimizer not",
    ),
    (DieBefore("os.rename", r"/step_0000006\.partial/model/\.metadata\.tmp$"), [4], "the index not written yet"),
    (DieBefore("open", r"/step_0000006/complete\."), [4], "a checkpoint renamed but not marked"),
]


def test_no_crash_point_of_an_asynchronous_checkpoint_does_harm(tmp_path):
    arguments = replay_run(tmp_path, 6, "checkpoint.keep=1", num_hidden_layers=1)
    expected, actual = tmp_path / "expected", tmp_path / "actual"
    finish(in_folder(arguments, expected), tmp_path / "log")
    arguments = [*in_folder(arguments, actual), "checkpoint.asynchronous=true"]
    for number, (die, complete, what) in enumerate(CRASHES_OF_THE_THREAD):
        command = Command(arguments, tmp_path / f"{number}.log", die=die)
        assert command.wait() == -signal.SIGKILL, (what, command.log.read_text())
        assert complete_steps(actual) == complete, what
    finish(arguments, tmp_path / "last.log")
    assert_same_run(actual, expected)


FULL_KL = ("loss.output.objective=full_kl", "loss.output.metrics_every=3")
WITH_WANDB = "tensor 2"
SETTINGS = {
    WITH_WANDB: (2, {}, "parallel.tensor=2"),
    "pipeline 2, tied embeddings": (2, {"tie_word_embeddings": True}, "parallel.pipeline=2"),
    "data 2, bf16, distributed optimizer": (2, {}, "precision.dtype=bf16", "teacher.ema=0.9"),
    "data 2, optimizer not distributed": (2, {}, "parallel.distributed_optimizer=false"),
    "bf16, optimizer not sharded": (1, {}, "precision.dtype=bf16", "parallel.distributed_optimizer=false"),
    "sgd": (1, {}, "optimizer.name=sgd", "optimizer.lr=0.1"),
    "part of the student frozen": (1, {}, "loss.representation.layers=[1]", "student.freeze=[embedding]"),
    "hidden states and distributions": (1, {}, *FULL_KL),
    "distributions, LM head sharded": (2, {}, *FULL_KL, "loss.representation.weight=0", "parallel.tensor=2"),
    "a stage with nothing to train": (2, {}, "parallel.pipeline=2", "loss.representation.layers=[1]"),
    "a stage with nothing to train, all overlaps, data 2": (
        4,
        {"tie_word_embeddings": True},
        "parallel.pipeline=2",
        "loss.representation.layers=[1]",
        "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true",
        "checkpoint.asynchronous=true",
        "teacher.ema=0.5",
    ),
    "two teachers, one at a time": (1, {"sources": SOURCES}, *FULL_KL, "teachers_in_memory=one"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_optimizer_and_layout_resumes_exactly(name, tmp_path):
    world_size, options, *settings = SETTINGS[name]
    settings += ["logging.wandb={project: p, mode: offline}"] * (name == WITH_WANDB)
    arguments = replay_run(tmp_path, 4, *settings, num_hidden_layers=2, **options)
    expected, actual = tmp_path / "expected", tmp_path / "actual"
    finish(in_folder(arguments, expected), tmp_path / "log", world_size=world_size)
    shutil.copytree(expected, actual)
    shutil.rmtree(actual / "checkpoints" / "step_0000004")
    shutil.rmtree(actual / "hf")
    log = finish(in_folder(arguments, actual), tmp_path / "resumed.log", world_size=world_size)
    assert first_step(log) == 3
    assert "differs from rank 0" not in log  # a warning of mcore about values that must be equal on all ranks
    assert_same_run(actual, expected)
    if name == WITH_WANDB:  # two ranks log each step once, and the resumed process continues the run
        folders = [*(expected / "wandb").glob("offline-run-*"), *(actual / "wandb").glob("offline-run-*")]
        before, _, after = (wandb_losses(folder) for folder in sorted(folders, key=lambda path: path.name))
        rows = [(row["step"], row["loss"]) for row in metrics(expected)]
        assert before == (after[0], rows) and after[1] == rows[2:]
