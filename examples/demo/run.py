"""The command line of the demos: check the arguments, then run a pipeline of examples/demo or examples/real_model.

Nothing here imports torch at the top, so that a wrong key is reported at once.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_oprd.config import Config, load_config
from megatron_oprd.runtime.cli import end_loading, start_loading
from megatron_oprd.types import UserError

EXAMPLES = Path(__file__).resolve().parents[1]
SAME_ARCHITECTURE = "same_architecture"
HYBRID = "hybrid"
REAL_MODEL = "real_model"
RECIPES = {
    SAME_ARCHITECTURE: EXAMPLES / "demo.yaml",
    HYBRID: EXAMPLES / "demo_hybrid.yaml",
    "cross_architecture": EXAMPLES / "demo_cross_architecture.yaml",
    "cross_tokenizer": EXAMPLES / "demo_cross_tokenizer.yaml",
    REAL_MODEL: EXAMPLES / "demo_real_model.yaml",
}
PLACEHOLDERS = ["student.path=pair", "teacher.path=pair", "data.prompts=[pair]"]  # the demo makes these paths later


@dataclass(frozen=True)
class DemoRun:
    """The checked arguments of a demo."""

    kind: str  # a key of RECIPES
    overrides: list[str]  # key=value arguments, without demo=
    config: Config  # the recipe with the overrides; the paths of models and prompts are placeholders

    @property
    def recipe(self) -> Path:
        """Return the YAML file of the demo."""
        return RECIPES[self.kind]


def run_demo(arguments: list[str]) -> int:
    """Run the demo with overridden keys of its recipe. Collective over the world.

    `demo=KIND` selects the recipe, `train.seed` also seeds the pair. Without `train.run_dir` each run has its own
    folder below `runs/`. Raises UserError for a wrong argument before torch is imported.
    """
    run = parse_arguments(arguments)
    start_loading()
    if run.kind == REAL_MODEL:
        from examples.real_model.pipeline import run_real_model as run_pipeline
    else:
        from examples.demo.pipeline import run_pipeline
    end_loading()
    run_pipeline(run)
    return 0


def run_folder(run: DemoRun) -> Path:
    """Return the folder of a run: `train.run_dir` if that is an argument, else a new name with date and time."""
    folder = Path(run.config.train.run_dir)
    if any(override.startswith("train.run_dir=") for override in run.overrides):
        return folder
    return folder.with_name(f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")


def parse_arguments(arguments: list[str]) -> DemoRun:
    """Check the arguments of a demo. Raises UserError for an unknown kind and for a mistake in the configuration."""
    overrides = [argument for argument in arguments if not argument.startswith("demo=")]
    kinds = [argument.removeprefix("demo=") for argument in arguments if argument.startswith("demo=")]
    kind = kinds[-1] if kinds else SAME_ARCHITECTURE
    if kind not in RECIPES:
        raise UserError(f"demo={kind}: there are {', '.join(RECIPES)}")
    if any(not override or override.startswith("-") for override in overrides):
        raise UserError(f"the demo takes key=value arguments, not {overrides}; see the head of run_oprd_qwen.sh")
    return DemoRun(kind, overrides, load_config(RECIPES[kind], [*PLACEHOLDERS, *overrides]))
