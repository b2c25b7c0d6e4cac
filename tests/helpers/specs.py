"""Model specs without a Hugging Face config, and topologies without processes."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.parallel.topology import Topology

TINY: dict[str, Any] = {
    "architecture": "Qwen3ForCausalLM",
    "num_layers": 8,
    "hidden_size": 64,
    "ffn_hidden_size": 112,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "head_dim": 24,
    "vocab_size": 131,
    "norm_epsilon": 1e-6,
    "rope_theta": 1e6,
    "rotary_dim": 24,
    "max_position_embeddings": 128,
    "tied_embeddings": False,
    "qkv_bias": False,
    "qk_norm": True,
}


def tiny_spec(**fields: Any) -> ModelSpec:
    """Return the spec of a tiny dense Qwen3, with other fields by name."""
    return ModelSpec(**{**TINY, **fields})


def ranks(data: int, context: int, sequence: int) -> Iterator[Topology]:
    """Return the topology of every rank of a layout, without process groups: packing needs none."""
    sizes = dict(pipeline_size=1, pipeline_rank=0, expert_size=1, expert_rank=0, virtual_size=1)
    sizes |= dict(tensor_size=sequence, context_size=context, data_size=data, sequence_parallel=sequence > 1)
    for d, c, s in itertools.product(range(data), range(context), range(sequence)):
        place = dict(data_rank=d, context_rank=c, tensor_rank=s, rank=0, world_size=data * context * sequence)
        yield Topology(**sizes, **place, device=torch.device("cpu"), groups=None, megatron_state={})
