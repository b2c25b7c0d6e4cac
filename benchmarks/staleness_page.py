"""Write docs/results/staleness.md from docs/results/staleness.json."""

from __future__ import annotations

from typing import Any

from benchmarks.objectives_page import NAMES
from benchmarks.pages import listed, spread, table_lines

AHEAD = (0, 1)  # values of rollout.ahead
MODELS = ("student", "teacher")  # of the demo's pair
INTRODUCTION = """\
`rollout.ahead: 1` generates the rollouts of the next step while the student trains. The weights that sample them are
then one update older than the weights that train on them, and `rollout/staleness` in the log is 1 in place of 0.
No objective is differentiated through the sampling, and none uses the probabilities that the older weights gave to the
sampled tokens. Both models run on the stored token ids with their present weights.
"""
EFFECTS = (
    ("hidden states (OPRD)", "Only the prefixes at which states are compared come from older weights."),
    ("`full_kl`, `topk_kl`, any `direction`", "Likewise: each divergence is between present distributions."),
    ("`topk_surrogate`", "Likewise: the sum over the top k tokens uses present probabilities."),
    (
        "`sampled`",
        "The estimate is also biased: the older weights sampled its tokens, and no importance weight corrects for it.",
    ),
)
METHOD = """\
Made by `python benchmarks/staleness.py` on one CPU thread in fp32, from the pairs of the
[demo](../demo.md): Qwen3, 4 layers, width 96, adding two 3-digit numbers. Learning rates are the best of
[objectives.md](objectives.md), which were chosen at `ahead` 0; everything else is `examples/demo.yaml`. Accuracy is
exact match on 1,000 held-out additions. Cells are the mean over the seeds and, in brackets, the lowest and the highest;
a difference is that of two runs with one seed. The embedded engine generates before training in both, so only the
weights that sample differ, not the time.
"""
LIMITS = """\
- The demo's learning rate is high and its runs are short, so one update moves the student further than in a usual run.
- Answers have 6 tokens. In long answers an older student's prefixes differ more.
- Few seeds, one task, one size: ranges that overlap say nothing about order.
"""


def percents(record: dict[str, Any], objective: str, ahead: int, metric: str) -> list[float]:
    """Return a metric of an objective in percent, one value per seed, in the order of the seeds."""
    runs = [run for run in record["runs"] if (run["objective"], run["ahead"]) == (objective, ahead)]
    return [100 * run[metric] for run in sorted(runs, key=lambda run: run["seed"])]


def markdown(record: dict[str, Any]) -> str:
    """Return the text of docs/results/staleness.md."""
    rows = []
    for objective in dict.fromkeys(run["objective"] for run in record["runs"]):
        row = [NAMES[objective]]
        for metric in ("greedy", "sampled"):
            present, older = (percents(record, objective, ahead, metric) for ahead in AHEAD)
            differences = [after - before for before, after in zip(present, older, strict=True)]
            row += [spread(present), spread(older), spread(differences)]
        rows.append(row)
    head = ["objective"]
    for metric in ("greedy", "temperature 0.7"):
        head += [f"{metric}, ahead 0, %", "ahead 1, %", "difference"]
    before = {model: spread([100 * pair[model]["greedy"] for pair in record["pairs"].values()]) for model in MODELS}
    lines = [
        "# Rollouts that are one update old",
        "",
        INTRODUCTION,
        *table_lines(["objective", "with rollouts that are one update old"], EFFECTS),
        "",
        "## Measured on the demo",
        "",
        listed(record["versions"]),
        "",
        METHOD,
        f"{record['steps']} steps, {len(record['pairs'])} seeds ({', '.join(record['pairs'])}). Greedy accuracy of the "
        f"student before: {before['student']} %; of the teacher: {before['teacher']} %.",
        "",
        *table_lines(head, rows),
        "",
        "## How far this goes",
        "",
        LIMITS,
    ]
    return "\n".join(lines)
