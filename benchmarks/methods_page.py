"""Write docs/results/methods.md from docs/results/methods.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.pages import listed, spread, table_lines

METHOD = """\
[Methods](../methods.md) says what each one is. The models are like those of the [demo](../demo.md): they compute with a
few digits, have less than a million parameters, and **show nothing about large models**. Each seed has models of its
own (`benchmarks/method_pairs.py`) and an order of prompts of its own. fp32, one CPU thread, learning rate 0.003.
Accuracy is exact match of greedy answers to 1,000 held-out problems, in percent: the mean, and in brackets the lowest
and the highest of the seeds. A difference is that of two runs with the same seed.
"""


@dataclass(frozen=True)
class Section:
    """A table of the page, whose rows have names for readers. The first row is the reference."""

    experiment: str
    title: str
    introduction: str
    rows: Mapping[str, str]
    reading: str = ""


SECTIONS = (
    Section(
        "unlike",
        "Unlike widths: schedules of both losses",
        "A 4-layer student of width 96 and a 6-layer teacher of width 128 with unrelated weights; bridges of rank 8.",
        {
            "full_kl": "full KL",
            "fade": "a bridge, all layers, faded into full KL in 10 steps",
            "fade_20": "in 20 steps",
            "fade_40": "in 40 steps",
            "switch": "the bridge for 10 steps, then full KL",
            "fade_map": "the last layer by a trained map (`mlp`, weight 1000), faded into full KL in 10 steps",
            "both": "the bridge (weight 10) and full KL at every step",
            "bridge": "the bridge alone",
        },
    ),
    Section(
        "positions",
        "Which tokens to compare",
        "Hidden states of all layers. Answers have 30 tokens; each depends on the one before. All rows but the "
        "last compare about 480 tokens in each step: fewer tokens of an answer, more answers.",
        {
            "all": "all tokens of 16 answers",
            "first": "the first 8 tokens of 60 answers, which end there (`rollout.horizon=auto`)",
            "last": "the last 8 tokens of 60 answers",
            "growing": "all tokens of 25 answers, which end after 9, 16, 23, 30 tokens (a quarter of the steps each)",
            "all_60": "all tokens of 60 answers: 4 times the tokens",
        },
    ),
    Section(
        "extrapolated",
        "Extrapolated targets",
        "Hidden states of all layers. The teacher was trained from the student's start weights and stopped at about "
        "80 %, so that there is room above it.",
        {
            "plain": "targets of the teacher (lambda 1)",
            "lambda_0.75": "lambda 0.75",
            "lambda_1.25": "lambda 1.25",
            "lambda_1.5": "lambda 1.5",
            "other_base": "lambda 1.25, an unrelated model as base",
        },
    ),
    Section(
        "layers",
        "Layers that count alike",
        "The demo's pair, hidden states of all layers.",
        {
            "plain": "plain squared error",
            "l2": "`normalize: l2`",
            "inverse_square": "`layer_weights: inverse_square`",
        },
    ),
    Section(
        "teachers",
        "Several teachers",
        "A specialist for sums and one for differences, both trained from the student's start weights.",
        {
            "mixed": "hidden states, both teachers in each step",
            "grouped": "hidden states, one teacher in each step (`data.group_by_teacher`)",
            "full_kl_mixed": "full KL, both teachers in each step",
            "full_kl_grouped": "full KL, one teacher in each step",
        },
    ),
    Section(
        "output",
        "Other losses on distributions",
        "The demo's pair. Learning rate 0.001 for the sampled objective.",
        {
            "full_kl": "full KL",
            "skew_reverse": "`direction: skew_reverse`",
            "skew_forward": "`direction: skew_forward`",
            "forward": "`direction: forward`",
            "sampled": "sampled token",
            "gated": "sampled token, `forward_above_entropy: 0.8`, `k: 4`",
        },
    ),
)


def markdown(record: dict[str, Any]) -> str:
    """Return the text of the page."""
    lines = [
        "# Methods beyond the paper, on tiny models",
        "",
        "    python benchmarks/methods.py --parallel 15",
        "",
        METHOD,
        f"{record['seeds']} seeds; {listed(record['versions'])}.",
    ]
    for section in SECTIONS:
        rows = {name: _by_seed(record, section.experiment, name) for name in section.rows}
        rows = {name: runs for name, runs in rows.items() if runs}
        if rows:
            lines += ["", f"## {section.title}", "", section.introduction, "", *_table(section, rows)]
            if section.experiment == "positions":
                lines += ["", *_by_token(rows, section.rows)]
            if section.reading:
                lines += ["", section.reading]
    if record["missing"]:
        lines += ["", f"Not run: {', '.join(record['missing'])}."]
    return "\n".join(lines) + "\n"


def _by_seed(record: dict[str, Any], experiment: str, name: str) -> dict[int, dict[str, Any]]:
    """Return the trials of a method by seed."""
    return {
        trial["seed"]: trial
        for trial in record["trials"]
        if (trial["method"]["experiment"], trial["method"]["name"]) == (experiment, name)
    }


def _table(section: Section, rows: Mapping[str, dict[int, dict[str, Any]]]) -> list[str]:
    """Return the lines of a table: accuracy during training, at the end, and against the first row."""
    reference = next(iter(rows.values()))
    steps = [step for step, _ in next(iter(reference.values()))["accuracy"]]
    table = []
    for name, runs in rows.items():
        means = [
            _spread_or_mean([_percent(run, number) for run in runs.values()], step == steps[-1])
            for number, step in enumerate(steps)
        ]
        pairs = [_percent(run) - _percent(reference[seed]) for seed, run in runs.items() if seed in reference]
        difference = (
            ""
            if runs is reference or not pairs
            else f"{spread(pairs)}, above in {sum(one > 0 for one in pairs)} of {len(pairs)}"
        )
        table.append([section.rows[name], *means, difference])
    return table_lines(
        ["loss", "before", *(f"step {step}" for step in steps[1:]), "difference to the first row"], table
    )


def _by_token(rows: Mapping[str, dict[int, dict[str, Any]]], names: Mapping[str, str]) -> list[str]:
    """Return a table of the share of wrong tokens by their place in the answer, after the right tokens before them."""
    first = next(iter(rows.values()))
    table = [
        [name, *_wrong_by_quarter([run["by_token"][key] for run in first.values()])]
        for name, key in (("student before", "before"), ("teacher", "teacher"))
    ]
    table += [
        [names[name], *_wrong_by_quarter([run["by_token"]["after"] for run in runs.values()])]
        for name, runs in rows.items()
    ]
    text = "Wrong tokens in percent, after the right tokens before them, by quarter of the answer:"
    return [text, "", *table_lines(["model", "first quarter", "second", "third", "last"], table)]


def _wrong_by_quarter(shares: Sequence[Sequence[float]]) -> list[str]:
    """Return the mean share of wrong tokens in each quarter of an answer, in percent."""
    tokens = [100 * (1 - statistics.mean(column)) for column in zip(*shares, strict=True)][:-1]  # without the end token
    size = len(tokens) // 4
    return [f"{statistics.mean(tokens[start : start + size]):.2f}" for start in range(0, 4 * size, size)]


def _percent(trial: dict[str, Any], number: int = -1) -> float:
    """Return the accuracy of a measurement in percent, the mean over the kinds of problems."""
    return 100 * statistics.mean(trial["accuracy"][number][1].values())


def _spread_or_mean(values: Sequence[float], last: bool) -> str:
    return spread(values) if last else f"{statistics.mean(values):.1f}"
