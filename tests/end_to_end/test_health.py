"""The health watch in complete runs: it does not change training, detects a collapse, and resumes exactly."""

import json
import signal

import pytest
import torch
import transformers

from tests.helpers.commands import run, run_ranks
from tests.helpers.killable import Command, DieBefore, finish
from tests.helpers.runs import (
    assert_same_export,
    complete_steps,
    in_folder,
    metrics,
    prompt_run,
    read_lines,
    replay_run,
)

WATCH = ("health.every=2", "health.max_new_tokens=5")
# At this learning rate the objective falls because the hidden states become equal for all tokens: a collapse.
COLLAPSE = (
    "optimizer.lr=0.03",
    "optimizer.schedule=constant",
    "loss.representation.layers=[1]",
    "loss.representation.normalize=l2",
)


def without_health(rows):
    return [{key: value for key, value in row.items() if not key.startswith("health/")} for row in rows]


def watched_files(run_dir):
    return {path.name: path.read_text() for path in (run_dir / "health").iterdir()}


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Run five steps with the watch and evaluations; return the arguments, the folder and the output."""
    folder = tmp_path_factory.mktemp("watched")
    arguments = prompt_run(folder, 5, *WATCH, "evaluation.every=2", num_hidden_layers=2)
    return arguments, folder / "run", finish(arguments, folder / "log")


def test_the_watch_does_not_change_training(watched, tmp_path):
    arguments, run_dir, _ = watched
    finish([*in_folder(arguments, tmp_path / "run"), "health.every=0"], tmp_path / "log")
    assert without_health(metrics(run_dir)) == metrics(tmp_path / "run")
    assert_same_export(run_dir, tmp_path / "run")
    assert not (tmp_path / "run" / "health").exists()
    for name in ("evaluations.jsonl", "rollouts/step_0000005.jsonl"):
        assert (run_dir / name).read_text() == (tmp_path / "run" / name).read_text()


def test_checks_happen_at_health_every_and_the_last_step(watched):
    _, run_dir, log = watched
    rows = metrics(run_dir)
    measured = {row["step"]: row for row in rows if "health/perplexity" in row}
    assert list(measured) == [2, 4, 5]
    names = {f"health/{name}" for name in ("perplexity", "entropy", "reverse_kl", "objective", "warnings")}
    assert all(names <= row.keys() for row in measured.values())
    losses = [row["loss"] for row in rows]
    expected = [sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]]
    assert [row["health/objective"] for row in measured.values()] == expected
    checks = read_lines(run_dir / "health" / "checks.jsonl")
    assert [check["step"] for check in checks] == [0, 2, 4, 5]
    assert checks[0]["answers"] == checks[0]["graded"] == 5 and checks[0]["objective"] is None
    assert "health: 5 answers of the start model, 0 of 5 right: perplexity" in log
    assert "<h2>Health</h2>" in (run_dir / "report.html").read_text()


def perplexity(model, rows):
    """Return the perplexity of stored answers under a model of transformers."""
    losses = []
    for row in rows:
        ids = torch.tensor([[*row["prompt_ids"], *row["response_ids"]]])
        with torch.no_grad():
            log_p = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].double().log_softmax(-1)
        losses += (-log_p[range(len(log_p)), row["response_ids"]]).tolist()
    return torch.tensor(losses).double().mean().exp().item()


def test_each_check_measures_the_start_models_greedy_answers_under_the_current_student(watched):
    arguments, run_dir, _ = watched
    opened = transformers.AutoModelForCausalLM.from_pretrained
    student = next(argument.partition("=")[2] for argument in arguments if argument.startswith("student.path="))
    start, end = (opened(path, dtype=torch.float64) for path in (student, run_dir / "hf"))
    answers = read_lines(run_dir / "health" / "answers.jsonl")
    for row in answers:
        ids = torch.tensor([row["prompt_ids"]])
        said = start.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        assert row["response_ids"] == said
    checks = read_lines(run_dir / "health" / "checks.jsonl")
    assert checks[0]["perplexity"] == pytest.approx(perplexity(start, answers), rel=1e-5)
    assert checks[-1]["perplexity"] == pytest.approx(perplexity(end, answers), rel=1e-5)


def collapse_run(folder, steps, *settings):
    return prompt_run(folder, steps, *WATCH, *COLLAPSE, *settings, num_hidden_layers=2)


def test_a_collapse_gives_one_warning(tmp_path):
    log = finish(collapse_run(tmp_path, 8), tmp_path / "log")
    warnings = read_lines(tmp_path / "run" / "health" / "warnings.jsonl")
    (found,) = [warning for warning in warnings if warning["kind"] == "perplexity"]
    assert found["message"].startswith(f"step {found['step']}: the objective fell from ")
    assert "(health.perplexity_ratio=1.25): the student may be collapsing; lower optimizer.lr or " in found["message"]
    assert log.count(f"warning: {found['message']}\n") == 1
    counts = [row["health/warnings"] for row in metrics(tmp_path / "run") if "health/warnings" in row]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == len(warnings)
    assert "the student may be collapsing" in (tmp_path / "run" / "report.html").read_text()


def test_only_right_answers_are_measured_and_a_falling_accuracy_stops_the_run(tmp_path):
    settings = (
        "evaluation.every=4",
        "checkpoint.every=30",
        "evaluation.temperature=0",
        "evaluation.samples=1",
        "health.max_new_tokens=6",
    )
    arguments = collapse_run(tmp_path, 9, *settings, "health.perplexity_ratio=1e9", "health.stop=true")
    finish([*in_folder(arguments, tmp_path / "asked"), "train.steps=0"], tmp_path / "log")
    # The answers of the start model become the ground truth, except for one prompt.
    rows = read_lines(tmp_path / "prompts.jsonl")
    for sample in read_lines(tmp_path / "asked" / "evaluations" / "step_0000000.jsonl")[:4]:
        rows[sample["prompt_index"]]["reward_model"]["ground_truth"] = sample["response"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = run(tmp_path, "train", *arguments)
    assert outcome.code == 3, outcome.stderr
    assert "health: 5 answers of the start model, 4 of 5 right; the 4 right ones are read: " in outcome.stdout
    assert len(read_lines(tmp_path / "run" / "health" / "answers.jsonl")) == 4
    (warning,) = read_lines(tmp_path / "run" / "health" / "warnings.jsonl")
    # The evaluation of a step comes after its check.
    assert (warning["step"], warning["kind"]) == (4, "accuracy")
    assert (
        "while the accuracy on sums/0 fell from " in warning["message"]
        and ", on all fell from 0.8 to 0" in warning["message"]
    )
    assert complete_steps(tmp_path / "run") == [4]


def test_a_stopped_run_exports_and_reports_and_stays_stopped(tmp_path):
    arguments = collapse_run(tmp_path, 40, "health.stop=true", "checkpoint.every=30", "evaluation.every=30")
    outcomes = run_ranks(2, tmp_path, "train", *arguments)
    assert [outcome.code for outcome in outcomes] == [3, 3], outcomes[0].stderr
    run_dir, printed = tmp_path / "run", outcomes[0].stdout.splitlines()
    first = read_lines(run_dir / "health" / "warnings.jsonl")[0]
    assert printed[-1] == f"stopped by health.stop=true: {first['message']}"
    assert printed[-2] == f"report: {run_dir / 'report.html'}"
    step = first["step"]
    assert metrics(run_dir)[-1]["step"] == step < 40
    assert complete_steps(run_dir) == [step]
    assert (run_dir / "hf" / "model.safetensors").exists()
    assert read_lines(run_dir / "evaluations.jsonl")[-1]["step"] == step
    again = run(tmp_path, "train", *arguments)
    assert again.code == 3 and "continuing from" in again.stdout and metrics(run_dir)[-1]["step"] == step
    onward = run(tmp_path, "train", *arguments, "health.stop=false", f"train.steps={step + 1}")
    assert onward.code == 0 and metrics(run_dir)[-1]["step"] == step + 1


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((1,), id="one rank"),
        pytest.param(
            (2, "parallel.pipeline=2", "loss.representation.layers=all"), id="two stages", marks=pytest.mark.nightly
        ),
    ],
)
def test_a_killed_run_restores_the_history_of_the_watch(settings, tmp_path):
    world, *layout = settings
    # Checkpoints lie between the checks and after a warning: the history must be restored.
    arguments = collapse_run(tmp_path, 9, "checkpoint.every=3", "evaluation.every=3", *layout)
    expected, actual = tmp_path / "expected", tmp_path / "actual"
    finish(in_folder(arguments, expected), tmp_path / "log", world_size=world)
    for number, operation in enumerate((r"health/answers\.jsonl\.", r"step_0000005\.jsonl", r"step_0000009\.partial$")):
        die = DieBefore("os.rename", operation)
        command = Command(in_folder(arguments, actual), tmp_path / f"{number}.log", die=die, world_size=world)
        assert command.wait() == -signal.SIGKILL, command.log.read_text()
    finish(in_folder(arguments, actual), tmp_path / "last.log", world_size=world)
    assert metrics(actual) == metrics(expected)
    assert watched_files(actual) == watched_files(expected)
    assert {"answers.jsonl", "checks.jsonl", "warnings.jsonl"} == watched_files(expected).keys()


def test_a_watched_run_cannot_resume_without_its_answers(tmp_path):
    arguments = replay_run(tmp_path, 2, *WATCH, num_hidden_layers=1)
    assert run(tmp_path, "train", *arguments).code == 0
    answers = tmp_path / "run" / "health" / "answers.jsonl"
    first = json.loads(answers.read_text().splitlines()[0])
    assert first.keys() == {"prompt_ids", "response_ids", "response_mask", "data_source"}
    answers.unlink()
    refused = run(tmp_path, "train", *arguments)
    assert refused.code == 2
    assert refused.stderr == (
        f"error: health.every=2: {answers} is missing, which the start model left at step 0; put it back, set "
        "health.every=0, or begin anew in another train.run_dir\n"
    )


def test_help_lists_the_exit_codes(tmp_path):
    assert "3 if health.stop=true ended the training" in " ".join(run(tmp_path, "train", "--help").stdout.split())


def test_a_recovering_student_gives_no_warning(tmp_path):
    """The student unlearns its own answers while its distributions approach the teacher's."""
    settings = ("loss.representation.weight=0", "loss.output.objective=full_kl", "optimizer.schedule=constant")
    finish(prompt_run(tmp_path, 4, *WATCH, *settings, "optimizer.lr=0.01", num_hidden_layers=2), tmp_path / "log")
    start, *_, end = read_lines(tmp_path / "run" / "health" / "checks.jsonl")
    assert end["reverse_kl"] < 0.5 * start["reverse_kl"]
    assert end["perplexity"] > 1.25 * start["perplexity"]
    assert not (tmp_path / "run" / "health" / "warnings.jsonl").exists()
