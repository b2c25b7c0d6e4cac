"""The report says what the run folder holds, for any part of it, and no text of a model becomes markup."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from megatron_oprd.report.live_report import LiveReport
from megatron_oprd.report.page import MAX_POINTS, line_chart, number, table
from megatron_oprd.report.write import write_report
from megatron_oprd.types import UserError

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Balance(HTMLParser):
    """Fails on markup that is not closed in order, and collects the text."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def read(path) -> tuple[str, Balance]:
    page = path.read_text("utf-8")
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert not parser.tags & {"script", "link", "img", "iframe"}
    assert "http://" not in page and "https://" not in page and "url(" not in page
    return page, parser


def lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics(step: int) -> dict[str, float]:
    row = {"step": step, "loss": 1 / step, "grad_norm": 2.0, "lr": 1e-5, "rep/mse": 0.1, "rep/cosine": 0.9}
    row |= {f"rep/cosine/layer_{layer}": 1 - layer / 100 / step for layer in range(1, 13)}
    row |= {"rep/student_norm": 3, "rep/teacher_norm": 4, "rollout/length_mean": 70, "rollout/length_max": 90}
    row |= {"time/rollout": 6.0, "time/teacher": 1.0, "time/student": 2.0, "time/step": 10.0}
    return row | {"rollout/truncated_fraction": 0.1, "memory/peak_bytes": 3 * 2**30}


@pytest.fixture
def run_dir(tmp_path):
    lines(tmp_path / "metrics.jsonl", [metrics(step) for step in range(1, 6)])
    scores = {"AIME24": {"avg@16": 0.25, "unanswered": 0.5}}
    after = {"AIME24": {"avg@16": 0.5, "unanswered": 0.625}}
    lines(
        tmp_path / "evaluations.jsonl",
        [{"step": 0, "name": "before", "data": scores}, {"step": 5, "name": "after", "data": after}],
    )
    (tmp_path / "config.yaml").write_text(
        "student: {path: /models/small}\nteacher: {path: /models/large}\ntrain: {steps: 7}\n"
    )
    (tmp_path / "plan.json").write_text('{"pairs": [[1, 1]]}')
    sample = {"prompt": "2+2?", "response": "four", "prompt_index": 3, "sample_index": 1, "finish_reason": "eos"}
    lines(tmp_path / "rollouts" / "step_1.jsonl", [{"step": 1, **sample}])
    lines(tmp_path / "rollouts" / "step_5.jsonl", [{"step": 5, **sample, "response": "it is 4"}])
    return tmp_path


