"""The report says what the run folder holds, for any part of it, and no text of a model becomes markup."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest

from megatron_oprd.commands import report as report_command
from megatron_oprd.report.differences import marked
from megatron_oprd.report.heat_map import MOST_COLUMNS, Cells, heat_map, value_limits
from megatron_oprd.report.line_chart import MOST_POINTS, line_chart, thin_keeping_extremes
from megatron_oprd.report.live_report import LiveReport
from megatron_oprd.report.page import number, table
from megatron_oprd.report.plain_text import answer, question
from megatron_oprd.report.write import write_report
from megatron_oprd.types import UserError

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}


class Balance(HTMLParser):
    """Fails on markup that is not closed in order, and collects the text."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags, self.scripts, self.policy = [], [], set(), [], ""
        self.data = {"data-lines": [], "data-cells": []}

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        found = dict(attrs)
        for name in self.data.keys() & found.keys():
            self.data[name].append(json.loads(found[name], parse_constant=pytest.fail))
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.text.append(data)


def read(path) -> tuple[str, Balance]:
    page = path.read_text("utf-8")
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert not parser.tags & {"link", "img", "iframe"}
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page
    assert "url(" not in page
    # One script, and the browser runs no other and opens no address.
    assert len(parser.scripts) == 1
    digest = base64.b64encode(hashlib.sha256(parser.scripts[0].encode()).digest()).decode()
    assert parser.policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return page, parser


def lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics(step: int) -> dict[str, float]:
    row = {"step": step, "loss": 1 / step, "grad_norm": 2.0, "lr": 1e-5, "rep/mse": 0.1, "rep/cosine": 0.9}
    row |= {f"rep/cosine/layer_{layer}": 1 - layer / 100 / step for layer in range(1, 13)}
    row |= {"rep/student_norm": 3, "rep/teacher_norm": 4, "rollout/length_mean": 70, "rollout/length_max": 90}
    row |= {"time/rollout": 6.0, "time/teacher": 1.0, "time/student": 2.0, "time/step": 10.0}
    return row | {"rollout/truncated_fraction": 0.1, "memory/peak_bytes": 3e9}


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
    for words in ("2+2?", "four", "it is 4", "Peak memory: 3 GB", '{"pairs": [[1, 1]]}', "steps: 7"):
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
        "finished: 5 steps of 7",
        "stopped early by evaluation.patience",
    ):
        assert words in text, words
    assert '<td class="good">-4</td>' in page  # a lower perplexity is better
    assert "cosine/layer_1" not in text and "avg@" not in text


def test_the_headline_shows_what_changed_in_how_long_and_what_is_wrong(run_dir):
    rows = [metrics(step) | {"rollout/truncated_fraction": 0.75} for step in range(1, 6)]
    rows[1]["loss"] = math.nan
    lines(run_dir / "metrics.jsonl", rows)
    (run_dir / "config.yaml").write_text(
        "student: {path: m/small}\nteacher: {path: m/large}\ntrain: {steps: 7}\n"
        "rollout: {prompts_per_step: 2, samples_per_prompt: 3, max_new_tokens: 90}\n"
    )
    text = " ".join(read(write_report(run_dir))[1].text)
    for words in (
        "large distilled into small",
        "50 s of training; 6 answers per step; 42 response tokens/s; 3 GB of memory at most",
        "right answers, avg@16 0.25 →  0.5",
        "loss 1 →  0.2 step 1 and step 5",
        "warning: the loss of 1 steps is not finite, first of step 2",
        "warning: 75% of the answers of the last 5 steps were cut at rollout.max_new_tokens=90",
    ):
        assert words in text, words


def test_the_gap_to_the_teacher_is_said(run_dir):
    scores = [{"s": {"perplexity": value, "teacher_perplexity": 2.0}} for value in (6.0, 3.0)]
    found = [{"step": step, "name": f"step {step}", "data": data} for step, data in zip((0, 5), scores, strict=True)]
    lines(run_dir / "evaluations.jsonl", found)
    text = " ".join(read(write_report(run_dir))[1].text)
    assert "perplexity of the teacher's answers 6 →  3 teacher 2, 75% of the gap closed" in text


def test_a_failed_run_says_why(run_dir):
    (run_dir / "failures").mkdir()
    (run_dir / "failures" / "rank_0.json").write_text(json.dumps({"time": 1.0, "line": "rank 0 failed: no more"}))
    text = " ".join(read(write_report(run_dir))[1].text)
    assert "failed: 5 steps of 7" in text and "rank 0 failed: no more" in text


