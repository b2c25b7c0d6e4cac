"""What a dry run does without: weights, tokenizers, prompts and a bridge that are yet to come."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_oprd.checkpoint.megatron_format import is_megatron_checkpoint
from megatron_oprd.config import Config
from megatron_oprd.data.prompts import PromptSet
from megatron_oprd.data.tokenizer import has_tokenizer
from megatron_oprd.types import Prompt

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin")


@dataclass(frozen=True)
class MissingInputs:
    """Paths that do not exist yet, or folders that lack something, each once."""

    weights: tuple[str, ...] = ()
    tokenizers: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    bridge: str | None = None
    device: str | None = None  # what is planned for in its place

    def lines(self, config: Config) -> list[str]:
        """What is not checked for it, a line each."""
        lines = []
        if self.weights:
            lines.append(f"no weights in {', '.join(self.weights)} yet: they were not checked")
        if self.tokenizers or self.prompts:
            missing = [f"no tokenizer in {folder}" for folder in self.tokenizers] + [f"no {p}" for p in self.prompts]
            longest = f"data.max_prompt_tokens={config.data.max_prompt_tokens}"
            lines.append(f"{', '.join(missing)} yet: the longest prompt is taken to have {longest} tokens")
        if self.bridge:
            lines.append(
                f"no bridge at {self.bridge} yet: one of rank bridge.ranks[0]={config.bridge.ranks[0]} is planned"
            )
        if self.device:
            lines.append(f"no CUDA device here: precision and optimizer are planned for {self.device}")
        return lines


def find_missing(config: Config, planned_for: str | None = None) -> MissingInputs:
    """What a dry run of the configuration has to do without. Its model folders are there. `planned_for`: the device in
    the place of one that it would need."""
    folders = list(dict.fromkeys([config.student.path, *(one.path for one in config.named_teachers.values())]))
    bridge = config.loss.representation.bridge if config.loss.reads_layers else None
    generates = config.rollout.engine == "megatron"
    evaluated = config.evaluation.data if config.evaluation.every else []
    prompts = [*(config.data.prompts if generates else []), *evaluated]
    readers = folders if bridge else folders[:1]  # teachers without a tokenizer of their own read the student's ids
    return MissingInputs(
        weights=tuple(folder for folder in folders if not _has_weights(folder)),
        tokenizers=tuple(one for one in readers if not has_tokenizer(one)) if generates or evaluated else (),
        prompts=tuple(path for path in dict.fromkeys(prompts) if not Path(path).exists()),
        bridge=bridge if bridge and not Path(bridge).exists() else None,
        device=planned_for,
    )


def longest_prompts(config: Config) -> PromptSet:
    """The longest prompt that `data.max_prompt_tokens` lets through, for each teacher, in the place of all prompts."""
    ids = (0,) * config.data.max_prompt_tokens
    own = ids if config.data.own_teacher_prompts else None
    names = enumerate(config.named_teachers)
    prompts = [Prompt(number, ids, data_source=name, teacher_prompt_ids=own) for number, name in names]
    return PromptSet(prompts, total=len(prompts), too_long=0, failed=0)


def _has_weights(folder: str) -> bool:
    """Whether a folder means to hold weights, whole or not."""
    return is_megatron_checkpoint(folder) or any(any(Path(folder).glob(kind)) for kind in _WEIGHTS)
