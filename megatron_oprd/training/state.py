"""Where a run stands. Everything random in a run is a function of the seed and of these numbers: no generator's state
has to be kept (rollouts draw from seed, step, prompt and sample; prompts are ordered by seed and epoch)."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_oprd.data.prompts import PromptState


@dataclass(frozen=True)
class TrainState:
    """`step` updates have been made and the prompts taken up to `prompts`."""

    step: int = 0
    prompts: PromptState = field(default_factory=PromptState)


@dataclass(frozen=True)
class Identity:
    """What must be the same for a run to go on: a teacher's weights, the map of layers to it, the bridge between."""

    path: str
    hash: str
    pairs: tuple[tuple[int, int], ...]
    bridge: str | None = None  # what identifies it


def due(step: int, every: int, steps: int) -> bool:
    """Whether something that happens every `every` steps, and at the end, happens after this one (0: never)."""
    return every > 0 and (step % every == 0 or step == steps)
