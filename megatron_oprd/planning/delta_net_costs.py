"""Operations and bytes of Gated DeltaNet in plain torch, between its two linear layers. All functions are pure.

The rule runs in chunks of C tokens (`models/delta_rule.py`). Symbols: k and v are the widths of a key and a value,
H the value heads, G the key heads.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_oprd.model_spec import DeltaNet, ModelSpec
from megatron_oprd.models.delta_rule import CHUNK

# Bytes that torch's calls read and write for each stored byte, counted from the operands of every call in updates with
# heads of 128 numbers.
MOVED_FORWARD, MOVED_BACKWARD = 4.6, 8.4


def linear_layers_below(spec: ModelSpec, layers: int) -> int:
    """Return the number of layers with Gated DeltaNet among the lowest `layers`."""
    return sum(layer < layers for layer in spec.linear_layers)


def rule_flops(sizes: DeltaNet, lengths: Sequence[int]) -> int:
    """Return the operations of convolution and delta rule in the forward pass.

    For each value head and token of a chunk these are 4 C k + 2 C v for products inside the chunk, C (k + v) for the
    triangular system and 6 k v for the state. The last chunk of a sequence is filled up.

    Args:
        sizes: The sizes of the layer.
        lengths: Tokens of each sequence.
    """
    key, value = sizes.key_dim, sizes.value_dim
    per_head = CHUNK * (5 * key + 3 * value) + 6 * key * value
    convolution = 2 * sizes.kernel * sizes.num_key_heads * sizes.convolved
    chunk_tokens = sum(-(-length // CHUNK) * CHUNK for length in lengths)
    return chunk_tokens * sizes.num_value_heads * per_head + sum(lengths) * convolution


def stored_bytes(sizes: DeltaNet) -> float:
    """Return the bytes per token that are stored for the backward pass: 20 G k + H (50 k + 40 v + 22 C + 5 k v / C).

    Nearly all of it is float32, whatever the dtype of the model. `tests/unit/test_memory_formulas.py` compares it with
    traced updates.
    """
    key, value = sizes.key_dim, sizes.value_dim
    per_head = 50 * key + 40 * value + 22 * CHUNK + 5 * key * value / CHUNK
    return 20 * sizes.num_key_heads * key + sizes.num_value_heads * per_head


def moved_bytes(spec: ModelSpec, layers: int, tokens: int, per_stored_byte: float) -> float:
    """Return the bytes that a pass through the lowest `layers` layers reads and writes for the delta rule.

    Args:
        spec: The model.
        layers: Its lowest layers that run.
        tokens: The tokens.
        per_stored_byte: `MOVED_FORWARD` or `MOVED_BACKWARD`.
    """
    if spec.delta_net is None:
        return 0.0
    return linear_layers_below(spec, layers) * tokens * per_stored_byte * stored_bytes(spec.delta_net)


def gathered_bytes(sizes: DeltaNet, bytes_per_number: int) -> int:
    """Return the bytes per token of the numbers that context-parallel ranks gather; the decay is float32."""
    return sizes.num_key_heads * sizes.convolved * bytes_per_number + sizes.num_value_heads * (4 + bytes_per_number)
