"""The classes from which a transformer layer is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass(frozen=True)
class ModuleSet:
    """The classes of one implementation: this package's own or Transformer Engine's."""

    norm: type
    column: type  # column-parallel linear layer (QKV, first of the MLP)
    fused_norm: bool  # True if the column-parallel linear layer contains the preceding norm (Transformer Engine)
    column_without_norm: type  # column-parallel linear layer that contains no norm (first of the shared expert)
    row: type  # row-parallel linear layer (attention output, second of the MLP)
    core_attention: type
    experts: ModuleSpec
    activation: type  # the activation of the MLP; Megatron-Core's function replaces it beside grouped experts
    checkpoint_names: Mapping[str, str] = field(default_factory=dict)  # parameter names -> names in a checkpoint
