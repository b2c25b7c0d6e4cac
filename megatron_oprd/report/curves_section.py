"""Show the curves of a run over its steps."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_oprd.evaluation.records import Record, as_float, curve, get, ordered
from megatron_oprd.report.answer_charts import answer_charts
from megatron_oprd.report.line_chart import line_chart
from megatron_oprd.report.page import section
from megatron_oprd.report.run_files import RunFiles

SMOOTHING = (
    '<div class="controls"><label>smoothing <input id="smoothing" type="range" min="0" max="0.98" step="0.02" '
    'value="0"></label><span class="muted">Point at a curve for its values.</span></div>'
)
# Title -> lines of the chart -> metrics of `metrics.jsonl`.
CHARTS = {
    "Loss": {"loss": "loss"},
    "Cosine of student and teacher states, mean over layers": {"cosine": "rep/cosine"},
    "Squared error of the states, mean over layers": {"mse": "rep/mse"},
    "Norm of the states": {"student": "rep/student_norm", "teacher": "rep/teacher_norm"},
    "Value of the output-space objective": {"objective": "output/loss"},
    "KL(student || teacher) of the next token": {"exact": "output/reverse_kl", "sampled": "output/sampled_kl"},
    "Entropy of the next token": {"student": "output/student_entropy", "teacher": "output/teacher_entropy"},
    "Agreement on the next token": {"top k": "output/topk_overlap", "most likely": "output/argmax_agreement"},
    "Mass of the top k": {"student": "output/student_mass", "teacher": "output/teacher_mass"},
    "Gradient norm, before clipping": {"gradient norm": "grad_norm"},
    "Learning rate": {"lr": "lr"},
    "Response length (tokens)": {
        "mean": "rollout/length_mean",
        "max": "rollout/length_max",
        "horizon": "rollout/horizon",
    },
    "Truncated responses (fraction)": {"truncated": "rollout/truncated_fraction"},
    "Responses cut by the horizon (fraction)": {"cut": "rollout/horizon_fraction"},
}


def curves_section(run: RunFiles) -> str:
    """Return the curves of evaluations and steps, below the control that smooths them."""
    charts = [*_accuracy(run.evaluations), *answer_charts(run.evaluations)]
    charts += [
        line_chart(title, {line: curve(run.metrics, metric) for line, metric in lines.items()})
        for title, lines in CHARTS.items()
    ]
    drawn = "".join(charts)
    return section("Curves", f'{SMOOTHING}<div class="grid">{drawn}</div>' if drawn else "")


def _accuracy(evaluations: Sequence[Record]) -> list[str]:
    """Return one chart per accuracy metric, with a line per data source."""
    charts = []
    for metric in ordered(scores for item in evaluations for scores in item["data"].values()):
        if metric.startswith(("avg@", "best@")) and metric != "best@1":  # best@1 equals avg@1
            lines = {
                source: [
                    (as_float(item.get("step")), as_float(get(item["data"], source, metric))) for item in evaluations
                ]
                for source in ordered(item["data"] for item in evaluations)
            }
            charts.append(line_chart(f"Accuracy, {metric}", lines))
    return charts
