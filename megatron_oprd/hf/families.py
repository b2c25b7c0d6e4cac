"""The families of models that this package supports, and what their `config.json` does not say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SHARED_EXPERT = "shared_expert_intermediate_size"


@dataclass(frozen=True)
class Family:
    """Properties of an architecture that are not in its `config.json`."""

    model_type: str  # by which transformers chooses the architecture
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: bool = False  # True for a mixture of experts
    shared_expert: bool = False  # True if layers with experts also have a gated expert that processes every token
    rope_types: tuple[str, ...] = ()  # supported types of rope scaling
    partial_rotary: bool = False  # True if partial_rotary_factor below 1 is supported
    hybrid: bool = False  # True if some layers have Gated DeltaNet in place of attention
    config_class: str = ""  # of transformers, if its name is not that of the architecture
    text_config: bool = False  # True if the text model is described in `text_config`
    always_slides: bool = False  # True if `sliding_window` holds for every layer, without `use_sliding_window`
    layer_types: bool = False  # True if some layers may have a sliding window


_SCALED = ("linear", "yarn")
_QWEN3_5: dict[str, Any] = {"qk_norm": True, "partial_rotary": True, "hybrid": True}
_QWEN3_5_MOE: dict[str, Any] = {**_QWEN3_5, "experts": True, "shared_expert": True}
FAMILIES = {
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, rope_types=_SCALED, layer_types=True),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, rope_types=_SCALED, layer_types=True),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", qk_norm=True, experts=True, rope_types=_SCALED),
    "Qwen2MoeForCausalLM": Family("qwen2_moe", qkv_bias=True, experts=True, shared_expert=True, rope_types=_SCALED),
    "LlamaForCausalLM": Family("llama", rope_types=("llama3", *_SCALED)),
    "MistralForCausalLM": Family("mistral", rope_types=_SCALED, always_slides=True),
    "Phi3ForCausalLM": Family("phi3", rope_types=("longrope",), partial_rotary=True, always_slides=True),
    "Qwen3_5ForCausalLM": Family("qwen3_5_text", config_class="Qwen3_5TextConfig", **_QWEN3_5),
    "Qwen3_5ForConditionalGeneration": Family(
        "qwen3_5", config_class="Qwen3_5TextConfig", text_config=True, **_QWEN3_5
    ),
    "Qwen3_5MoeForCausalLM": Family("qwen3_5_moe_text", config_class="Qwen3_5MoeTextConfig", **_QWEN3_5_MOE),
    "Qwen3_5MoeForConditionalGeneration": Family(
        "qwen3_5_moe", config_class="Qwen3_5MoeTextConfig", text_config=True, **_QWEN3_5_MOE
    ),
    "Qwen3NextForCausalLM": Family("qwen3_next", **_QWEN3_5_MOE),
}
