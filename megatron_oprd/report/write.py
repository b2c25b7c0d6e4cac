"""Write the report of a run, or of several runs beside each other: one self-contained HTML page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from megatron_oprd.report.analysis_section import analysis_section
from megatron_oprd.report.answers_section import answers_section, training_answers
from megatron_oprd.report.comparison import comparison_page
from megatron_oprd.report.cost_section import cost_section
from megatron_oprd.report.curves_section import curves_section
from megatron_oprd.report.headline import headline
from megatron_oprd.report.health_section import health_section
from megatron_oprd.report.layers_section import layers_section
from megatron_oprd.report.page import navigation, page
from megatron_oprd.report.run_files import read_run
from megatron_oprd.report.run_state import run_state
from megatron_oprd.report.scores_section import scores_section
from megatron_oprd.report.settings_section import settings_section
from megatron_oprd.runtime.files import write_text

RELOAD_SECONDS = 60


def write_report(run_dir: str | Path, *, is_running: bool = False) -> Path:
    """Write `report.html` into the run folder and return its path.

    The sources are `metrics.jsonl`, `evaluations.jsonl`, `evaluations/`, `teacher_answers/`, `health/`, `plan.json`,
    `environment.json`, `config.yaml` and `rollouts/`; a missing file, a broken line or a value that is not finite
    leaves a gap. Only rank 0 calls this.

    Args:
        run_dir: The run folder.
        is_running: True if the run goes on: the page then says so and loads itself again every minute.

    Raises:
        UserError: the run folder does not exist.
    """
    run = read_run(Path(run_dir))
    state = run_state(run, time.time(), runs=is_running)
    answers = answers_section(run)
    sections = {
        "Evaluation": scores_section(run),
        "Answers": answers,
        "Health": health_section(run.run_dir),
        "Curves": curves_section(run),
        "Layers": layers_section(run),
        "Analysis": analysis_section(run.run_dir),
        "Time and memory": cost_section(run),
        "Answers during training": training_answers(run, is_open=not answers),
        "Settings": settings_section(run),
    }
    body = [headline(run, state, is_running=is_running), navigation(sections), *sections.values()]
    return _write(run.run_dir / "report.html", f"Run {run.name}", "".join(body), is_running=is_running)


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write a page that shows several runs beside each other, and return its path.

    Raises:
        UserError: a run folder does not exist.
    """
    runs = [read_run(run_dir) for run_dir in run_dirs]
    return _write(path, f"Comparison of {len(runs)} runs", comparison_page(runs), is_running=False)


def _write(path: Path, title: str, body: str, *, is_running: bool) -> Path:
    text = page(title, body, RELOAD_SECONDS if is_running else None)
    write_text(path, text.encode("utf-8", "replace").decode("utf-8"))  # sampled text may contain a lone surrogate
    return path