def test_the_same_prompts_are_answered_before_after_and_by_the_teacher(run_dir):
    prompt = "<|im_start|>system\nBe good<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"

    def sample(response, **more):
        return {"prompt": prompt, "response": response, "finish_reason": "eos", **more}

    lines(run_dir / "evaluations" / "step_0000000.jsonl", [sample("a dog", step=0), sample("second sample", step=0)])
    lines(run_dir / "evaluations" / "step_0000005.jsonl", [sample("it is 5<|im_end|>", step=5)])
    for name, teacher in (("a", "/models/other"), ("b", "/models/large")):
        lines(run_dir / "teacher_answers" / f"{name}.jsonl", [sample(f"it is 4 {teacher}")])
        (run_dir / "teacher_answers" / f"{name}.json").write_text(json.dumps({"teacher": {"path": teacher}}, indent=2))
    page, parser = read(write_report(run_dir))
    text = " ".join(parser.text)
    assert '<div class="question">What is 2+2?</div>' in page and "im_end" not in text and "Be good" not in text
    assert '<div class="answer"><mark>a dog</mark></div>' in page and "second sample" not in page
    assert '<div class="answer">it is <mark>5</mark></div>' in page and "step 5 · 57% in common" in text
    assert "it is 4 /models/large" in text and "/models/other" not in text


def test_the_settings_that_differ_from_the_defaults_are_shown_with_these(run_dir):
    (run_dir / "config.yaml").write_text(
        "student: {path: s}\nteacher: {path: t}\ntrain: {steps: 7, run_dir: r}\ndata: {prompts: [p.jsonl]}\n"
        "optimizer: {lr: 0.5}\nrollout: {temperature: 1.0}\n"
    )
    text = "".join(read(write_report(run_dir))[1].text)
    assert "optimizer.lr0.51e-05" in text and "rollout.temperature" not in text.split("Complete configuration")[0]
    assert "train.run_dirrrequired" in text


def test_several_runs_are_compared_on_one_page(run_dir, tmp_path_factory, capsys):
    other = tmp_path_factory.mktemp("other") / run_dir.name  # a folder of the same name
    other.mkdir()
    for folder, response in ((run_dir, "a cat"), (other, "a dog")):
        lines(folder / "evaluations" / "step_0000005.jsonl", [{"step": 5, "prompt": "What?", "response": response}])
    (other / "config.yaml").write_text("train: {steps: 9}\n")
    lines(other / "metrics.jsonl", [metrics(step) for step in range(1, 4)])
    scores = {"AIME24": {"avg@16": 0.75, "unanswered": 0.5}}
    lines(other / "evaluations.jsonl", [{"step": step, "name": "x", "data": scores} for step in (0, 3)])
    to = other / "page.html"
    assert report_command.main([str(run_dir), str(other), str(run_dir), "--to", str(to)]) == 0
    page, parser = read(to)
    assert "Comparison of 2 runs" in parser.text
    assert "<td>steps</td><td>5</td><td>3</td>" in page
    assert '<td>avg@16</td><td>0.5</td><td class="good">0.75</td>' in page
    assert '<td>unanswered</td><td>0.625</td><td class="good">0.5</td>' in page
    loss, by_time = (
        chart for chart in parser.data["data-lines"] if chart["lines"][0]["y"] == [1, 0.5, 0.33333, 0.25, 0.2]
    )
    name = f"{other.parent.name}/{other.name}"
    assert loss["lines"][1] == {"name": name, "x": [1, 2, 3], "y": [1, 0.5, 0.33333]}
    assert f"<h4>{name} · 50% in common</h4>" in page
    assert by_time["lines"][0]["x"] == [10, 20, 30, 40, 50] and by_time["x_label"] == "s"


def test_a_long_and_deep_run_makes_a_small_page(run_dir):
    layers = {f"rep/cosine/layer_{layer}": 0.123456789 * layer / 48 for layer in range(1, 49)}
    scalars = {key: value for key, value in metrics(3).items() if "/layer_" not in key}
    lines(run_dir / "metrics.jsonl", [scalars | layers | {"step": step} for step in range(1, 2001)])
    page, parser = read(write_report(run_dir))
    assert len(page) < 2_000_000
    (cells,) = parser.data["data-cells"]
    assert (len(cells["rows"]), len(cells["columns"])) == (48, MOST_COLUMNS)
    assert any(len(chart["lines"][0]["y"]) == 2000 for chart in parser.data["data-lines"])


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
    lines(run_dir / "evaluations" / "step_0000001.jsonl", [{**sample, "correct": False, "ground_truth": attack}])
    _, parser = read(write_report(run_dir))
    assert "onerror=alert(1)" in " ".join(parser.text)


