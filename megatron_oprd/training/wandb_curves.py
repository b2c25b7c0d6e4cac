"""Curves in Weights & Biases. The only file that imports the package `wandb`, which is optional."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_oprd.config import WandbConfig
from megatron_oprd.runtime.files import explain_os_errors, write_text
from megatron_oprd.runtime.readable import error_line
from megatron_oprd.types import UserError

ID_FILE = "wandb/run_id"  # in the run folder


def check_wandb(settings: WandbConfig | None) -> None:
    """Raise UserError if `logging.wandb` is set and the package or, with mode online, the key is missing."""
    if settings is None:
        return
    if importlib.util.find_spec("wandb") is None:
        raise UserError("logging.wandb needs the package wandb: pip install megatron_oprd[wandb]")
    if settings.mode == "online":
        import wandb

        if not wandb.api.api_key:
            raise UserError(
                "logging.wandb: this machine has no key of Weights & Biases; run `wandb login`, set WANDB_API_KEY, or "
                "use logging.wandb.mode=offline"
            )


class WandbCurves:
    """Draws the curves of a run folder as a run of Weights & Biases, which a resumed training continues."""

    def __init__(self, run_dir: Path, settings: WandbConfig, config: Mapping[str, Any]) -> None:
        """Prepare the run. `config`: the configuration, which the page of the run shows."""
        self._run_dir, self._settings, self._config = run_dir, settings, config
        self._run: Any = None

    def open(self, last: int) -> None:
        """Begin the run, or continue it.

        Steps after `last` that a killed process has logged stay: Weights & Biases ignores a step that it has already,
        and training repeats these steps with the same metrics.
        """
        import wandb

        try:
            self._run = wandb.init(
                project=self._settings.project,
                name=self._settings.name or self._run_dir.resolve().name,
                group=self._settings.group,
                mode=self._settings.mode,
                id=_run_id(self._run_dir),
                resume="allow",
                dir=str(self._run_dir),
                config=dict(self._config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise UserError(f"logging.wandb: {error_line(error, None)}; logging.wandb.mode=offline works") from None
        offline = self._settings.mode == "offline"
        where = f"offline; `wandb sync {Path(self._run.dir).parent}` sends it" if offline else self._run.url
        print(f"Weights & Biases: {where}", flush=True)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add a point at `step` to the curve of each metric."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send or write everything that is buffered, and end the process that wandb started."""
        self._run.finish()


def _run_id(run_dir: Path) -> str:
    """Return the id of this run folder's run; the first call makes one."""
    path = run_dir / ID_FILE
    with explain_os_errors(path):
        if path.exists():
            return path.read_text(encoding="utf-8").strip()
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, secrets.token_hex(4) + "\n")
    return _run_id(run_dir)
