"""Write docs/results/methods.md from docs/results/methods.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.pages import listed, spread, table_lines

# Runs that were made before this benchmark, with `benchmarks/bridge.py` and with keys of examples/demo.yaml.
EARLIER = """\
## Earlier runs: unlike widths

100 steps at 0.003, **up to three seeds of training on one pair**: differences of a point or two mean nothing. A 4-layer
student of width 96 (49.5 % before) and a 6-layer teacher of width 128 with unrelated weights.

| loss | seed 0 | seed 1 | seed 2 | mean |
|---|---|---|---|---|
| full KL | 84.4 % | 81.8 % | 80.6 % | 82.3 % |
| a bridge of rank 8, all layers, faded into full KL in 10 steps | 82.0 % | 81.6 % | 82.7 % | 82.1 % |
| the bridge for 10 steps, then full KL | 82.3 % | 84.0 % | 83.3 % | 83.2 % |
| the last layer by a trained map (`mlp`, weight 1000), faded in 10 steps | 85.3 % | 84.6 % | 82.3 % | 84.1 % |
| the bridge alone | 59.8 % | 58.3 % | 63.2 % | 60.4 % |

After 200 steps, seed 0: full KL 96.3 %, the faded bridge 97.0 % (the demo), a bridge alone 67.3 %.

