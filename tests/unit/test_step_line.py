"""The lines that a run prints: its steps, and the summary before them."""

import importlib.util

import pytest

from megatron_oprd.config import WandbConfig, parse_config
from megatron_oprd.launch.run_summary import pairs_in_words
from megatron_oprd.models.layer_plan import LayerPlan
from megatron_oprd.runtime.readable import count, duration, significant
from megatron_oprd.training.step_line import StepLine, seconds_left, step_line, tokens_per_second
from megatron_oprd.training.wandb_curves import check_wandb
from megatron_oprd.types import LayerPair, UserError

LINE = StepLine(500, ("loss", "rep/cosine", "output/reverse_kl"), 16)


def row(step: int, **values: float) -> dict[str, float]:
    names = {"rep_cosine": "rep/cosine", "kl": "output/reverse_kl"}
    return {
        "step": step, "loss": 0.0123456, "rep/cosine": 0.98765, "lr": 1e-5, "time/step": 2.0,
        "rollout/length_mean": 100.0,
        **{names.get(name, name): value for name, value in values.items()},
    }  # fmt: skip


def test_a_step_prints_progress_metrics_speed_and_the_time_left():
    assert LINE.text([row(26), row(27, kl=0.1234)]) == (
        " 27/500  loss  0.01235  cosine  0.9877  KL   0.1234  lr 1.00e-05     800 tok/s  16 min left"
    )


def test_values_stand_below_each_other_and_a_metric_that_was_not_measured_is_a_dash():
    with_kl, without = LINE.text([row(9, kl=123456.0)]), LINE.text([row(10, loss=-0.5, rep_cosine=-0.5)])
    assert [with_kl.index(name) for name in ("loss", "cosine", "KL", "lr", "tok/s")] == [
        without.index(name) for name in ("loss", "cosine", "KL", "lr", "tok/s")
    ]
    assert "KL        -" in without


def test_the_widest_line_has_100_characters():
    line = StepLine(9999, LINE.metrics, 10**6)
    widest = line.text([row(1000, loss=1e-30, rep_cosine=-1.0, kl=1e-30, **{"time/step": 9.55})])
    assert widest.endswith(" 23 h 52 min left") and len(widest) <= 100


def test_the_last_step_has_no_time_left():
    assert LINE.text([row(500)]).endswith("tok/s")


def test_the_line_of_the_start_names_the_student_before_its_first_update():
    line = "start: loss 0.01235, cosine 0.9877, KL 1.500 (the student before its first update)"
    assert LINE.start(row(1, kl=1.5)) == line
    assert "KL" not in LINE.start(row(1))


def test_the_first_step_of_a_process_does_not_count_for_the_speed():
    rows = [row(1, **{"time/step": 1000.0}), row(2), row(3)]
    assert tokens_per_second(rows, 16) == 800
    assert seconds_left(rows, 10) == 14
    assert seconds_left(rows[:1], 10) == 9000


def test_columns_follow_the_objective():
    models = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"prompts": ["p"]}}
    config = {**models, "train": {"run_dir": "r", "steps": 7}, "rollout": {"prompts_per_step": 2}}
    assert step_line(parse_config(config)) == StepLine(7, ("loss", "rep/cosine"), 4)
    config["loss"] = {"representation": {"weight": 0.0}, "output": {"objective": "full_kl"}}
    assert step_line(parse_config(config)).metrics == ("loss", "output/reverse_kl")


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (
            [(4, 8), (8, 16), (12, 24)],
            "student 4, 8, 12 of 12 from teacher 8, 16, 24 of 24; layer 12 after the final norm",
        ),
        ([(1, 2), (2, 4), (3, 6)], "student 1-3 of 12 from teacher 2, 4, 6 of 24"),
    ],
)  # fmt: skip
def test_layer_pairs_are_put_into_words(pairs, words):
    plan = LayerPlan(tuple(LayerPair(*pair) for pair in pairs), 12, 24, True, (12,), (24,))
    assert pairs_in_words(plan) == words


def test_numbers_and_times_are_readable():
    assert [significant(value) for value in (0.0, 1.798, 1234.5, 12345.6, 1e-5, 1e5)] == [
        "0.000", "1.798", "1234", "12346", "1.00e-05", "1.00e+05",
    ]  # fmt: skip
    assert [count(value) for value in (12, 99_999, 999_499, 999_500, 134_515_008, 1.7e9)] == [
        "12", "99,999", "999 k", "1.00 M", "135 M", "1.70 B",
    ]  # fmt: skip
    assert [duration(value) for value in (0.04, 9.5, 45, 150, 3601, 90_000)] == [
        "0.0 s", "9.5 s", "45 s", "2 min", "1 h 0 min", "1 d 1 h",
    ]  # fmt: skip


def test_a_missing_wandb_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_wandb(None)
    with pytest.raises(UserError, match=r"pip install megatron_oprd\[wandb\]"):
        check_wandb(WandbConfig(project="p", mode="offline"))


def test_wandb_without_a_key_is_refused_before_the_start(monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"wandb login.*mode=offline"):
        check_wandb(WandbConfig(project="p"))
