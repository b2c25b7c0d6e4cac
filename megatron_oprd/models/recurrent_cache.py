"""The state of Gated DeltaNet layers in generation, which stands in place of keys and values.

The two classes that run a layer take it with the outputs [tokens, n] of its input projection. They return [tokens,
value heads * value_dim].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_oprd.model_spec import DeltaNet
from megatron_oprd.models.delta_net import GatedDeltaNet
from megatron_oprd.models.delta_rule import causal_convolution, delta_rule_step, gated_delta_rule, plan_chunks
from megatron_oprd.models.kv_cache import state_dtype
from megatron_oprd.parallel.topology import Topology


class RecurrentCache:
    """States and last tokens of some layers. The memory is allocated once and neither grows nor moves.

    `states` [layers, slots, value heads, key_dim, value_dim] in float32 at least: the matrix S of `delta_rule.py`.
    `tails` [layers, slots, kernel - 1, channels]: the inputs of the convolution for the last tokens, oldest first,
    zeros before the first token. Heads are divided over the tensor-parallel group. No communication.

    Args:
        layers: the layers with Gated DeltaNet, by their numbers in the model.
        dtype: dtype of the model.
    """

    def __init__(
        self, sizes: DeltaNet, topology: Topology, layers: Sequence[int], slots: int, dtype: torch.dtype
    ) -> None:
        key_heads, device = sizes.num_key_heads // topology.tensor_size, topology.device
        heads, channels = key_heads * sizes.values_per_key, key_heads * sizes.convolved
        shape = (len(layers), slots, heads, sizes.key_dim, sizes.value_dim)
        self.states = torch.zeros(shape, dtype=state_dtype(dtype), device=device)
        self.tails = torch.zeros(len(layers), slots, sizes.kernel - 1, channels, dtype=dtype, device=device)
        self.numbers = {layer: number for number, layer in enumerate(layers)}

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all states and tails."""
        return sum(stored.numel() * stored.element_size() for stored in (self.states, self.tails))

    def of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the states and tails of a layer, both [slots, ...]."""
        number = self.numbers[layer]
        return self.states[number], self.tails[number]

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy slots `sources` to slots `targets`, both [n] int64 and disjoint."""
        for stored in (self.states, self.tails):
            stored[:, targets] = stored[:, sources]


class DecodeDeltaNet:
    """Runs a layer on one new token for each row, and changes the states of the rows' slots.

    A row that ended, or a slot without a row, changes its own state alone. A CUDA graph can capture it. No
    communication.

    Args:
        rows: the rows, whose numbers are those of their slots.
    """

    def __init__(self, cache: RecurrentCache, rows: range) -> None:
        self.cache, self.rows = cache, rows

    def __call__(self, layer: int, module: GatedDeltaNet, projected: torch.Tensor) -> torch.Tensor:
        """Run `module`, layer number `layer` of the model."""
        states, tails = (stored.narrow(0, self.rows.start, len(self.rows)) for stored in self.cache.of(layer))

        def convolve(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            tokens = torch.cat((tails, inputs[:, None]), dim=1)  # [rows, kernel, channels]
            tails.copy_(tokens[:, 1:])
            # The sum is rounded once, as a convolution rounds it.
            return (tokens.to(states.dtype) * weight[:, 0].t()).sum(dim=1).to(inputs.dtype)

        return module.mix(projected, convolve, lambda *arguments: delta_rule_step(*arguments, states))


class PromptDeltaNet:
    """Runs a layer on some packed sequences, each of which starts from a state of zero.

    The states after their last tokens are stored in all slots of their samples. No communication.

    Args:
        bounds: [sequences + 1] cumulative lengths of the sequences.
        slots: the slots of each sequence; none stores nothing.
    """

    def __init__(self, cache: RecurrentCache, bounds: Sequence[int], slots: Sequence[Sequence[int]]) -> None:
        self.cache = cache
        device, tail = cache.states.device, cache.tails.shape[2]
        self.chunks = plan_chunks(bounds, device)
        copies = [(sequence, slot) for sequence, samples in enumerate(slots) for slot in samples]
        indices = torch.tensor(copies, dtype=torch.int64).view(-1, 2).to(device)
        self.sequences, self.slots = indices.unbind(1)
        # The tokens whose inputs are kept, [sequences, kernel - 1]. Places before a sequence have the number of tokens.
        ends = torch.tensor(bounds[1:])[:, None]
        starts = torch.tensor(bounds[:-1])[:, None]
        last = ends - torch.arange(tail, 0, -1)
        self.last_tokens = last.masked_fill(last < starts, bounds[-1]).to(device)

    def __call__(self, layer: int, module: GatedDeltaNet, projected: torch.Tensor) -> torch.Tensor:
        """Run `module`, layer number `layer` of the model."""
        states, tails = self.cache.of(layer)

        def convolve(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            before = torch.cat((inputs, inputs.new_zeros(1, inputs.shape[1])))
            tails.index_copy_(0, self.slots, before[self.last_tokens[self.sequences]])
            return causal_convolution(inputs, weight, self.chunks)

        def rule(*arguments: torch.Tensor) -> torch.Tensor:
            outputs, last_states = gated_delta_rule(*arguments, self.chunks)
            states.index_copy_(0, self.slots, last_states[self.sequences])
            return outputs

        return module.mix(projected, convolve, rule)
