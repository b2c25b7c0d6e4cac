"""Compare loss and gradients of every layout with the float64 reference in one process.

    python benchmarks/parity.py [--only SUBSTRING --json FILE --markdown FILE]
    python benchmarks/parity.py --defects     # plant mistakes and list the cells that turn red

Both write their part of parity.json and parity.md in docs/results; with --only, files are written only if they are
named. The exit code is 1 when a case exceeds the tolerance, or when the red cells of a mistake are not the predicted
ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pages import installed_versions, listed, table_lines
from tests.helpers.defects import DEFECTS
from tests.helpers.layouts import HYBRID_CASES, MATRIX, METHOD_CASES, OBJECTIVE_CASES, Case, covering
from tests.helpers.run_layouts import Outcome, References, run_cases

ROOT = Path(__file__).resolve().parents[1]
MEANING = """\
Each row is one optimizer step of a tiny random model (width 64, fp32, gloo on CPU) in one layout, beside the same step
of Hugging Face's model in one process in float64, one sequence at a time. Tolerances: 1e-6 for the loss, 1e-5 for each
parameter's gradient, both relative (norm of the difference over the norm). Made by `python benchmarks/parity.py`.

Layouts: `tp` tensor, `sp` sequence, `pp` pipeline, `vp` virtual pipeline, `cp` context, `ep` expert, `dp` data
parallel; `distopt` distributed optimizer; `selective`, `uniformN`, `block` recomputation; `teacher-...` a teacher in a
layout of its own; `middle` loss on layers 2 and 3 alone; `crossing` pairs of layers on different pipeline stages;
`4of6` a student of 4 blocks under a teacher of 6 (otherwise 5 and 5); `tied` head and embedding; `few` and `many`
rollouts (1 and 31 to learn from, otherwise 4).

Objectives on next-token distributions, beside the loss on hidden states or (`headless`) alone: `sampled`; `surrogate`,
`topk` (`tail` with the tail bucket) on the top 5 of the student, the `teacher` or the `union`; `reverse`, `forward` and
`jsd` over the whole vocabulary of 131; `chunkN` tokens at a time, `unchunked`; `warm` at other temperatures; `weighed`
2.5 with the mean over sequences; `last3` tokens of each response.

At the first step of a schedule of both losses: `scheduled` multiplies them by 0.75 and 0.25; `before-output` and
`after-layers` leave one of them out.

Between unlike models, through a bridge of rank 6: `bridge-wide` a teacher of width 96, `bridge-narrow` of 48, `bridge`
of the student's 64. Teacher bytes are then six float32 numbers a token and layer.
Through a trained map to the teacher's width: `linear-wide` a matrix to 96, `mlp-narrow` two matrices to 48;
`fitted-wide` and `fitted-narrow` a matrix that starts as a ridge regression.

`extrapolated` targets lie beyond the teacher: half of its difference to a base is added, to hidden states, to logits
(`extrapolated-output`) or to both (`extrapolated-both`). `inverse-square` divides the
loss of each layer by the teacher's mean square there. `skew` and `topk-skew` are KL divergences to a mixture of both
distributions, `adaptive` and `topk-adaptive` a mean of both KL divergences; `gated` adds the forward KL at uncertain
tokens to `sampled`, `weighed-positions` weighs it by position.