def test_a_step_that_ran_again_after_a_resume_counts_once(run_dir):
    lines(run_dir / "metrics.jsonl", [metrics(1), metrics(2), {**metrics(2), "loss": 77.5}])
    _, parser = read(write_report(run_dir))
    assert [1, 77.5] in [chart["lines"][0]["y"] for chart in parser.data["data-lines"]]


def test_a_long_response_is_shortened_and_says_so(run_dir):
    lines(run_dir / "rollouts" / "step_1.jsonl", [{"step": 1, "prompt": "p", "response": "x" * 100_000 + "the end"}])
    page, _ = read(write_report(run_dir))
    assert "97,007 characters left out" in page and "the end" in page
    assert len(page) < 60_000 + len(read(write_report(run_dir))[1].scripts[0])


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
    assert len(points_of(chart)) == MOST_POINTS
    values = Balance()
    values.feed(chart)
    (line,) = values.data["data-lines"][0]["lines"]
    assert (line["x"][0], line["y"][0], line["x"][-1], line["y"][-1]) == (0, 0, 9999, 9999)


def test_a_thinned_line_keeps_every_peak():
    points = [(float(i), 1.0) for i in range(5000)]
    points[1234], points[4321] = (1234.0, 50.0), (4321.0, -50.0)
    thinned = thin_keeping_extremes(points, 100)
    assert len(thinned) <= 100 and points[1234] in thinned and points[4321] in thinned
    assert thinned == sorted(thinned)


def test_a_heat_map_shares_a_cell_by_its_mean_and_leaves_out_what_was_not_measured():
    values = [[float(step) for step in range(2 * MOST_COLUMNS)], [math.nan] * (2 * MOST_COLUMNS)]
    drawn = Balance()
    drawn.feed(heat_map("t", Cells([1, 2], list(range(2 * MOST_COLUMNS)), values, "layer", "step")))
    (cells,) = drawn.data["data-cells"]
    assert cells["columns"][:3] == [0, 2, 4] and cells["values"][0][:3] == [0.5, 2.5, 4.5]
    assert cells["values"][1] == [None] * MOST_COLUMNS
    assert heat_map("t", Cells([1], [1, 2], [[math.nan, math.nan]], "layer", "step")) == ""


def test_maps_with_the_same_limits_have_the_same_colour_for_the_same_value():
    maps = [Cells([1], [1, 2], [values], "layer", "step") for values in ([0.0, 0.5], [0.5, 1.0])]
    limits = value_limits(maps)
    before, after = (set(re.findall(r'<path fill="(#\w+)"', heat_map("t", cells, limits))) for cells in maps)
    assert limits == (0.0, 1.0) and len(before) == len(after) == 2 and len(before & after) == 1


def test_the_cells_of_a_heat_map_leave_no_gap_and_its_axes_have_round_numbers():
    drawn = heat_map("t", Cells(range(1, 49), range(1, 2001), [[0.5] * 2000] * 48, "layer", "step"))
    cells = [tuple(map(float, cell)) for cell in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)", drawn)]
    lefts, tops = ({round(cell[place], 1) for cell in cells} for place in (0, 1))
    assert {round(x + width, 1) for x, _, width, _ in cells} - lefts == {max(x + width for x, _, width, _ in cells)}
    assert len({round(y + height, 1) for _, y, _, height in cells} - tops) == 1
    assert re.findall(r'text-anchor="middle">(\d+)<', drawn) == ["1", "500", "1000", "1500"]


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nold<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nHow\nmany?<|im_end|>\n<|im_start|>assistant\n<think>\n",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHow\nmany?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|system|>S<|end|><|user|>How\nmany?<|end|><|assistant|>",
        "<\uff5cbegin\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>How\nmany?<\uff5cAssistant\uff5c>",
        "<bos><start_of_turn>user\nHow\nmany?<end_of_turn>\n<start_of_turn>model\n",
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nHow\nmany? [/INST]",
        "How\nmany?",
    ],
)
def test_a_question_is_shown_without_its_template(prompt):
    assert question(prompt) == "How\nmany?"


def test_an_answer_keeps_everything_but_special_tokens():
    assert answer("<think>a < b</think> c|d <x><|im_end|>") == "<think>a < b</think> c|d <x>"


@pytest.mark.parametrize(
    ("text", "reference", "html", "share"),
    [
        ("one two  three", "one three", "one <mark>two</mark>  three", 4 / 5),
        ("a b", "", "<mark>a b</mark>", 0.0),
        ("a\n<b>", "a <b>", "a\n&lt;b&gt;", 1.0),
        ("", "a", "", 0.0),
        ("", "", "", 1.0),
    ],
)
def test_words_that_the_reference_lacks_are_marked(text, reference, html, share):
    assert marked(text, reference) == (html, pytest.approx(share))


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
