"""`megatron-oprd analyse`: arguments, the figures of an analysis, and its section of the report."""

import json

import pytest

from megatron_oprd.analysis.directions import curve_ranks
from megatron_oprd.analysis.figures import draw_figures
from megatron_oprd.analysis.gradients import prompt_variance, variance
from megatron_oprd.commands.analyse import (
    PARSER,
    analysis_config,
    read_before,
    read_configuration,
    read_objectives,
    write_analysis,
)
from megatron_oprd.config import load_config
from megatron_oprd.report.write import write_report
from megatron_oprd.types import UserError

FIGURES = {
    f"{name}.svg" for name in ("cosine", "error", "positions-before", "positions-after", "rank", "drift", "gradients")
}
MODELS = ["student.path=s", "teacher.path=t", "data.prompts=[p]", "train.run_dir=r"]


@pytest.fixture
def run(tmp_path):
    """Return the folder of a run with an exported student and a start model."""
    folder = tmp_path / "run"
    (folder / "hf").mkdir(parents=True)
    (tmp_path / "start").mkdir()
    (folder / "config.yaml").write_text(
        f"student: {{path: {tmp_path / 'start'}}}\nteacher: {{path: t}}\ndata: {{prompts: [p]}}\n"
        f"train: {{run_dir: elsewhere, steps: 500}}\noptimizer: {{name: adamw, precision_aware: true}}\n"
    )
    return folder


def test_of_a_run_the_exported_student_and_the_start_model_are_compared(run):
    options = PARSER.parse_args([str(run), "rollout.prompts_per_step=3"])
    config = read_configuration(options)
    assert (config.student.path, config.train.run_dir) == (str(run / "hf"), str(run))
    assert config.rollout.prompts_per_step == 3
    assert read_before(options) == str(run.parent / "start")
    (run.parent / "start").rmdir()
    assert read_before(options) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}/hf"], r"no config.yaml in .*hf; name the train.run_dir of a run, or student.path"),
        (["{run}", "--objectives", "kl"], r"--objectives: unknown objective kl; use hidden_states, .* or none"),
        ([*MODELS, "--before", "{run}/nothing"], r"--before .*nothing: no such folder"),
        ([*MODELS[:1], *MODELS[2:], "teachers.a.path=t"], r"one teacher, and teachers has a; name one as teacher.path"),
    ],
)
def test_a_mistake_is_one_line_before_any_model_is_read(run, arguments, message):
    options = PARSER.parse_args([argument.format(run=run) for argument in arguments])
    with pytest.raises(UserError, match=message):
        read_before(options)
        analysis_config(read_configuration(options), ["sampled"])


def test_a_run_without_an_exported_student_is_refused_unless_a_model_is_named(run):
    (run / "hf").rmdir()
    with pytest.raises(UserError, match=r"no exported student .*; let the run end, or name a model: student.path=DIR"):
        read_configuration(PARSER.parse_args([str(run)]))
    assert read_configuration(PARSER.parse_args([str(run), "student.path=other"])).student.path == "other"


def test_an_analysis_has_no_optimizer_state_and_only_the_heads_that_it_needs():
    config = load_config(None, [*MODELS, "loss.representation.weight=0", "loss.output.objective=sampled"])
    found = analysis_config(config, ["hidden_states"])
    assert (found.optimizer.name, found.loss.representation.weight, found.loss.output.objective) == ("sgd", 1, "none")
    assert analysis_config(config, ["topk_kl"]).loss.output.objective == "full_kl"
    assert read_objectives(PARSER.parse_args(["--objectives", "none"])) == []


def test_the_variance_of_vectors_follows_from_their_norms():
    # The vectors (3, 0), (3, 2), (6, 1): their mean is (4, 1).
    found = variance([3.0, 13**0.5, 37**0.5], 17**0.5)
    assert found["variance"] == pytest.approx(3.0 + 1.0)  # of both coordinates, with N - 1
    assert found["signal"] == pytest.approx(17 - 4 / 3) and found["noise"] == pytest.approx(4 / (17 - 4 / 3))
    assert variance([1.0, 1.0], 0.1)["noise"] is None  # no signal above the noise
    assert variance([2.0], 2.0)["variance"] is None
    # (3, 0) and (0, 4) share a prompt; the third has its own.
    within = prompt_variance([3.0, 4.0, 0.0], {"a": (2, 2.5), "b": (1, 0.0)})
    assert within == {"prompts": 2, "variance_within_prompts": pytest.approx(12.5)}


def test_a_rank_curve_ends_at_the_width():
    assert curve_ranks(1) == [1] and curve_ranks(8) == [1, 2, 4, 8] and curve_ranks(48) == [1, 2, 4, 8, 16, 32, 48]


def layer(number):
    by_position = {"cosine_by_position": [0.5, None], "error_by_position": [0.1, None]}
    return {"layer": number, "cosine": 0.5, "error": 0.1, "relative_error": 0.2, **by_position}


def analysis():
    """Return the content of an analysis.json of two layers, whose first one has no difference at all."""
    curve = {"ranks": [1, 2], "explained": [0.6, 1.0], "mean_square": 1.0, "effective_rank": 1.5, "mean_share": 0.1}
    none = {"ranks": [], "explained": [], "mean_square": 0.0, "effective_rank": None, "mean_share": None}
    directions = [{"share": 0.6, "left": 0.5, "drift_share": 0.7}]
    states = [layer(1), layer(2)]
    cost = {"teacher_seconds": 0.1, "student_seconds": 0.2, "target_bytes": 2**20, "peak_bytes": 2**30}
    return {
        "rollouts": 4,
        "tokens": 40,
        "positions": {"first_positions": [0, 3], "tokens": [40, 0], "before": states, "after": states},
        "directions": [
            {"layer": 1, "after": none, "before": none, "drift": curve, "directions": directions, "coordinates": []},
            {"layer": 2, "after": curve, "before": curve, "drift": curve, "directions": directions, "coordinates": []},
        ],
        "gradients": [
            {"objective": "hidden_states", "noise": 0.3, "variance": 1.0, "signal": 3.3, "cost": cost},
            {"objective": "sampled", "noise": None, "variance": 1.0, "signal": -0.1, "cost": cost},
        ],
    }


def test_the_report_shows_the_figures_and_the_gradients_of_an_analysis(tmp_path, capsys):
    found = analysis()
    assert set(draw_figures(found)) == FIGURES
    write_analysis(tmp_path / "analysis", found)
    assert "7 figures" in capsys.readouterr().out
    assert json.loads((tmp_path / "analysis" / "analysis.json").read_text()) == found
    text = write_report(tmp_path).read_text()
    section = text[text.index("Analysis</h2>") :]
    section = section[: section.index("</section>")]
    assert section.count("<svg") == len(FIGURES) - 1  # the page has a table of the gradients
    assert "4 rollouts, 40 compared tokens" in section and "sampled" in section


def test_without_an_earlier_state_and_without_gradients_their_figures_are_left_out():
    found = {**analysis(), "gradients": []}
    del found["positions"]["before"]
    for one in found["directions"]:
        one.pop("before"), one.pop("drift"), one.pop("directions")
    assert set(draw_figures(found)) == FIGURES - {"positions-before.svg", "drift.svg", "gradients.svg"}


def test_a_broken_analysis_leaves_the_report_without_the_section(tmp_path):
    (tmp_path / "analysis").mkdir()
    for text in ('{"rollouts": 3', "[1]", '{"rollouts": 3, "positions": {"after": [1]}}'):
        (tmp_path / "analysis" / "analysis.json").write_text(text)
        assert "Analysis</h2>" not in write_report(tmp_path).read_text()
