"""A small run that generates its rollouts, without a tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megatron_oprd.data.prompts import PromptSet
from megatron_oprd.launch.inputs import Inputs
from megatron_oprd.testing.replayed_run import make_config, make_inputs
from megatron_oprd.types import Prompt


def generating_inputs(student: Path, teacher: Path, prompts: Sequence[Prompt], *overrides: str) -> Inputs:
    """Return the inputs of a run with these prompts, all of them in each step. `overrides` win."""
    settings = ("rollout.engine=megatron", "data.prompts=[unused]", f"rollout.prompts_per_step={len(prompts)}")
    config = make_config(student, teacher, *settings, *overrides)
    prompt_set = PromptSet(list(prompts), total=len(prompts), too_long=0, failed=0)
    return dataclasses.replace(make_inputs(config, []), prompts=prompt_set)
