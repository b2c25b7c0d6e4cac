"""The best checkpoint of a run by a metric of its evaluations, and the end of a run that no longer improves.

The state is part of a checkpoint, so that a resumed run judges alike. `best.json` in the run folder shows it to people,
to `status` and to the report. No communication.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from megatron_oprd.config import EvaluationConfig
from megatron_oprd.evaluation.scores import Scores, over_all_sources
from megatron_oprd.runtime.files import explain_os_errors, write_json
from megatron_oprd.training.state import BestEvaluation

LOWER_IS_BETTER = {"perplexity", "forward_kl", "reverse_kl"}


def judge(best: BestEvaluation | None, step: int, scores: Scores, config: EvaluationConfig) -> BestEvaluation | None:
    """Return the best evaluation so far, after the evaluation of a step with these scores.

    The start model does not count, because it has no checkpoint. Neither does a value that is not finite.
    """
    if config.best is None or step == 0:
        return best
    value = over_all_sources(scores).get(config.best.replace("@n", f"@{config.samples}"), math.nan)
    if math.isfinite(value) and (best is None or _is_better(value, best.value, config.best)):
        return BestEvaluation(config.best, step, value)
    return None if best is None else dataclasses.replace(best, later=best.later + 1)


def reason_to_stop(best: BestEvaluation | None, config: EvaluationConfig) -> str | None:
    """Return why `evaluation.patience` ends the run now, or None."""
    if best is None or not config.patience or best.later < config.patience:
        return None
    return (
        f"stopped early: {best.later} evaluations in a row were not better than step {best.step} ({best.metric} "
        f"{best.value:.4g}); raise evaluation.patience={config.patience} to train on"
    )


def write_best(run_dir: Path, best: BestEvaluation | None, stopped_at: int | None) -> None:
    """Write `best.json`, or remove it if there is no best evaluation. One rank calls this.

    `stopped_at`: the step at which the run ended early. Raises UserError when the disk does not accept the file.
    """
    path = run_dir / "best.json"
    if best is None:
        with explain_os_errors(path):
            path.unlink(missing_ok=True)
        return
    write_json(path, {**dataclasses.asdict(best), "checkpoint": f"checkpoints/{best.name}", "stopped_at": stopped_at})


def _is_better(value: float, than: float, metric: str) -> bool:
    return value < than if metric in LOWER_IS_BETTER else value > than
