"""The classes that a model is built of, by their place in a transformer layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass(frozen=True)
class ModuleSet:
    """The classes of one implementation: our own, or Transformer Engine's."""

    norm: type
    column: type  # a linear layer that is cut by its outputs, after a norm
    fused_norm: bool  # True if the column-parallel linear layer contains the preceding norm (Transformer Engine)
    row: type  # one that is cut by its inputs
    core_attention: type
    experts: ModuleSpec
    checkpoint_names: Mapping[str, str] = field(default_factory=dict)  # its names -> those in a checkpoint