`flow` adds the loss on hidden flow at four positions of each response, `all-flow` at all of them with other shares of
its parts, `wide-flow` without directions to a teacher of width 96. With `ema` the teacher has followed the student
once.
"""
COLUMNS = (
    *("layout", "model", "ranks", "loss", "worst gradient", "in", "smallest cosine"),
    *("teacher bytes moved", "needed", "seconds"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--defects", action="store_true", help="run the covering cells under each planted mistake")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    json_file = options.json or (None if options.only else ROOT / "docs" / "results" / "parity.json")
    markdown_file = options.markdown or (None if options.only else ROOT / "docs" / "results" / "parity.md")
    everything = (
        (*covering(), *HYBRID_CASES) if options.defects else (*MATRIX, *OBJECTIVE_CASES, *METHOD_CASES, *HYBRID_CASES)
    )
    cases = [case for case in everything if options.only in case.name]
    if not cases:
        parser.error(f"no case has {options.only!r} in its name")
    versions = installed_versions()
    print(listed(versions))
    with tempfile.TemporaryDirectory() as folder:
        part, red = (run_defects if options.defects else run_matrix)(cases, Path(folder))
    record = json.loads(json_file.read_text()) if json_file and json_file.exists() else {}
    record |= {"versions": versions, **part}
    for file, text in ((json_file, json.dumps(record, indent=1) + "\n"), (markdown_file, markdown(record))):
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    return int(red)


def run_matrix(cases: Sequence[Case], folder: Path) -> tuple[dict[str, Any], bool]:
    """Run the cases and print each outcome; return their part of the record and True if a case failed."""
    begin = time.perf_counter()
    rows = []
    for outcome in run_cases(cases, References(folder / "models"), folder / "runs"):
        row = _row(outcome)
        rows.append(row)
        print(_line(row), outcome.details, flush=True)
    seconds, failed = time.perf_counter() - begin, sum(row["failure"] is not None for row in rows)
    print(f"{len(rows)} cases, {failed} failed, {seconds:.0f} s")
    return {"cases": rows, "seconds": round(seconds, 1)}, failed > 0


def run_defects(cases: Sequence[Case], folder: Path) -> tuple[dict[str, Any], bool]:
    """Run the cases under each mistake; return their part of the record and True if red cells are not the predicted."""
    references = References(folder / "models")
    rows, wrong = [], False
    for number, defect in enumerate(DEFECTS):
        outcomes = list(run_cases(cases, references, folder / f"runs-{number}", defect.install))
        row = {
            "defect": defect.name,
            "felt": sum(map(defect.felt_by, cases)),
            "red": {outcome.case.name: outcome.failure for outcome in outcomes if outcome.failure},
        }
        astray = [o.case.name for o in outcomes if (o.failure is not None) != defect.felt_by(o.case)]
        wrong |= bool(astray)
        rows.append(row)
        print(f"{defect.name}: felt by {row['felt']} of {len(cases)} cells, red: {', '.join(row['red'])}", flush=True)
        if astray:
            print(f"  not as expected: {', '.join(astray)}", flush=True)
    return {"defects": rows, "covering": [case.name for case in cases]}, wrong


def _row(outcome: Outcome) -> dict[str, Any]:
    case, found, result = outcome.case, outcome.difference, outcome.result
    words = case.name.split("-", 2)[2:]
    row: dict[str, Any] = {
        "case": case.name,
        "layout": " ".join([*words, *([f"dp{case.data_size}"] if case.data_size > 1 else [])]),
        "model": case.family,
        "ranks": case.world,
        "failure": outcome.failure,
    }
    if found is None or result is None:
        return row
    return row | {
        "loss": found.loss,
        "gradient": found.gradient,
        "parameter": found.parameter,
        "cosine": found.cosine,
        "moved_bytes": int(result.update.metrics["teacher/moved_bytes"]),
        "fewest_bytes": result.fewest_bytes,
        "seconds": round(result.seconds, 2),
    }


def _line(row: dict[str, Any]) -> str:
    if "loss" not in row:
        return f"{row['case']}: FAILED: {row['failure']}"
    return (
        f"{row['case']}: loss {row['loss']:.1e}, gradient {row['gradient']:.1e} in {row['parameter']}, "
        f"cosine 1 - {1 - row['cosine']:.0e}, {row['moved_bytes']} of {row['fewest_bytes']} bytes, "
        f"{row['seconds']:.1f} s" + (f": FAILED: {row['failure']}" if row["failure"] else "")
    )


def markdown(record: dict[str, Any]) -> str:
    """Return the page of a record."""
    lines = ["# Parity of layouts", "", listed(record["versions"]), "", MEANING]
    if "cases" in record:
        rows, failed = record["cases"], [row for row in record["cases"] if row["failure"]]
        lines += [f"{len(rows)} cases, {len(failed)} failed, {record['seconds']:.0f} seconds.", ""]
        lines += [*table_lines(COLUMNS, map(_case_cells, rows)), ""]
        lines += [f"- `{row['case']}` failed: {row['failure']}" for row in failed] + [""] * bool(failed)
    if "defects" in record:
        lines += [
            "## Mistakes put in",
            "",
            f"The {len(record['covering'])} cells that the tests run cover every feature and every pair of features.",
            "Each mistake is patched into the product; red cells are those that no longer agree with the reference.",
            "",
            *table_lines(
                ["mistake", "cells that can feel it", "red", "which"],
                [[row["defect"], row["felt"], len(row["red"]), ", ".join(row["red"])] for row in record["defects"]],
            ),
            "",
        ]
    return "\n".join(lines)


def _case_cells(row: dict[str, Any]) -> list[Any]:
    head = [row["layout"], row["model"], row["ranks"]]
    if "loss" not in row:
        return [*head, "failed"]
    cosine = f"1 - {max(1 - row['cosine'], 0):.0e}"
    errors = [f"{row['loss']:.1e}", f"{row['gradient']:.1e}", f"`{row['parameter'].removeprefix('model.')}`", cosine]
    return [*head, *errors, row["moved_bytes"], row["fewest_bytes"], row["seconds"]]


if __name__ == "__main__":
    sys.exit(main())