def test_a_complete_run_shows_every_part(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page, parser = read(path)
    text = " ".join(parser.text)
    for words in ("/models/small", "/models/large", "5 steps of 7", "before (step 0)", "after (step 5)", "AIME24"):
        assert words in text
    for title in ("Loss", "Accuracy, avg@16", "Cosine per layer", "Gradient norm", "Learning rate", "Response length"):
        assert title in text
    for words in ("2+2?", "four", "it is 4", "ended by eos", "Peak memory: 3 GiB", '{"pairs": [[1, 1]]}', "steps: 7"):
        assert words in text
    assert '<td class="good">+0.25</td>' in page  # more correct is better
    assert '<td class="bad">+0.125</td>' in page  # more unanswered is worse
    assert [entry.name for entry in run_dir.iterdir() if entry.name.startswith(".")] == []


def test_an_evaluation_named_by_its_step_has_the_step_once_and_one_sample_has_one_chart(run_dir):
    scores = {"sums": {"avg@1": 0.5, "best@1": 0.5}}
    lines(run_dir / "evaluations.jsonl", [{"step": step, "name": f"step {step}", "data": scores} for step in (1, 5)])
    text = " ".join(read(write_report(run_dir))[1].text)
    assert "step 5" in text and "step 5 (step 5)" not in text
    assert "Accuracy, avg@1" in text and "Accuracy, best@1" not in text


def test_a_report_says_whether_the_run_goes_on(run_dir):
    page, parser = read(write_report(run_dir, is_running=True))
    assert "running: 5 steps of 7; page written at" in " ".join(parser.text) and 'http-equiv="refresh"' in page
    page, parser = read(write_report(run_dir))
    assert "stopped: 5 steps of 7" in " ".join(parser.text) and "refresh" not in page
    lines(run_dir / "metrics.jsonl", [metrics(step) for step in range(1, 8)])
    _, parser = read(write_report(run_dir))
    assert "finished: 7 steps" in " ".join(parser.text)


def test_the_student_on_the_teachers_answers_is_shown_without_right_answers(run_dir):
    def scores(value):
        metrics = {"perplexity": value, "teacher_perplexity": 2.0, "forward_kl": value, "reverse_kl": value}
        return {"chat": metrics | {"cosine": 0.5, "cosine/layer_1": 0.25, "cosine/layer_2": 0.75}}

    found = [{"step": step, "name": f"step {step}", "data": scores(9.0 - step)} for step in (0, 2, 4)]
    lines(run_dir / "evaluations.jsonl", found)
    best = {"metric": "reverse_kl", "step": 4, "value": 5.0, "later": 3, "checkpoint": "checkpoints/step_0000004"}
    (run_dir / "best.json").write_text(json.dumps(best | {"stopped_at": 5}))
    page, parser = read(write_report(run_dir))
    text = " ".join(parser.text)
    for words in (
        "Perplexity of the teacher's answers",
        "KL on the teacher's answers (nats)",
        "Cosine per layer on the teacher's answers, first and last evaluation",
        "Best by reverse_kl: step 4 with 5",
        "Not graded: no prompt has a right answer.",
        "finished early: 5 steps of 7",
    ):
        assert words in text, words
    assert '<td class="good">-4</td>' in page  # a lower perplexity is better
    assert "cosine/layer_1" not in text and "avg@" not in text


def test_the_main_metrics_are_shown_at_the_start_and_now(run_dir):
    page, parser = read(write_report(run_dir))
    assert "Start and now" in parser.text
    assert "<tr><td>loss</td><td>1</td><td>0.2</td></tr>" in page
    lines(run_dir / "metrics.jsonl", [metrics(1)])
    _, parser = read(write_report(run_dir))
    assert "Start and now" not in parser.text


def test_a_live_report_is_written_at_most_every_30_seconds_and_its_failure_ends_no_run(run_dir, capsys):
    report, path = LiveReport(run_dir), run_dir / "report.html"
    report.update()
    path.unlink()
    report.update()
    assert not path.exists()
    report.update(now=True)
    assert path.exists()
    path.unlink()
    path.mkdir()
    for _ in range(2):
        report.update(now=True)
    assert capsys.readouterr().out.count("warning: report.html is not updated") == 1


def test_the_time_of_each_part_adds_up_to_the_step_and_leaves_out_the_first(run_dir):
    rows = [metrics(step) for step in range(1, 4)]
    rows[0] |= {"time/step": 1000.0, "time/rollout": 900.0}
    lines(run_dir / "metrics.jsonl", rows)
    page, _ = read(write_report(run_dir))
    shares = dict(re.findall(r"<td>(\w[\w ]*)</td><td>[\d.]+</td><td>(\d+)%</td>", page))
    assert shares == {"rollout": "60", "teacher": "10", "student": "20", "other": "10", "whole step": "100"}


@pytest.mark.parametrize(
    "missing", ["metrics.jsonl", "evaluations.jsonl", "config.yaml", "plan.json", "rollouts/step_1.jsonl", "*"]
)
def test_any_file_may_be_missing(run_dir, missing):
    for path in [p for p in run_dir.rglob(missing) if p.is_file()]:
        path.unlink()
    read(write_report(run_dir))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n",
        '{"step": 1}\n',
        '{"step": 1, "los',
        "[1]\n3\nnull\n",
        '{"loss": 1.0}\n',
        '{"step": "one"}\n',
        "\x00\xff",
    ],
)
@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl", "rollouts/step_1.jsonl", "config.yaml"])
def test_a_short_or_broken_file_leaves_a_gap_and_stops_nothing(run_dir, name, content):
    (run_dir / name).write_bytes(content.encode("latin-1"))
    read(write_report(run_dir))


def test_values_that_are_not_finite_leave_a_gap(run_dir):
    rows = [metrics(step) for step in range(1, 5)]
    for value, row in zip((math.nan, math.inf, -math.inf, None), rows, strict=True):
        row |= {key: value for key in row if key not in ("step", "lr")}
    lines(run_dir / "metrics.jsonl", rows)
    lines(run_dir / "evaluations.jsonl", [{"step": 0, "name": "before", "data": {"s": {"avg@1": math.nan, "x": None}}}])
    page, parser = read(write_report(run_dir))
    assert not re.search(r"\b(nan|inf|None)\b", " ".join(parser.text), re.IGNORECASE)
    assert not re.search(r'="[^"]*\b(nan|inf)\b', page)
    assert "Learning rate" in page


