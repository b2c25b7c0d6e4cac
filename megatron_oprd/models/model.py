"""mcore's GPTModel for packed micro-batches: positions come from the packing, the LM head runs only when asked for."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_oprd.models import context
from megatron_oprd.models.norm import RMSNorm


class PackedRotaryEmbedding(torch.nn.Module):
    """Rotary angles [tokens, 1, 1, d] at the positions of the micro-batch in flight, in float32.

    mcore's own table starts at zero once a micro-batch; looking positions up instead lets every packed sequence start
    at zero, and a context-parallel slice start anywhere.
    """

    def __init__(self, width: int, base: float) -> None:
        super().__init__()
        exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
        self.register_buffer("inverse_frequencies", 1.0 / (base**exponents), persistent=False)

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        return context.current().position_ids.numel()

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        positions = context.current().position_ids
        frequencies = self.inverse_frequencies.to(positions.device, torch.float32)  # bf16 angles would lose positions
        angles = torch.outer(positions.float(), frequencies)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


class HiddenStateModel(GPTModel):
    """A pipeline stage of a decoder whose hidden states are what is wanted.

    `lm_head=False` builds no output layer at all (a teacher of hidden states never needs one); `final_norm=False`
    leaves out the final norm, for a teacher cut below its top.
    """

    def __init__(
        self,
        config: TransformerConfig,
        block: TransformerBlockSubmodules,
        *,
        vocab_size: int,
        max_positions: int,
        rope_theta: float,
        first_stage: bool,
        last_stage: bool,
        tied_embeddings: bool,
        lm_head: bool = True,
        final_norm: bool = True,
    ) -> None:
        super().__init__(
            config,
            block,
            vocab_size=vocab_size,
            max_sequence_length=max_positions,
            pre_process=first_stage,
            post_process=last_stage and lm_head,
            share_embeddings_and_output_weights=tied_embeddings and lm_head,
            position_embedding_type="rope",
            rotary_base=int(rope_theta),
        )
        self.rotary_pos_emb = PackedRotaryEmbedding(config.kv_channels, rope_theta)
        self.last_stage = last_stage
        if last_stage and not lm_head:
            self.decoder.post_process = True
            self.decoder.final_layernorm = (
                RMSNorm(config, config.hidden_size, config.layernorm_epsilon) if final_norm else None
            )

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        micro_batch = context.current()
        if not self.last_stage:
            return hidden_states
        if micro_batch.tap is not None and micro_batch.normed_layer is not None:
            hidden_states = micro_batch.tap(micro_batch.normed_layer, hidden_states)
        if not micro_batch.logits:
            return hidden_states
        return super()._postprocess(hidden_states, *args, **kwargs)
