"""Show at the top of a report what was distilled into what, in how long, what changed, and what to look at."""

from __future__ import annotations

import time
from pathlib import PurePath

from megatron_oprd.evaluation.records import as_float, curve, get
from megatron_oprd.report.charts import escape
from megatron_oprd.report.cost_section import memory
from megatron_oprd.report.page import NO_VALUE, number
from megatron_oprd.report.run_files import RunFiles
from megatron_oprd.report.tiles import Tile, tiles
from megatron_oprd.runtime.readable import count, duration

MOST_TILES = 4
STEPS_OF_SIGNS = 20  # warnings look at so many steps
MANY_CUT = 0.5  # of the answers


def headline(run: RunFiles, state: str, *, is_running: bool) -> str:
    """Return the heading of the page. `state`: the text of `run_state`."""
    word, _, more = state.partition(": ")
    models = "".join(
        f'<p class="muted">{role}: <code>{escape(run.model(role))}</code></p>'
        for role in ("student", "teacher")
        if run.model(role)
    )
    now = f"; {more}" if more and is_running else ""
    at = f"{now}; page written at {time.strftime('%Y-%m-%d %H:%M:%S')}" if is_running else ""
    hint = "If that was long ago, the run may have ended: <code>megatron-oprd status RUN</code> tells."
    warnings = "".join(f'<p class="warning">warning: {escape(text)}</p>' for text in [*run.warnings, *_signs(run)])
    css = "warning" if word in ("failed", "lost") else "muted"
    parts = [
        f"<h1>{escape(_title(run))}</h1>",
        f'<p class="state">{escape(word)}: {escape(progress(run) + at)}</p>',
        f'<p class="{css}">{escape(more)}</p>' if more and not is_running else "",
        f'<p class="muted">{hint}</p>' if is_running else "",
        f"<p>{escape('; '.join(_facts(run)))}</p>" if run.metrics else "",
        models,
        f'<div class="tiles">{"".join(map(_tile, tiles(run)[:MOST_TILES]))}</div>',
        warnings,
    ]
    return "".join(parts)


def progress(run: RunFiles) -> str:
    """Return the steps that a run has made, and the number that it shall make if that is larger."""
    if not run.metrics:
        return "no training step yet"
    planned, step = get(run.config, "train", "steps"), run.metrics[-1]["step"]
    return f"{number(step)} steps" + (f" of {planned}" if isinstance(planned, int) and step < planned else "")


def speed(run: RunFiles) -> float | None:
    """Return the response tokens per second of all steps but the first, or None if they are not known."""
    rows = [(as_float(row.get("rollout/length_mean")), as_float(row.get("time/step"))) for row in run.metrics]
    known = [(length, seconds) for length, seconds in rows[1:] or rows if length >= 0 < seconds]
    if not known or run.rollouts_per_step is None:
        return None
    return sum(length for length, _ in known) * run.rollouts_per_step / sum(seconds for _, seconds in known)


def _title(run: RunFiles) -> str:
    student, teacher = (PurePath(run.model(role)).name for role in ("student", "teacher"))
    return f"{teacher} distilled into {student}" if student and teacher else f"Run {run.name}"


def _facts(run: RunFiles) -> list[str]:
    facts = [f"{duration(run.seconds)} of training"] if run.seconds else []
    if run.rollouts_per_step:
        facts.append(f"{number(run.rollouts_per_step)} answers per step")
    rate = speed(run)
    facts += [f"{count(rate) if rate >= 10 else number(rate)} response tokens/s"] if rate else []
    peak = max((value for _, value in memory(run)), default=None)
    return [*facts, f"{number(round(peak, 2))} GB of memory at most"] if peak else facts


def _signs(run: RunFiles) -> list[str]:
    """Return warnings about what the metrics show."""
    broken = [row["step"] for row in run.metrics if "loss" in row and number(row["loss"]) == NO_VALUE]
    found = [f"the loss of {len(broken)} steps is not finite, first of step {broken[0]:g}"] if broken else []
    cut = [value for _, value in curve(run.metrics[-STEPS_OF_SIGNS:], "rollout/truncated_fraction") if value >= 0]
    share = sum(cut) / len(cut) if cut else 0.0
    if share > MANY_CUT:
        limit = get(run.config, "rollout", "max_new_tokens")
        of_limit = f" at rollout.max_new_tokens={limit}" if limit else ""
        found.append(f"{share:.0%} of the answers of the last {len(cut)} steps were cut{of_limit}")
    return found


def _tile(tile: Tile) -> str:
    note = f'<div class="note">{escape(tile.note)}</div>' if tile.note else ""
    before, after = escape(number(tile.before)), escape(number(tile.after))
    value = f'<span class="before">{before} →</span> {after}'
    name = f'<div class="name">{escape(tile.name)}</div>'
    return f'<div class="card tile">{name}<div class="value">{value}</div>{note}</div>'