def test_text_of_a_model_never_becomes_markup(run_dir):
    attack = "</pre><script>alert(1)</script>\"'&<img src=x onerror=alert(1)>"
    sample = {"step": 1, "prompt": attack, "response": attack, "finish_reason": attack, "sample_index": attack}
    lines(run_dir / "rollouts" / "step_1.jsonl", [{**sample, "correct": False, "ground_truth": attack}])
    scores = {attack: {attack: 1.0, f"avg@{attack}": 1.0}}
    lines(run_dir / "evaluations.jsonl", [{"step": 0, "name": attack, "data": scores}] * 2)
    lines(run_dir / "metrics.jsonl", [{"step": 1, f"rep/cosine/layer_{attack}": 1.0}])
    (run_dir / "config.yaml").write_text(json.dumps({"student": {"path": attack}}))
    _, parser = read(write_report(run_dir))
    assert attack in " ".join(parser.text)


def test_a_step_that_ran_again_after_a_resume_counts_once(run_dir):
    lines(run_dir / "metrics.jsonl", [metrics(1), metrics(2), {**metrics(2), "loss": 77.5}])
    page, _ = read(write_report(run_dir))
    assert page.count("<title>step 2: 77.5</title>") == 1
    assert "<title>step 2: 0.5</title>" not in page


def test_a_long_response_is_shortened_and_says_so(run_dir):
    lines(run_dir / "rollouts" / "step_1.jsonl", [{"step": 1, "prompt": "p", "response": "x" * 100_000 + "the end"}])
    page, _ = read(write_report(run_dir))
    assert "94,007 characters left out" in page and "the end" in page
    assert len(page) < 200_000


def test_a_missing_run_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        write_report(tmp_path / "nowhere")


# The parts


def points_of(chart: str) -> list[tuple[float, float]]:
    path = re.search(r'points="([^"]*)"', chart)[1]
    return [tuple(map(float, pair.split(","))) for pair in path.split()]


def test_a_chart_places_points_in_proportion_and_upward():
    (x0, y0), (x1, y1), (x2, y2) = points_of(line_chart("t", {"a": [(0, 0.0), (1, 5.0), (4, 10.0)]}))
    assert y0 > y1 > y2
    assert (x1 - x0) / (x2 - x0) == pytest.approx(1 / 4, abs=0.01)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(1 / 2, abs=0.01)


@pytest.mark.parametrize(
    "points", [[(3, 1.0)], [(1, 2.0), (2, 2.0)], [(1, 1e-30), (2, 2e-30)], [(1, -1e300), (2, 1e299)]]
)
def test_degenerate_series_are_drawn_inside_the_picture(points):
    assert all(0 <= x <= 480 and 0 <= y <= 230 for x, y in points_of(line_chart("t", {"a": points})))


def test_a_chart_without_points_is_not_drawn_and_a_long_one_keeps_its_ends():
    assert line_chart("t", {}) == line_chart("t", {"a": [(1, math.nan)]}) == ""
    chart = line_chart("t", {"a": [(i, float(i)) for i in range(10_000)]})
    assert len(points_of(chart)) == MAX_POINTS
    assert "step 0: 0<" in chart and "step 9999: 9,999<" in chart


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.1235"), (1e-5, "1e-05"), (12345.678, "12,345.7"), (3.0, "3"), (16384, "16,384"), (0, "0")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "x", True])
def test_what_is_no_number_is_a_dash(value):
    assert number(value) == "\u2013"


def test_a_table_escapes_its_cells():
    assert "<b>" not in table(["<b>"], [["<b>"]])


def test_what_an_objective_measured_is_drawn(run_dir):
    """Every few steps, and without a loss on hidden states."""
    rows = [{name: value for name, value in metrics(step).items() if not name.startswith("rep/")} for step in (1, 2, 3)]
    rows[1] |= {"output/loss": 0.1}
    rows[2] |= {"output/loss": 0.1, "output/reverse_kl": 0.2, "output/student_entropy": 1.0, "output/topk_overlap": 0.5}
    lines(run_dir / "metrics.jsonl", rows)
    page, _ = read(write_report(run_dir))
    for title in ("KL(student || teacher)", "Entropy of the next token", "Agreement on the next token"):
        assert title in page
    for title in ("Mass of the top k", "Cosine"):
        assert title not in page
