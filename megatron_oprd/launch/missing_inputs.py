"""Find the inputs that a dry run does without: weights, tokenizers, prompts and a bridge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_oprd.checkpoint.format_checks import is_megatron_checkpoint
from megatron_oprd.checkpoint.megatron_lm import is_megatron_lm
from megatron_oprd.config import Config
from megatron_oprd.data.prompts import PromptSet
from megatron_oprd.data.tokenizer import has_tokenizer
from megatron_oprd.types import Prompt

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin")


@dataclass(frozen=True)
class MissingInputs:
    """The inputs that do not exist yet. Each path appears once."""

    weights: tuple[str, ...] = ()  # model folders without weights
    tokenizers: tuple[str, ...] = ()  # model folders without a tokenizer
    prompts: tuple[str, ...] = ()  # prompt files
    bridge: str | None = None
    device: str | None = None  # the device that the dry run plans for, because this machine has no GPU

    def lines(self, config: Config) -> list[str]:
        """Return one line for each kind of input that was not checked."""
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
    """Return the inputs that do not exist. The model folders exist.

    `planned_for` is the device that the dry run plans for, if this machine lacks the device that the configuration
    needs.
    """
    models = [config.student, *config.named_teachers.values()]
    folders = list(dict.fromkeys(model.path for model in models))
    model_files = list(dict.fromkeys(model.model_files for model in models))
    bases = [one.base.path for one in config.named_teachers.values() if one.base is not None and one.extrapolates]
    bridge = config.loss.representation.bridge if config.loss.reads_layers else None
    generates = config.rollout.generates
    evaluated = config.evaluation.data if config.evaluation.every else []
    prompts = [*(config.data.prompts if generates else []), *evaluated]
    # Teachers without a tokenizer of their own read the student's ids.
    readers = model_files if bridge else model_files[:1]
    return MissingInputs(
        weights=tuple(folder for folder in dict.fromkeys([*folders, *bases]) if not _has_weights(folder)),
        tokenizers=tuple(one for one in readers if not has_tokenizer(one)) if generates or evaluated else (),
        prompts=tuple(path for path in dict.fromkeys(prompts) if not Path(path).exists()),
        bridge=bridge if bridge and not Path(bridge).exists() else None,
        device=planned_for,
    )


def longest_prompts(config: Config) -> PromptSet:
    """Return one prompt of `data.max_prompt_tokens` tokens for each teacher, in place of the missing prompts."""
    ids = (0,) * config.data.max_prompt_tokens
    own = ids if config.data.own_teacher_prompts else None
    names = enumerate(config.named_teachers)
    prompts = [Prompt(number, ids, data_source=name, teacher_prompt_ids=own) for number, name in names]
    return PromptSet(prompts, total=len(prompts), too_long=0, failed=0)


def _has_weights(folder: str) -> bool:
    """Return True if a folder contains weights, complete or not."""
    if is_megatron_lm(folder) or is_megatron_checkpoint(folder):
        return True
    return any(any(Path(folder).glob(kind)) for kind in _WEIGHTS)
