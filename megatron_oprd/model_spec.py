"""The properties of a model that its `config.json` tells: sizes, rotary embedding, kinds of layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Llama3Scaling:
    """Rotary frequencies of Llama 3.1 and later: waves longer than `original_positions / low_freq_factor` positions are
    stretched by `factor`, those shorter than `original_positions / high_freq_factor` are not, in between by a part."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class LinearScaling:
    """Rotary frequencies that are all divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class YarnScaling:
    """Rotary frequencies of YaRN (arXiv 2309.00071), as Qwen2.5 and Qwen3 set them for long contexts.

    Frequencies with more than `beta_fast` rotations in `original_positions` are kept, those with fewer than `beta_slow`
    are divided by `factor`, and a ramp over the dimensions lies between. Cosine and sine are multiplied by
    `attention_factor`. Nothing depends on the length of a sequence.
    """

    factor: float
    original_positions: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool  # whether the ramp starts and ends at whole dimensions


@dataclass(frozen=True)
class LongRope:
    """Rotary frequencies of Phi-3 and Phi-4-mini (LongRoPE, arXiv 2402.13753): each is divided by its short factor in
    sequences of up to `original_positions` tokens and by its long factor, at every position, in longer ones. Cosine and
    sine are multiplied by `attention_factor` in both.

    The length is that of the sequence alone, prompt and response, never of the micro-batch that it is packed into.
    While a sequence is generated it is the length so far: a row that outgrows `original_positions` is read again with
    the long factors, as Hugging Face's Phi-3 does.
    """

    short_factor: tuple[float, ...]  # one for each of the rotary_dim / 2 frequencies
    long_factor: tuple[float, ...]
    original_positions: int
    attention_factor: float


RopeScaling = Llama3Scaling | LinearScaling | LongRope | YarnScaling


@dataclass(frozen=True)
class DeltaNet:
    """The sizes of a model's Gated DeltaNet layers (arXiv 2412.06464).

    A key head serves several value heads, which follow each other. Keys and queries have the same heads.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int  # of a head
    value_dim: int  # of a head
    kernel: int  # tokens of the causal convolution

    @property
    def values_per_key(self) -> int:
        """Return the value heads of one key head."""
        return self.num_value_heads // self.num_key_heads

    @property
    def convolved(self) -> int:
        """Return the channels of the convolution for one key head: query, key and values."""
        return 2 * self.key_dim + self.values_per_key * self.value_dim

    @property
    def projected(self) -> int:
        """Return the outputs of the input projection for one key head: query, key, values, gates, beta and alpha."""
        return self.convolved + self.values_per_key * (self.value_dim + 2)

    @property
    def state_size(self) -> int:
        """Return the numbers in the state of one sequence in one layer."""
        return self.num_value_heads * self.key_dim * self.value_dim


@dataclass(frozen=True)
class ModelSpec:
    """The properties of a Hugging Face decoder that are needed to build it, all from its `config.json`."""

    architecture: str  # one of hf/families.py's FAMILIES
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    norm_epsilon: float
    rope_theta: float
    rotary_dim: int  # dimensions of a head that are rotated, the first ones
    max_position_embeddings: int  # of config.json, or those that YaRN reaches if these are more
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rope_scaling: RopeScaling | None = None
    num_experts: int = 0  # of each sparse layer; 0: a dense model
    experts_per_token: int = 0
    moe_ffn_hidden_size: int = 0  # of one expert
    # Width of the gated MLP that processes every token beside the experts of each sparse layer; 0: no such MLP.
    shared_ffn_hidden_size: int = 0
    norm_topk_prob: bool = False  # whether the probabilities of a token's experts are made to sum to one
    sparse_layers: tuple[int, ...] = ()  # 0-based blocks with experts in place of the dense MLP
    delta_net: DeltaNet | None = None  # None: every layer has attention
    linear_layers: tuple[int, ...] = ()  # 0-based blocks with Gated DeltaNet in place of attention
    output_gate: bool = False  # True if attention multiplies its output by the sigmoid of a gate
    zero_centered_norms: bool = False  # True if norms multiply by 1 + weight
    text_tower: bool = False  # True if the model is the text tower of a model for text and images
    # In these 0-based blocks a token attends to itself and to the `sliding_window - 1` tokens before it.
    windowed_layers: tuple[int, ...] = ()
    sliding_window: int = 0
    eos_token_ids: tuple[int, ...] = ()
    # Content of config.json without quantization_config, for the export.
    hf_config: dict[str, Any] = field(default_factory=dict, compare=False)
    # True if Hugging Face files have the experts of a layer in one tensor. The export has them in the same form.
    fused_experts: bool = field(default=False, compare=False)
