"""docs/metrics.md has a row for every metric that the code can write."""

import re
from pathlib import Path

from megatron_oprd.evaluation.grading import Sample
from megatron_oprd.evaluation.measure import Measurement
from megatron_oprd.evaluation.scores import score
from megatron_oprd.health.rule import Check
from megatron_oprd.losses.output_space import METRICS
from megatron_oprd.losses.reduction import layer_metrics, output_metrics
from megatron_oprd.types import GlobalCounts, Prompt

ROOT = Path(__file__).parents[2]
# Names that begin with one of these and a slash are metrics; `rollout/` and others are also folders and files.
GROUPS = "align|health|memory|output|rep|rollout|sync|teacher|time"
LITERAL = re.compile(rf'f?"((?:{GROUPS})/[a-z_]+(?:/[a-z_]+)*)"')
FILES = {"health/checks", "health/warnings"}


def documented():
    rows = (line for line in (ROOT / "docs" / "metrics.md").read_text().splitlines() if line.startswith("| `"))
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def written_by_the_code():
    code = (path.read_text() for path in (ROOT / "megatron_oprd").rglob("*.py"))
    literals = {name for text in code for name in LITERAL.findall(text)}
    stages = {f"time/{stage}" for stage in ("rollout", "teacher", "student")}
    return (literals - FILES) | stages | {"step", "loss", "grad_norm", "lr", "health/warnings"}


def test_every_metric_has_a_row():
    counts = GlobalCounts(tokens=1, sequences=1)
    layers = {name.replace("layer_1", "layer_N") for name in layer_metrics({1: [0.0] * 4}, counts)}
    output = set(output_metrics([0.0] * (1 + len(METRICS)), counts, with_metrics=True))
    health = set(Check(1, perplexity=1.0, entropy=1.0, reverse_kl=0.0, objective=0.0, length_mean=1.0).metrics())
    assert (written_by_the_code() | layers | output | health) - documented() == set()


def test_every_metric_of_an_evaluation_has_a_row():
    prompt = Prompt(0, (1,), data_source="math", ground_truth="1")
    sample = Sample(prompt, "one two three four", num_tokens=4, finish_reason="stop", correct=True, answered=True)
    names = {name.replace("@1", "@n") for name in score([sample], 1)}
    assert len(names) == 6 and names <= documented()
    measured = Measurement(1.0, 1.0, 0.0, 0.0, 1.0, 1.0, cosine={1: 1.0}).metrics()
    on_answers = {name.replace("layer_1", "layer_N") for name in measured}
    assert len(on_answers) == 7 and on_answers <= documented()
