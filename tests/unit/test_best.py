"""The best evaluation of a run, and the end of a run that no longer improves."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from megatron_oprd import train
from megatron_oprd.config import CheckpointConfig, EvaluationConfig
from megatron_oprd.evaluation.best import judge, reason_to_stop, write_best
from megatron_oprd.evaluation.records import read_best
from megatron_oprd.parallel.topology import start_process
from megatron_oprd.training.state import BestEvaluation
from megatron_oprd.types import UserError


def history(metric, values, source="all", **settings):
    """Return the best evaluation after evaluations at steps 0, 10, 20, ... with these values."""
    config, best = EvaluationConfig(every=10, best=metric, **settings), None
    for number, value in enumerate(values):
        name = metric.replace("@n", f"@{config.samples}")
        best = judge(best, 10 * number, {"other": {name: -1.0}, source: {name: value}}, config)
    return best


@pytest.mark.parametrize("metric", ["perplexity", "forward_kl", "reverse_kl"])
def test_a_lower_divergence_or_perplexity_is_better(metric):
    assert history(metric, [0.1, 3.0, 2.0, 2.5, 2.0]) == BestEvaluation(metric, 20, 2.0, later=2)


@pytest.mark.parametrize("metric", ["argmax_agreement", "cosine", "avg@n", "best@n"])
def test_a_higher_agreement_or_accuracy_is_better(metric):
    assert history(metric, [9.0, 0.2, 0.4, 0.3]) == BestEvaluation(metric, 20, 0.4, later=1)


def test_the_start_model_and_values_that_are_not_finite_are_never_the_best():
    assert history("perplexity", [1.0]) is None
    assert history("perplexity", [1.0, math.nan]) is None
    assert history("perplexity", [1.0, math.nan, 5.0, math.nan, 4.0]) == BestEvaluation("perplexity", 40, 4.0)
    assert history("perplexity", [1.0, 5.0, math.nan, math.inf]) == BestEvaluation("perplexity", 10, 5.0, later=2)


def test_a_run_ends_after_as_many_evaluations_without_a_better_one_as_patience_says():
    config = EvaluationConfig(every=10, best="perplexity", patience=2)
    assert reason_to_stop(None, config) is None
    assert reason_to_stop(history("perplexity", [9.0, 2.0, 3.0]), config) is None
    assert reason_to_stop(history("perplexity", [9.0, 2.0, 3.0, 1.0, 4.0]), config) is None
    reason = reason_to_stop(history("perplexity", [9.0, 2.0, 3.0, 4.0]), config)
    assert reason.startswith("stopped early: 2 evaluations in a row were not better than step 10 (perplexity 2); ")
    never = EvaluationConfig(every=10, best="perplexity")
    assert reason_to_stop(history("perplexity", [9.0, 2.0, *[3.0] * 50]), never) is None


def test_the_file_names_the_checkpoint_and_vanishes_with_the_setting(tmp_path):
    write_best(tmp_path, BestEvaluation("cosine", 20, 0.5, later=1), stopped_at=30)
    values = {"metric": "cosine", "step": 20, "value": 0.5, "later": 1, "stopped_at": 30}
    assert read_best(tmp_path) == values | {"checkpoint": "checkpoints/step_0000020"}
    write_best(tmp_path, None, None)
    assert read_best(tmp_path) == {} and not (tmp_path / "best.json").exists()
    (tmp_path / "best.json").write_text(json.dumps([1]) + "x")
    assert read_best(tmp_path) == {}


def test_a_run_has_its_report_if_the_best_checkpoint_is_gone(tmp_path, monkeypatch):
    start_process(torch.device("cpu"))
    monkeypatch.setattr(train, "export_student", lambda *arguments: None)
    config = SimpleNamespace(checkpoint=CheckpointConfig())
    run = SimpleNamespace(inputs=SimpleNamespace(run_dir=tmp_path, config=config), checkpoint_content=None)
    with pytest.raises(UserError, match="the best checkpoint by cosine, is gone"):
        train.finish(run, BestEvaluation("cosine", 10, 0.5))
    assert (tmp_path / "report.html").exists()
