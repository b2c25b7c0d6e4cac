"""The rule of the health watch, its history, and the choice of the answers that it measures."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from megatron_oprd.config import parse_config
from megatron_oprd.data.prompts import PromptSet, PromptState, take
from megatron_oprd.evaluation.measure import Measurement, has_teacher_distribution
from megatron_oprd.health import watch as watch_module
from megatron_oprd.health.answers import AnswerCounts, choose_prompts, keep_answers, load_answers
from megatron_oprd.health.rule import Check, HealthHistory, HealthWarning, new_warnings
from megatron_oprd.health.watch import HealthWatch, read_history
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.models.layer_plan import make_plan
from megatron_oprd.report.write import write_report
from megatron_oprd.rollout.replay import load_replay
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.testing.replayed_run import make_config, make_inputs
from megatron_oprd.training.teacher import Teacher
from megatron_oprd.types import Prompt, Rollout, UserError
from tests.helpers.tokenizer import byte_tokenizer

START = Check(0, perplexity=1.4, entropy=0.3, reverse_kl=0.4)
FIRST = Check(10, perplexity=1.4, entropy=0.3, reverse_kl=0.4, objective=0.21, length_mean=100.0)
LAST = dataclasses.replace(FIRST, step=20, objective=0.05)


BELOW = {"representation": {"layers": [1, 2]}}


def config(**sections):
    base = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"prompts": ["p"]}, "train": {"run_dir": "r"}}
    return parse_config({**base, "health": {"every": 10}, **sections})


def warnings_of(last=LAST, accuracies=(), warnings=(), start=START, first=FIRST, **sections):
    history = HealthHistory((start, first, last), (), tuple(accuracies), tuple(warnings))
    return new_warnings(history, last.step, config(**sections))


def kinds(**values):
    accuracies = values.pop("accuracies", ())
    return [warning.kind for warning in warnings_of(dataclasses.replace(LAST, **values), accuracies)]


def test_with_a_schedule_the_objective_does_not_count_because_it_is_another_one_at_each_step():
    fade = {"representation": [[0, 1.0], [10, 0.0]], "output": [[0, 0.0], [10, 1.0]]}
    loss = {"output": {"objective": "full_kl"}, "schedule": fade}
    rising = dataclasses.replace(LAST, objective=0.5, perplexity=2.5)
    assert warnings_of(rising) == []
    (warning,) = warnings_of(rising, loss=loss)
    assert warning.kind == "perplexity" and warning.message.startswith("step 20: perplexity of the start model's own")
    assert warnings_of(dataclasses.replace(LAST, objective=0.5), loss=loss) == []


# Each limit is tested from both sides.
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, []),
        ({"perplexity": 1.74}, []),
        ({"perplexity": 1.76}, ["perplexity"]),
        ({"perplexity": 1.0}, []),
        ({"reverse_kl": 0.59}, []),
        ({"reverse_kl": 0.61}, ["reverse_kl"]),
        ({"reverse_kl": 0.01}, []),
        ({"reverse_kl": None}, []),
        ({"entropy": 0.11}, []),
        ({"entropy": 0.09}, ["entropy"]),
        ({"entropy": 0.89}, []),
        ({"entropy": 0.91}, ["entropy"]),
        ({"length_mean": 51.0}, []),
        ({"length_mean": 49.0}, ["length"]),
        ({"length_mean": 199.0}, []),
        ({"length_mean": 201.0}, ["length"]),
        ({"length_mean": None}, []),
        ({"accuracies": [{"a": 0.4}, {"a": 0.31}]}, []),
        ({"accuracies": [{"a": 0.4, "b": 0.5}, {"a": 0.29, "b": 0.5}]}, ["accuracy"]),
        ({"accuracies": [{"a": 0.4}, {"a": 0.1}, {"a": 0.4}]}, []),
        ({"accuracies": [{"a": 0.04}, {"a": 0.021}]}, []),
        ({"accuracies": [{"a": 0.4}, {}]}, []),
        (
            {
                "perplexity": 9.0,
                "reverse_kl": 2.0,
                "entropy": 2.0,
                "length_mean": 1.0,
                "accuracies": [{"a": 1}, {"a": 0}],
            },
            ["accuracy", "perplexity", "reverse_kl", "entropy", "length"],
        ),
    ],
)
def test_each_sign_warns_beyond_its_limit(values, expected):
    assert kinds(**values) == expected


EVERYTHING = {"perplexity": 9.0, "entropy": 2.0, "length_mean": 1.0, "accuracies": [{"a": 1}, {"a": 0}]}


@pytest.mark.parametrize(
    ("reverse_kl", "expected"),
    [
        (0.2, ["accuracy"]),
        (0.359, ["accuracy"]),
        (0.361, ["accuracy", "perplexity", "entropy", "length"]),
        (None, ["accuracy", "perplexity", "entropy", "length"]),
    ],
)
def test_only_accuracy_warns_while_the_reverse_kl_falls(reverse_kl, expected):
    assert kinds(reverse_kl=reverse_kl, **EVERYTHING) == expected


@pytest.mark.parametrize(
    ("objective", "expected"), [(0.2099, ["perplexity"]), (0.21, []), (0.3, []), (float("nan"), [])]
)
def test_no_warning_unless_the_objective_improved(objective, expected):
    assert kinds(perplexity=9.0, objective=objective) == expected


def test_no_warning_after_the_first_interval():
    bad = dataclasses.replace(FIRST, perplexity=9.0)
    for checks in ((), (START,), (START, bad)):
        assert new_warnings(HealthHistory(checks), 10, config()) == []


def test_small_values_may_change_by_any_factor():
    start = dataclasses.replace(START, entropy=0.02, reverse_kl=0.001)
    assert warnings_of(dataclasses.replace(LAST, entropy=0.001, reverse_kl=0.01), start=start) == []
    assert [w.kind for w in warnings_of(dataclasses.replace(LAST, entropy=0.071), start=start)] == [
        "reverse_kl",
        "entropy",
    ]


def test_a_warning_names_what_improved_what_fell_and_what_to_do():
    (warning,) = warnings_of(dataclasses.replace(LAST, step=40, perplexity=6.2))
    assert warning == HealthWarning(
        40,
        "perplexity",
        "step 40: the objective fell from 0.21 to 0.05 while perplexity of the start model's own answers rose from 1.4 "
        "to 6.2 (health.perplexity_ratio=1.25): the student may be collapsing; lower optimizer.lr or "
        "loss.representation.weight, or add loss.output.objective=full_kl",
    )
    loss = {"output": {"objective": "full_kl"}, "representation": {"weight": 0}}
    (warning,) = warnings_of(dataclasses.replace(LAST, perplexity=6.2), loss=loss)
    assert warning.message.endswith("may be collapsing; lower optimizer.lr")


def test_all_lost_accuracies_are_in_one_warning():
    (warning,) = warnings_of(accuracies=[{"a": 0.4, "b": 0.5, "all": 0.45}, {"a": 0.1, "b": 0.5, "all": 0.3}])
    assert "while the accuracy on a fell from 0.4 to 0.1, on all fell from 0.45 to 0.3: the student" in warning.message


def test_each_kind_of_warning_is_given_once():
    bad = dataclasses.replace(LAST, perplexity=9.0, entropy=2.0)
    first = warnings_of(bad)
    assert [warning.kind for warning in first] == ["perplexity", "entropy"]
    assert [warning.kind for warning in warnings_of(bad, warnings=first[:1])] == ["entropy"]
    assert warnings_of(bad, warnings=first) == []


def test_a_check_contains_the_means_since_the_previous_check():
    history = HealthHistory().with_check(START, with_lengths=True)
    for loss in (1.0, 2.0, 6.0):
        history = history.with_step({"loss": loss, "rollout/length_mean": 10 * loss})
    history = history.with_check(Check(3, 1.0, 1.0), with_lengths=True).with_step(
        {"loss": 7.0, "rollout/length_mean": 0.0}
    )
    history = history.with_check(Check(4, 1.0, 1.0), with_lengths=False)
    assert [(check.objective, check.length_mean) for check in history.checks] == [
        (None, None),
        (3.0, 30.0),
        (7.0, None),
    ]
    assert history.checks[2].metrics() == {"health/perplexity": 1.0, "health/entropy": 1.0, "health/objective": 7.0}


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [
        ({}, 10.0),
        ({"horizon": "auto"}, 10.0),
        ({"horizon": {"start": 8, "grow": 8, "every": 1}}, None),  # lengths grow by design
        ({"engine": "replay", "path": "p"}, None),
    ],
)
def test_lengths_count_if_only_the_student_changes_them(rollout, expected, monkeypatch):
    measured = Measurement(perplexity=1.0, entropy=1.0, reverse_kl=None)
    monkeypatch.setattr(watch_module, "measure_answers", lambda models, answers: measured)
    monkeypatch.setattr(watch_module, "on_rank_zero", lambda function: function())
    loss = {"representation": {"positions": "first_k"}}
    log = SimpleNamespace(check=lambda *values: None)
    watch = HealthWatch(config(rollout=rollout, loss=loss, health={"every": 1}), None, log, ())
    watch.history = HealthHistory((START,))
    watch.after_step(1, {"loss": 1.0, "rollout/length_mean": 10.0})
    assert watch.history.checks[-1].length_mean == expected


def test_the_history_keeps_the_mean_accuracy_of_an_evaluation():
    data = {"a": {"avg@4": 0.5, "best@4": 1.0, "mean_length": 9}, "b": {"mean_length": 3.0}}
    assert HealthHistory().with_evaluation(data).accuracies == ({"a": 0.5},)


def test_only_a_single_teacher_built_up_to_its_final_norm_has_a_distribution():
    spec = SimpleNamespace(hidden_size=8, num_layers=4)
    complete, below = make_plan(config().loss, spec, spec), make_plan(config(loss=BELOW).loss, spec, spec)
    bare = make_plan(config(loss={"representation": {"final_norm": False}}).loss, spec, spec)
    teachers = [Teacher(None, None, plan, 8) for plan in (complete, below, bare)]
    assert [has_teacher_distribution([teacher]) for teacher in teachers] == [True, False, False]
    assert not has_teacher_distribution([teachers[0], teachers[0]])


def test_health_stop_needs_health_every():
    with pytest.raises(UserError, match=r"health\.stop=true needs health.every above 0"):
        config(health={"stop": True})
    assert config(health={"stop": True, "every": 5}).health.stop
    assert config(loss={"representation": {"bridge": "b"}}, health={"stop": True}).health.every == 10


# The answers


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_hidden_layers": 1, "vocab_size": 259}
    return save(random_hf_model("Qwen3", 0, **sizes), folder / "s"), save(
        random_hf_model("Qwen3", 1, **sizes), folder / "t"
    )


def inputs_of(paths, tmp_path, *settings, rollouts=(), **parts):
    settings = ("health.every=1", f"train.run_dir={tmp_path}", *settings)
    return dataclasses.replace(make_inputs(make_config(*paths, *settings), rollouts), **parts)


def prompt_set(count, prefix=0):
    return PromptSet([Prompt(n, (prefix, n)) for n in range(count)], count, 0, 0)


def test_the_last_prompts_of_training_are_chosen(paths, tmp_path):
    prompts = prompt_set(50)
    inputs = inputs_of(paths, tmp_path, "health.prompts=20", "train.seed=3", prompts=prompts)
    chosen, limits = choose_prompts(inputs)
    early, _ = take(prompts.prompts, PromptState(), 30, seed=3, shuffle=True)
    assert len(chosen) == 20 and not {p.index for p in chosen} & {p.index for p in early}
    assert limits == [14] * 20  # a micro-batch holds 16 tokens
    of_evaluation, _ = choose_prompts(dataclasses.replace(inputs, evaluation_prompts=prompt_set(30, prefix=1)))
    assert len({p.index for p in of_evaluation}) == 20 and all(p.prompt_ids[0] == 1 for p in of_evaluation)
    everything, limits = choose_prompts(inputs_of(paths, tmp_path, "health.max_new_tokens=3", prompts=prompts))
    assert len(everything) == 50 and set(limits) == {3}


def test_the_last_distinct_prompts_of_a_replay_file_with_room_for_an_answer_are_chosen(paths, tmp_path):
    rollouts = [Rollout((1, n // 2), (2,), (1,), "replay", teacher_prompt_ids=(9,) * 5) for n in range(8)]
    rollouts.append(Rollout((1,) * 16, (), (), "replay"))
    chosen, limits = choose_prompts(inputs_of(paths, tmp_path, "health.prompts=3", rollouts=rollouts))
    assert [(p.prompt_ids, p.teacher_prompt_ids) for p in chosen] == [((1, n), (9,) * 5) for n in (1, 2, 3)]
    assert limits == [11] * 3
    with pytest.raises(UserError, match=r"health.every=1: no prompt leaves room .* health.every=0"):
        choose_prompts(inputs_of(paths, tmp_path, rollouts=rollouts[-1:]))


@pytest.mark.parametrize(("total", "right", "kept"), [(40, 8, 8), (40, 7, 40), (12, 3, 3), (12, 2, 12), (4, 0, 4)])
def test_only_right_answers_are_kept_if_there_are_enough(total, right, kept, paths, tmp_path):
    tokenizer = byte_tokenizer()
    prompts = [Prompt(n, (5, n), ground_truth="yes" if n < right else "no", answer_style="exact") for n in range(total)]
    ids = tuple(tokenizer("yes")["input_ids"])
    answers = [Rollout(p.prompt_ids, ids, (1,) * len(ids), "eos", prompt_index=p.index) for p in prompts]
    found, counts = keep_answers(tmp_path, tokenizer, prompts, answers)
    assert [answer.prompt_index for answer in found] == list(range(kept))
    assert counts == AnswerCounts(answers=total, graded=total, right=right, filtered=kept < total)
    stored = load_replay(tmp_path / "health" / "answers.jsonl", read_model_spec(paths[0]).vocab_size)
    assert [(r.prompt_ids, r.response_ids) for r in stored] == [(r.prompt_ids, r.response_ids) for r in found]
    line = json.loads((tmp_path / "health" / "answers.jsonl").read_text().splitlines()[0])
    assert line["ground_truth"] == prompts[0].ground_truth


def test_answers_without_ground_truth_are_all_kept(tmp_path):
    prompts = [Prompt(n, (5, n)) for n in range(3)]
    answers = [Rollout(p.prompt_ids, (7,), (1,), "eos") for p in prompts]
    found, counts = keep_answers(tmp_path, byte_tokenizer(), prompts, answers)
    assert found == answers
    assert counts == AnswerCounts(answers=3, graded=0, right=None, filtered=False)


def test_the_history_is_restored_from_the_files_of_a_run(paths, tmp_path):
    def lines(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    prompts = [Prompt(n, (5, n)) for n in range(3)]
    generated = [Rollout(p.prompt_ids, (7,), (1,), "replay") for p in prompts]
    answers, counts = keep_answers(tmp_path, None, prompts, generated)
    lines("health/checks.jsonl", [dataclasses.asdict(START) | dataclasses.asdict(counts), dataclasses.asdict(FIRST)])
    lines("metrics.jsonl", [{"step": step, "loss": 1 / step, "rollout/length_mean": step} for step in range(1, 13)])
    scores = [{"step": 0, "name": "before", "data": {"a": {"avg@2": 0.5}}}]
    lines("evaluations.jsonl", [*scores, {"step": 0, "name": "teacher", "data": {"a": {"avg@2": 0.9}}}])
    loaded = load_answers(tmp_path, read_model_spec(paths[0]).vocab_size)
    assert [answer.response_ids for answer in loaded] == [answer.response_ids for answer in answers]
    without_warning = read_history(tmp_path)
    assert without_warning == HealthHistory((START, FIRST), ((1 / 11, 11), (1 / 12, 12)), ({"a": 0.5},), ())
    warning = HealthWarning(10, "length", "shorter")
    lines("health/warnings.jsonl", [dataclasses.asdict(warning)])
    assert read_history(tmp_path) == dataclasses.replace(without_warning, warnings=(warning,))


def test_the_report_shows_the_curves_and_the_warnings(tmp_path):
    (tmp_path / "health").mkdir()
    facts = {"answers": 64, "graded": 60, "right": 23, "filtered": True}
    rows = [dataclasses.asdict(START) | facts, *map(dataclasses.asdict, (FIRST, LAST))]
    (tmp_path / "health" / "checks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path).read_text()
    assert "No warning." in page and "64 answers of the start model, 23 of 60 right; only the right ones" in page
    for title in ("Perplexity of the start model", "Entropy of the next", "KL(student || teacher)", "Objective, mean"):
        assert title in page
    assert "[1.4," in page and ",0.05]" in page and "[0,10,20]" in page  # values and steps of the charts
    (tmp_path / "health" / "warnings.jsonl").write_text('{"step": 20, "kind": "x", "message": "it <fell>"}\nbroken')
    page = write_report(tmp_path).read_text()
    assert "warning: it &lt;fell&gt;" in page and "No warning." not in page
