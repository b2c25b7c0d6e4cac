"""The command line of the demo: check the arguments, then run examples/demo/pipeline.py.

Nothing here imports torch at the top, so that a wrong key is reported at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_oprd.config import Config, load_config
from megatron_oprd.runtime.cli import start_loading
from megatron_oprd.types import UserError

EXAMPLES = Path(__file__).resolve().parents[1]
SAME_ARCHITECTURE = "same_architecture"
RECIPES = {
    SAME_ARCHITECTURE: EXAMPLES / "demo.yaml",
    "cross_architecture": EXAMPLES / "demo_cross_architecture.yaml",
    "cross_tokenizer": EXAMPLES / "demo_cross_tokenizer.yaml",
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
    from examples.demo.pipeline import run_pipeline

    run_pipeline(run)
    return 0


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
