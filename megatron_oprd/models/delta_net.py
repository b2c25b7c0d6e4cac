"""Gated DeltaNet, the layer that stands in place of attention in most blocks of Qwen3-Next and Qwen3.5."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default

from megatron_oprd.model_spec import DeltaNet
from megatron_oprd.models import micro_batch
from megatron_oprd.models.delta_rule import ChunkPlan, causal_convolution, gated_delta_rule, plan_chunks
from megatron_oprd.models.micro_batch import ContextPart


@dataclass(frozen=True)
class DeltaNetSubmodules:
    """The classes of the two linear layers."""

    in_proj: type  # column-parallel
    out_proj: type  # row-parallel


class GatedDeltaNet(MegatronModule):
    """Computes the gated delta rule inside each sequence of a micro-batch (equations in `delta_rule.py`).

    Query, key and values pass a causal convolution and SiLU. A norm without centring, multiplied by SiLU of the gate,
    follows the rule. State and convolution start anew in every sequence.

    The rows of `in_proj` are ordered by key head: query, key, values, gates, beta and alpha of a head. A rank of the
    tensor-parallel group has consecutive key heads. Under sequence parallelism `in_proj` gathers the tokens and
    `out_proj` divides them again.

    The state passes from token to token, so a context-parallel rank gathers the inputs of the convolution, decay and
    beta, computes the rule for complete sequences and keeps the outputs of its own rows. Backward sums the gradients of
    the gathered rows. Context parallelism therefore divides everything but the rule.

    Communicates over: the tensor-parallel group, and the context-parallel group if there is one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: DeltaNetSubmodules,
        layer_number: int,
        sizes: DeltaNet,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.layer_number, self.sizes, self.tensor_group = layer_number, sizes, pg_collection.tp
        self.key_heads = sizes.num_key_heads // self.tensor_group.size()
        value_heads = self.key_heads * sizes.values_per_key
        shared = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tensor_group}
        self.in_proj = build_module(
            submodules.in_proj,
            config.hidden_size,
            sizes.num_key_heads * sizes.projected,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="qkv",
            **shared,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            sizes.num_value_heads * sizes.value_dim,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="proj",
            **shared,
        )

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.ones(*shape, dtype=config.params_dtype))

        self.conv_weight = parameter(self.key_heads * sizes.convolved, 1, sizes.kernel)
        self.A_log, self.dt_bias = parameter(value_heads), parameter(value_heads)
        self.norm_weight = parameter(sizes.value_dim)
        # True: backward computes all between the two linear layers again.
        self.checkpoint_core_attention = config.recompute_granularity == "selective"

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> tuple[Any, None]:
        """Return [tokens, 1, hidden] from [tokens, 1, hidden], and no bias."""
        batch = micro_batch.of(kwargs)
        projected = self.in_proj(hidden_states)[0].squeeze(1)
        if batch.chunks is None:
            batch.chunks = plan_chunks(batch.bounds, projected.device)
        if self.training and self.checkpoint_core_attention:
            chunks, context = batch.chunks, batch.context
            mixed = tensor_parallel.checkpoint(lambda states: self._mix(states, chunks, context), False, projected)
        else:
            mixed = self._mix(projected, batch.chunks, batch.context)
        return self.out_proj(mixed[:, None])[0], None

    def _mix(self, projected: torch.Tensor, chunks: ChunkPlan, context: ContextPart | None) -> torch.Tensor:
        if context is None:
            return self.mix(
                projected,
                lambda inputs, weight: causal_convolution(inputs, weight, chunks),
                lambda *arguments: gated_delta_rule(*arguments, chunks)[0],
            )

        def gather(rows: torch.Tensor) -> torch.Tensor:
            return gather_from_sequence_parallel_region(rows, group=context.group)[context.order]

        def own_outputs(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor
        ) -> torch.Tensor:
            outputs, _ = gated_delta_rule(query, key, value, gather(decay), gather(beta), chunks)
            return outputs[context.order.argsort().chunk(context.size)[context.rank]]

        return self.mix(
            projected, lambda inputs, weight: causal_convolution(gather(inputs), weight, chunks), own_outputs
        )

    def mix(
        self,
        projected: torch.Tensor,
        convolve: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        rule: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """Compute all between the two linear layers, [tokens, value heads * value_dim] of this rank.

        Args:
            projected: outputs [tokens, n] of `in_proj`.
            convolve: the convolution of inputs [tokens, channels] with `conv_weight`; it may return more rows.
            rule: the delta rule of query, key, values, decay and beta, as `gated_delta_rule` takes them. The first
                three have the rows that `convolve` returns; decay, beta and the result have those of `projected`.
        """
        mixed, gate, beta, alpha = self.split(projected)
        mixed = torch.nn.functional.silu(convolve(mixed, self.conv_weight))
        outputs = rule(*self.heads(mixed), self.decay(alpha), beta.sigmoid())
        return self.gated_norm(outputs, gate)

    def split(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split the outputs [tokens, n] of `in_proj`.

        Returns: query, key and values of each key head [tokens, channels] for the convolution; gates [tokens, value
        heads, value_dim]; beta and alpha before their functions [tokens, value heads].
        """
        sizes = self.sizes
        gates, each = sizes.values_per_key * sizes.value_dim, sizes.values_per_key
        mixed, gate, beta, alpha = projected.unflatten(1, (self.key_heads, sizes.projected)).split(
            (sizes.convolved, gates, each, each), dim=-1
        )
        return mixed.flatten(1), gate.reshape(len(projected), -1, sizes.value_dim), beta.flatten(1), alpha.flatten(1)

    def heads(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return query and key [tokens, key heads, key_dim] and values [tokens, value heads, value_dim]."""
        sizes = self.sizes
        query, key, value = mixed.unflatten(1, (self.key_heads, sizes.convolved)).split(
            (sizes.key_dim, sizes.key_dim, sizes.values_per_key * sizes.value_dim), dim=-1
        )
        return query, key, value.reshape(len(mixed), -1, sizes.value_dim)

    def decay(self, alpha: torch.Tensor) -> torch.Tensor:
        """Return the decay g [tokens, value heads] in float32."""
        return -self.A_log.float().exp() * torch.nn.functional.softplus(alpha.float() + self.dt_bias)

    def gated_norm(self, outputs: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Return the norm of outputs [tokens, value heads, value_dim] times SiLU of the gate, with heads flattened.

        Values are rounded where transformers rounds them. The gradient of the weight, which all ranks have but apply
        to their own heads, is summed over the tensor-parallel group.
        """
        weight = copy_to_tensor_model_parallel_region(self.norm_weight, group=self.tensor_group)
        width, epsilon = outputs.shape[-1:], self.config.layernorm_epsilon
        normed = torch.nn.functional.rms_norm(outputs.float(), width, None, epsilon).to(outputs.dtype)
        return (weight * normed * torch.nn.functional.silu(gate.float())).to(outputs.dtype).flatten(1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return the sharded state dict of Megatron-Core: parameters are divided along their first dimension."""
        assert metadata is not None
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        result: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            dict.fromkeys(("conv_weight", "A_log", "dt_bias"), 0),
            sharded_offsets,
            tp_group=self.tensor_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name in ("in_proj", "out_proj"):
            module = getattr(self, name)
            result |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tensor_group
            )
        return result