- A bridge alone is far behind; any schedule that ends in full KL is not.
- Whether the faded steps help is not shown. The map is above full KL in each seed, by one to three points; the faded
  bridge is not. On a large model, third parties report [five points](../methods.md#schedules-of-both-losses).

## Earlier runs: layers that count alike

The demo's pair, all layers, 100 steps at 0.003.

| `loss.representation` | seed 0 | seed 1 | seed 2 |
|---|---|---|---|
| plain squared error | 96.4 % | 95.5 % | 96.4 % |
| `layer_weights: inverse_square` | 94.1 % | 95.2 % | 94.8 % |
| `normalize: l2` | 94.8 % | 95.5 % | 94.9 % |

Equal layers gain nothing here: the plain error is as good or a little better, although layer 3 of 4 is most of it. The
learning rate is that of the plain error.

## Earlier runs: other losses

The demo's pair, 100 steps, **one seed**. Learning rate 0.003, and 0.001 for the sampled objective.

| loss | right |
|---|---|
| hidden states | 96.4 % |
| hidden states, targets extrapolated by 1.25 from the student's start, weight 0.64 | 95.6 % |
| full KL | 85.6 % |
| full KL, `direction: skew_reverse` | 84.8 % |
| sampled token | 68.9 % |
| sampled token, `forward_above_entropy: 0.8`, `k: 4` | 71.3 % |
"""
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
            "fade_matrix": "the same with a matrix that starts as a ridge regression (`linear`, `closed_form`)",
            "both": "the bridge (weight 10) and full KL at every step",
            "bridge": "the bridge alone",
            "flow": "angles of the hidden flow of the last layer alone (`loss.flow.geometry`), no bridge",
            "full_kl_flow": "full KL, and these angles with weight 1",
        },
        "A bridge alone is 12 to 26 points below full KL. No schedule that ends in full KL is above it, or below it, "
        "in all five seeds. The largest mean gains are those of the matrix with a closed-form start (most in the seed "
        "where full KL is lowest) and of the switch after 10 steps; longer fading is not better. **The hidden flow of "
        "the last layer alone fails**: every student loses what it could do before.",
    ),
    Section(
        "positions",
        "Which tokens to compare",
        "Hidden states of all layers. Answers have 30 tokens; each depends on the one before. Each row "
        "compares about 480 tokens a step, unless it says otherwise: fewer tokens of an answer, more answers.",
        {
            "all": "all tokens of 16 answers",
            "first": "the first 8 tokens of 60 answers, which end there (`rollout.horizon=auto`)",
            "last": "the last 8 tokens of 60 answers",
            "growing": "all tokens of 25 answers, which end after 9, 16, 23, 30 tokens (a quarter of the steps each)",
            "all_60": "all tokens of 60 answers: 4 times the tokens",
        },
        "**Every kind of token has to be among the compared ones.** With the first 8 tokens, the other digits become "
        "right too, and the student forgets where answers end: the end token is wrong in 31 to 89 % of the answers. "
        "With the last 8 tokens, the first digit is wrong in 3 to 33 %. A growing horizon compares the end token late "
        "and has begun to repair it (14 to 50 %). The loss moves the states of tokens that it does not compare, and "
        "nothing holds them. Four times the tokens add 2 to 5 points.",
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
            "full_kl": "full KL in place of hidden states",
            "full_kl_1.25": "full KL to the extrapolated distribution (`space: output`), lambda 1.25",
        },
        "No student passes its teacher. Extrapolation gains nothing here: lambda 1.25 is worse in four of five seeds, "
        "and 1.5 in all. Targets short of the teacher (0.75) are worse in four. Extrapolated distributions are below "
        "plain full KL in four of five seeds, by one point in the mean. The learning rate is that of the demo.",
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
        "The three are alike in the mean, and differ by up to 24 points in single seeds, in both directions: the "
        "models of a seed matter more than the weights of the layers.",
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
        "Whether the teachers share a step decides nothing here, where both were trained from the same weights: one "
        "teacher in each step is above it and below. 60 steps bring little in all four rows, 3 to 4 points in the "
        "mean. Hidden states gain 18 and 24 points in one seed, and in two of the others the student forgets up to 7.",
    ),
    Section(
        "self",
        "A model that learns from itself",
        "The teacher is the student itself, with a prompt that contains the answer, which it copies. JSD is the "
        "Jensen-Shannon divergence of the distributions; flow has weight 0.05.",
        {
            "jsd": "JSD, frozen teacher",
            "jsd_flow": "JSD and hidden flow, frozen teacher",
            "hidden": "hidden states, frozen teacher",
            "jsd_ema": "JSD, `teacher.ema: 0.95`",
            "jsd_flow_ema": "JSD and hidden flow, `teacher.ema: 0.95`",
            "hidden_ema": "hidden states, `teacher.ema: 0.95`",
            "jsd_live": "JSD, live teacher (`teacher.ema: 0`)",
            "hidden_live": "hidden states, live teacher",
        },
        "**The frozen teacher is best.** A teacher that follows by 5 % a step falls behind it in each seed, and a "
        "live one loses the task in most: nothing holds the two. 0.95 is fast for 60 steps; a slower average is closer "
        "to the frozen teacher. Hidden flow adds nothing that these seeds show. **Hidden states do harm, with every "
        "teacher**: the states of a model that copies an answer are not those of one that computes it.",
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
            "adaptive": "`direction: adaptive`",
            "sampled": "sampled token",
            "importance": "sampled token, `importance: 0.5`",
            "gated": "sampled token, `forward_above_entropy: 0.8`, `k: 4`",
        },
        "Forward KL and adaptive KL, which is partly forward KL, are above full (reverse) KL in each seed. "
        "The skewed divergences are not clearly above or below it. Neither importance by position nor forward KL at "
        "uncertain tokens adds to the sampled token what these seeds could show.",
    ),
)


def markdown(record: dict[str, Any]) -> str:
    """Return the text of the page."""
    lines = [
        "# Methods beyond the paper, on tiny models",
        "",
        "    python benchmarks/methods.py",
        "",
        METHOD,
        listed(record["versions"]) + ".",
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
        lines += ["", f"{len(record['missing'])} trials of the benchmark have not been run."]
    return "\n".join([*lines, "", EARLIER])


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
    return [text, "", *table_lines(["model", "first quarter", "second", "third", "last", "end token"], table)]


def _wrong_by_quarter(shares: Sequence[Sequence[float]]) -> list[str]:
    """Return the mean share of wrong tokens in each quarter of an answer and at its end token, in percent.

    The first token of an answer, a space, is left out.
    """
    _, *tokens, end = [100 * (1 - statistics.mean(column)) for column in zip(*shares, strict=True)]
    size = len(tokens) // 4
    quarters = [statistics.mean(tokens[start : start + size]) for start in range(0, 4 * size, size)]
    return [f"{share:.1f}" for share in (*quarters, end)]


def _percent(trial: dict[str, Any], number: int = -1) -> float:
    """Return the accuracy of a measurement in percent, the mean over the kinds of problems."""
    return 100 * statistics.mean(trial["accuracy"][number][1].values())


def _spread_or_mean(values: Sequence[float], last: bool) -> str:
    return spread(values) if last else f"{statistics.mean(values):.1f}"
