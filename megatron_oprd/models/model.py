"""mcore's GPTModel for packed micro-batches. Its output are hidden states; the LM head runs for chosen rows only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_oprd.models import micro_batch
from megatron_oprd.models.rotary import Rotary, signed
from megatron_oprd.types import FINAL_STATES


class HiddenStateModel(GPTModel):
    """A chunk of a decoder that returns hidden states. `run` runs it.

    Args:
        config: Megatron's configuration.
        block: the modules of the decoder.
        first_stage: True if the chunk has the embedding.
        last_stage: True if the chunk ends the model.
        lm_head: False builds no output layer; a teacher needs none.
        final_norm: False leaves out the final norm, for a teacher that is cut below its last layer.
        chunk: number of the chunk under virtual pipelining.
        first_layer: number of the model's layers before this chunk.
        first_expert: number of a sparse layer's experts on lower expert-parallel ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        block: TransformerBlockSubmodules,
        *,
        vocab_size: int,
        max_positions: int,
        rotary: Rotary,
        first_stage: bool,
        last_stage: bool,
        tied_embeddings: bool,
        lm_head: bool = True,
        final_norm: bool = True,
        chunk: int | None = None,
        first_layer: int = 0,
        first_expert: int = 0,
    ) -> None:
        super().__init__(
            config,
            block,
            vocab_size=vocab_size,
            max_sequence_length=max_positions,
            pre_process=first_stage,
            post_process=last_stage and lm_head,
            share_embeddings_and_output_weights=tied_embeddings and lm_head,
            # Positions start at zero in every packed sequence. `_preprocess` computes the angles once for a
            # micro-batch, and the core attention applies them.
            position_embedding_type="none",
            vp_stage=chunk,
        )
        self.rotary = rotary
        self.last_stage = last_stage
        self.first_layer = first_layer
        self.first_expert = first_expert
        if last_stage and not lm_head:
            self.decoder.post_process = True
            self.decoder.final_layernorm = (
                block.layer_norm(config, config.hidden_size, config.layernorm_epsilon) if final_norm else None
            )

    def run(self, tokens: torch.Tensor, batch: micro_batch.MicroBatch) -> torch.Tensor:
        """Run the forward pass of one packed micro-batch of `tokens` [tokens], which only the first stage needs.

        Returns: [tokens, 1, hidden], under sequence parallelism for this rank's part of the tokens. On the last stage
        with `logit_rows`: [rows, vocabulary / tensor size].
        Communicates over: the tensor-, context- and expert-parallel groups.
        """
        return self(tokens[None], batch.position_ids[None], None, packed_seq_params=batch)

    @property
    def lm_head(self) -> torch.nn.Parameter:
        """Return the LM head [vocabulary / tensor size, hidden]. Only the last stage has one."""
        tied = self.share_embeddings_and_output_weights
        weight: torch.nn.Parameter = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return weight

    def _preprocess(self, *args: Any, **kwargs: Any) -> Any:
        batch = micro_batch.of(kwargs)
        cos, sin = self.rotary(batch.position_ids, batch.lengths)
        batch.rotary = cos.to(self.config.params_dtype), signed(sin).to(self.config.params_dtype)
        if batch.taps_input and batch.tap is not None and not self.pre_process:
            # The input of this chunk is the output of the layer before it.
            self.decoder.set_input_tensor(batch.tap(self.first_layer, self.decoder.input_tensor))
        prepared = super()._preprocess(*args, **kwargs)
        if self.config.recompute_granularity == "full" and torch.is_grad_enabled() and prepared[0] is not None:
            # Under a frozen embedding the input has no gradient, and recomputation would skip backward of the layers.
            prepared[0].requires_grad_()
        return prepared

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        batch = micro_batch.of(kwargs)
        if not self.last_stage:
            # If all layers of a stage are skipped: the schedule needs an output that is not the input tensor.
            return hidden_states.clone() if hidden_states is self.decoder.input_tensor else hidden_states
        if batch.tap is not None:
            if batch.normed_layer is not None:
                hidden_states = batch.tap(batch.normed_layer, hidden_states)
            hidden_states = batch.tap(FINAL_STATES, hidden_states)
        if batch.logit_rows is None:
            return hidden_states
        logits: torch.Tensor = super()._postprocess(hidden_states[batch.logit_rows], *args, **kwargs)
        return logits[0]


class Stage(torch.nn.ModuleList):
    """The chunks of a model on this rank, lowest first: one, or several under virtual pipelining."""

    def __init__(self, chunks: Sequence[HiddenStateModel]) -> None:
        super().__init__(chunks)
        # Waits for parameters that are still being gathered; code that uses them outside a module calls it first.
        self.wait_for_parameters: Callable[[], None] = lambda: None

    @property
    def layers(self) -> list[int]:
        """Return the numbers of this rank's layers in the model, from 0."""
        return [chunk.first_layer + layer for chunk in self for layer in range(len(chunk.decoder.layers))]

    @property
    def config(self) -> TransformerConfig:
        """Return Megatron's configuration, which all chunks share."""
        config: TransformerConfig = self[0].config
        return config
