"""The log of a run: metrics as JSON lines and tensorboard curves, evaluations, health checks and some rollouts.

`health/observers.py` opens the log and writes steps and evaluations; `health/watch.py` writes checks and warnings.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_oprd.runtime.files import explain_os_errors, write_text
from megatron_oprd.types import Rollout


class RunLog:
    """Appends to the files of a run folder. One rank calls the methods. Each raises UserError for a disk error."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._board: Any = None

    def open(self, start: int) -> None:
        """Open the files and remove the lines of steps after `start`, which a killed process left behind."""
        from torch.utils.tensorboard import SummaryWriter

        run_dir = self.run_dir
        with explain_os_errors(run_dir):
            (run_dir / "rollouts").mkdir(parents=True, exist_ok=True)
            for folder in (".", "rollouts", "evaluations", "health"):
                for unfinished in (run_dir / folder).glob("*.tmp"):
                    unfinished.unlink()
            last = start if start else -1  # a new run logs an evaluation at step 0
            for name in ("metrics.jsonl", "evaluations.jsonl"):
                _keep_up_to(run_dir / name, last)
            for name in ("checks.jsonl", "warnings.jsonl"):
                if (run_dir / "health" / name).exists():
                    _keep_up_to(run_dir / "health" / name, last)
            threading.excepthook = _ignore_tensorboard_errors
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=last + 1)

    def step(self, values: dict[str, float]) -> None:
        """Append a line with `step` and every metric to `metrics.jsonl`, and draw the metrics as curves."""
        self._append("metrics.jsonl", values)
        print(f"step {values['step']}: {', '.join(_summary(values))}", flush=True)
        self._curves({name: value for name, value in values.items() if name != "step"}, int(values["step"]))

    def evaluation(self, step: int, name: str, data: dict[str, dict[str, float]]) -> None:
        """Append a line with the metrics of every data source to `evaluations.jsonl`."""
        self._append("evaluations.jsonl", {"step": step, "name": name, "data": data})
        for source, metrics in data.items():
            print(f"{name}, {source}: " + ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()), flush=True)
        for source, metrics in data.items():
            self._curves({f"evaluation/{source}/{metric}": value for metric, value in metrics.items()}, step)

    def check(self, values: dict[str, Any], curves: dict[str, float]) -> None:
        """Append a line to `health/checks.jsonl`, and draw `curves` at its step."""
        self._append("health/checks.jsonl", values)
        self._curves(curves, int(values["step"]))

    def warning(self, values: dict[str, Any]) -> None:
        """Append a line to `health/warnings.jsonl` and print its `message`."""
        self._append("health/warnings.jsonl", values)
        print(f"warning: {values['message']}", flush=True)

    def rollouts(self, step: int, rollouts: Sequence[Rollout], tokenizer: Any, most: int = 8) -> None:
        """Write the first `most` rollouts of a step to `rollouts/`, as text or, without a tokenizer, as token ids."""
        decode = tokenizer.decode if tokenizer is not None else (lambda ids: " ".join(map(str, ids)))
        lines = [
            json.dumps(
                {
                    "step": step,
                    "prompt": decode(list(rollout.prompt_ids)),
                    "response": decode(list(rollout.response_ids)),
                    "prompt_index": rollout.prompt_index,
                    "sample_index": rollout.sample_index,
                    "finish_reason": rollout.finish_reason,
                },
                ensure_ascii=False,
            )
            for rollout in rollouts[:most]
        ]
        write_text(self.run_dir / "rollouts" / f"step_{step:07d}.jsonl", "\n".join(lines) + "\n")

    def close(self) -> None:
        """Write everything that tensorboard has buffered."""
        with explain_os_errors(self.run_dir / "tensorboard"):
            self._board.close()

    def _curves(self, values: dict[str, float], step: int) -> None:
        with explain_os_errors(self.run_dir / "tensorboard"):
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()  # a process killed later resumes after this step and will not draw it again

    def _append(self, name: str, values: dict[str, Any]) -> None:
        with explain_os_errors(self.run_dir / name), (self.run_dir / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def _ignore_tensorboard_errors(args: threading.ExceptHookArgs) -> None:
    """Print no traceback when tensorboard's thread meets a full disk: its next call raises the error."""
    if not (type(args.thread).__module__.startswith("tensorboard.") and isinstance(args.exc_value, OSError)):
        threading.__excepthook__(args)


def _summary(values: dict[str, float]) -> Iterator[str]:
    """Yield the parts of a step's line on the terminal, for the metrics that exist."""
    for name, text in (
        ("loss", "loss {:.4g}"),
        ("rep/cosine", "cosine {:.4f}"),
        ("output/reverse_kl", "KL {:.4g}"),
        ("grad_norm", "gradient norm {:.3g}"),
        ("rollout/length_mean", "length {:.1f}"),
        ("time/step", "{:.2f} s"),
    ):
        if name in values:
            yield text.format(values[name])


def _keep_up_to(path: Path, step: int) -> None:
    """Remove the lines of steps after `step`, and lines that are incomplete."""
    if not path.exists():
        path.touch()
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            continue
    write_text(path, "".join(f"{line}\n" for line in kept))
