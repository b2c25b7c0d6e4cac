"""Print where a run stands, from the files of its folder. The run may be going on, on this machine or on another."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_oprd.config.yaml_core import load_yaml
from megatron_oprd.evaluation.records import by_step, get, read_jsonl, read_text
from megatron_oprd.runtime.cli import ArgumentParser, run_command
from megatron_oprd.types import UserError

PARSER = ArgumentParser(prog="megatron-oprd status", description="Print where a run stands.")
PARSER.add_argument("run", metavar="RUN", help="the run folder (train.run_dir)")
SHOWN = ("loss", "rep/cosine", "output/reverse_kl", "lr")


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Raises UserError if the folder does not exist."""
    run_dir = Path(PARSER.parse_args(arguments).run)
    if not run_dir.is_dir():
        raise UserError(f"no run folder {run_dir}")
    print("\n".join(status_lines(run_dir)))
    return 0


def status_lines(run_dir: Path) -> list[str]:
    """Return one line for each part of a run's state: steps, the last metrics, the checkpoint, heartbeats, export."""
    metrics = by_step(read_jsonl(run_dir / "metrics.jsonl"))
    planned = get(load_yaml(read_text(run_dir / "config.yaml")), "train", "steps")
    step = metrics[-1]["step"] if metrics else 0
    lines = [f"step       {step}/{planned}" if planned else f"step       {step}"]
    if metrics:
        values = (f"{key} {metrics[-1][key]:.4g}" for key in SHOWN if isinstance(metrics[-1].get(key), int | float))
        lines.append(f"metrics    {', '.join(values)}")
    checkpoints = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*") if (path / "complete").exists())
    lines.append(f"checkpoint {checkpoints[-1] if checkpoints else 'none'}")
    beats = [beat for file in sorted((run_dir / "heartbeats").glob("rank_*.json")) for beat in read_jsonl(file)]
    if beats:
        oldest = min(beats, key=lambda beat: beat.get("time", 0.0))
        age = time.time() - oldest.get("time", 0.0)
        lines.append(
            f"processes  {len(beats)}, the last heartbeat of rank {oldest.get('rank')} is {age:.0f} s old, in stage "
            f"{oldest.get('stage')}"
        )
    else:
        lines.append("processes  none")
    if (run_dir / "hf").is_dir():
        lines.append(f"exported   {run_dir / 'hf'}")
    return lines


if __name__ == "__main__":
    run_command(main)
