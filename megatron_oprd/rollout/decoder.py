"""The forward passes of generation on one rank: decode steps of fixed shape, and passes over prompts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.cached_attention import DecodeAttention, PromptAttention
from megatron_oprd.models.flash import flash_attention_works
from megatron_oprd.models.generation import GenerationChunk, GenerationPass
from megatron_oprd.models.kv_cache import KeyValueCache
from megatron_oprd.models.model import Stage
from megatron_oprd.models.pipeline import gather_vocabulary, relay
from megatron_oprd.models.recurrent_cache import DecodeDeltaNet, PromptDeltaNet, RecurrentCache
from megatron_oprd.models.rotary import RotaryTable
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.rollout.engine import Sampling
from megatron_oprd.rollout.graphs import Graphs
from megatron_oprd.rollout.sampling import sample, token_logprobs
from megatron_oprd.rollout.slots import Slots

ROW_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # rows of a captured decode step
LENGTH_SIZE = 512  # without flash attention, a captured step attends to a multiple of so many positions


class Decoder:
    """Runs the student on prompts and on single tokens, samples, and keeps the state of all rows on the device.

    `decode` reads nothing back. On a GPU a step is one CUDA graph for each number of rows in `ROW_SIZES`; under
    pipeline parallelism one for each chunk and group of rows, with the messages between them. Layers with experts are
    not captured: the host reads the number of tokens for each expert.

    Args:
        slots: the rows.
        length: tokens of the longest row that can come.
        vocab_size: only token ids below it are sampled.
    """

    def __init__(
        self,
        stage: Stage,
        spec: ModelSpec,
        topology: Topology,
        sampling: Sampling,
        slots: Slots,
        length: int,
        vocab_size: int,
    ) -> None:
        self.config, self.topology, self.sampling = stage.config, topology, sampling
        self.slots, self.vocab_size = slots, vocab_size
        self.chunks = [GenerationChunk(chunk, topology) for chunk in stage]
        device, dtype = topology.device, stage.config.params_dtype
        layers = {number: layer for chunk in self.chunks for number, layer in chunk.layers.items()}
        windows = {number: layer.window for number, layer in layers.items() if layer.delta_net is None}
        flash = flash_attention_works(device, dtype, spec.head_dim) and not any(windows.values())
        self.cache = KeyValueCache(spec, topology, windows, slots.size, length, dtype, token_major=flash)
        self.recurrent = None
        if spec.delta_net is not None:
            linear = [number for number in layers if number not in windows]
            self.recurrent = RecurrentCache(spec.delta_net, topology, linear, slots.size, dtype)
        self.rotation = RotaryTable(stage[0].rotary, self.cache.capacity, dtype, device)
        self.graphs = Graphs(enabled=device.type == "cuda" and not spec.num_experts)
        # What the captured parts of a step leave for each other: their addresses must not change.
        self.hidden = torch.zeros(len(self.chunks), slots.size, self.config.hidden_size, dtype=dtype, device=device)
        self.sampled = torch.zeros(slots.size, 2, dtype=torch.float64, device=device)  # token id, log-probability
        # Groups of rows whose tokens are not appended yet, and on the last pipeline stage the message with the tokens.
        self.unsent: dict[range, dist.Work | None] = {}

    def decode(self) -> None:
        """Add one token to every row, reading nothing back from the device.

        Under pipeline parallelism the rows form a group for each stage, and the stages work on different groups at the
        same time. The tokens of a group reach the other stages when its next step begins, or with `finish`.

        Communicates over: the tensor- and the pipeline-parallel group, and the groups of the experts.
        """
        rows, longest = self._shape()
        for group in self._groups(rows):
            self._receive(group)
            self._decode_group(group, longest)
        self.slots.steps += 1

    def finish(self) -> None:
        """Complete the last step: after it, all ranks have the state of all rows."""
        for group in list(self.unsent):
            self._receive(group)

    def _decode_group(self, group: range, longest: int) -> None:
        """Run a decode step of a group of rows. On the last pipeline stage, start sending its tokens."""

        def run(chunk: int, inputs: torch.Tensor | None) -> torch.Tensor | None:
            """Run a chunk on the tokens of the group; after the last one, sample."""
            hidden = self.hidden.select(0, chunk).narrow(0, group.start, len(group))
            if inputs is not None:
                hidden.copy_(inputs)
            self.graphs.run((chunk, group, longest), lambda: self._decode_chunk(chunk, group, longest))
            return None if self.chunks[chunk].last_stage else hidden

        relay(self.topology, (len(group), self.config.hidden_size), self.config.params_dtype, run)
        if self.topology.pipeline_size > 1:
            # The last stage goes on with the next group. The others take part when they need the tokens.
            last = self.chunks[-1].last_stage
            self.unsent[group] = self._share(self.sampled[group.start : group.stop]) if last else None

    def _receive(self, group: range) -> None:
        """Append the tokens of a group's last step to its rows, on all pipeline stages."""
        if group in self.unsent:
            rows, sampled = (x[group.start : group.stop] for x in (self.slots.rows, self.sampled))
            message = self.unsent.pop(group) or self._share(sampled)
            message.wait()
            self.graphs.run(("append", group), lambda: self._append(rows, sampled))

    def prefill(self, prompts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        """Run the model on prompts in one packed pass and add the first token of each sample.

        Args:
            prompts: the token ids of each prompt, and the slots of its samples.

        Communicates over: the tensor- and the pipeline-parallel group, and the groups of the experts.
        """
        self.finish()
        device = self.topology.device
        lengths = [len(tokens) for tokens, _ in prompts]
        ends = list(itertools.accumulate(lengths))
        tokens = torch.tensor([token for tokens, _ in prompts for token in tokens], device=device)
        logits = self._packed(tokens, lengths, [slots for _, slots in prompts], logit_rows=[end - 1 for end in ends])
        rows = torch.tensor([slot for _, slots in prompts for slot in slots], device=device)
        if logits is not None:
            prompt_of_row = [number for number, (_, slots) in enumerate(prompts) for _ in slots]
            self._sample(logits.index_select(0, torch.tensor(prompt_of_row, device=device)), rows)
        if self.topology.pipeline_size > 1:
            sampled = self.sampled[rows]
            self._share(sampled).wait()
            self._append(rows, sampled)

    def refill(self, slots: Sequence[int], tokens: torch.Tensor, length: int) -> None:
        """Compute the keys and values, and the states, of the first tokens of some rows anew.

        Args:
            slots: the rows, whose `tokens` [rows * n] follow each other, n for each row.
            length: the length of the rows for the rotary embedding.

        Communicates over: the tensor- and the pipeline-parallel group.
        """
        each = [len(tokens) // len(slots)] * len(slots)
        self._packed(tokens, each, [[slot] for slot in slots], logit_rows=[], rotary_length=length)

    def idle(self) -> None:
        """Pass one unused token through the model, for other replicas that share its experts."""
        token = torch.zeros(1, dtype=torch.int64, device=self.topology.device)
        self._packed(token, [1], [[]], logit_rows=[])

    def compact(self) -> None:
        """Move the last rows into free slots if that makes a decode step smaller."""
        if self._row_size(self.slots.count) < self._row_size(self.slots.end):
            moves = self.slots.compact()
            if moves is not None:
                self.cache.move(*moves, self.slots.longest)
                if self.recurrent is not None:
                    self.recurrent.move(*moves)

    def _shape(self) -> tuple[int, int]:
        """Return rows and positions of the next decode step. They are rounded up where graphs are captured."""
        longest = self.slots.longest
        if self.cache.token_major:
            longest = self.cache.capacity
        elif self.graphs.enabled:
            longest = min(-(-longest // LENGTH_SIZE) * LENGTH_SIZE, self.cache.capacity)
        return self._row_size(self.slots.end), longest

    def _row_size(self, rows: int) -> int:
        if not self.graphs.enabled:
            return rows
        return min(next((size for size in ROW_SIZES if size >= rows), rows), self.slots.size)

    def _groups(self, rows: int) -> list[range]:
        """Return the groups of rows that pipeline stages decode one after the other, one for each stage.

        Replicas that share experts may have different numbers of rows, but must run the same number of passes: one.
        """
        stages = 1 if self.topology.expert_size > 1 else self.topology.pipeline_size
        size = -(-rows // stages)
        return [range(start, min(start + size, rows)) for start in range(0, rows, size)]

    def _decode_chunk(self, number: int, group: range, longest: int) -> None:
        """Run one chunk on the last token of each row of a group. Only device memory is read and written."""
        slots, chunk = self.slots, self.chunks[number]
        tokens, positions, hidden = (
            x.narrow(0, group.start, len(group)) for x in (slots.tokens, slots.positions, self.hidden.select(0, number))
        )
        attention = DecodeAttention(self.cache, group, positions, longest)
        delta_net = None if self.recurrent is None else DecodeDeltaNet(self.recurrent, group)
        batch = GenerationPass(self.rotation(positions, positions + 1), attention, delta_net)
        output = chunk(tokens if chunk.embedding is not None else hidden, batch)
        if chunk.last_stage:
            self._sample(output, attention.rows)
        else:
            hidden.copy_(output)

    def _packed(
        self,
        tokens: torch.Tensor,
        lengths: Sequence[int],
        slots: Sequence[Sequence[int]],
        *,
        logit_rows: Sequence[int],
        rotary_length: int | None = None,
    ) -> torch.Tensor | None:
        """Run packed sequences through the model; see `PromptAttention`. Return the logits, on the last stage only."""
        device = self.topology.device
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        if rotary_length is None:
            rotary_lengths = torch.tensor(lengths).repeat_interleave(torch.tensor(lengths)).to(device)
        else:
            rotary_lengths = torch.full_like(positions, rotary_length)
        bounds = list(itertools.accumulate(lengths, initial=0))
        batch = GenerationPass(
            self.rotation(positions, rotary_lengths),
            PromptAttention(self.cache, bounds, slots),
            None if self.recurrent is None else PromptDeltaNet(self.recurrent, bounds, slots),
            torch.tensor(logit_rows, dtype=torch.int64, device=device),
        )

        def run(chunk: int, inputs: torch.Tensor | None) -> torch.Tensor | None:
            return self.chunks[chunk](tokens if inputs is None else inputs, batch)

        return relay(self.topology, (len(tokens), self.config.hidden_size), self.config.params_dtype, run)

    def _sample(self, logits: torch.Tensor, rows: torch.Tensor) -> None:
        """Sample the next token of `rows` [n] from logits [n, vocabulary / tensor size].

        Without pipeline stages the tokens are appended to the rows, otherwise left in `sampled`.

        Communicates over: the tensor-parallel group.
        """
        logits = gather_vocabulary(logits, self.topology, self.vocab_size)
        tokens = self.choose(logits, rows)
        if self.topology.tensor_size > 1:
            # GPU sums may differ in the last bit between ranks. With different tokens, the ranks would deadlock.
            group = self.topology.groups.tp
            dist.broadcast(tokens, dist.get_global_rank(group, 0), group=group)
        logprobs = token_logprobs(logits, self.sampling, tokens) if self.sampling.logprobs else None
        if self.topology.pipeline_size == 1:
            self.slots.append(rows, tokens, logprobs)
            return
        self.sampled.select(1, 0).index_put_((rows,), tokens.double())
        if logprobs is not None:
            self.sampled.select(1, 1).index_put_((rows,), logprobs)

    def choose(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the next token of each of `rows` [n] from logits [n, vocabulary], [n] int64."""
        return sample(logits, self.sampling, self.slots.next_numbers(rows))

    def _share(self, sampled: torch.Tensor) -> dist.Work:
        """Start to send `sampled` [n, 2] from the last pipeline stage to all stages."""
        group = self.topology.groups.pp
        last = dist.get_global_rank(group, self.topology.pipeline_size - 1)
        message: dist.Work = dist.broadcast(sampled, last, group=group, async_op=True)
        return message

    def _append(self, rows: torch.Tensor, sampled: torch.Tensor) -> None:
        tokens, logprobs = sampled.unbind(1)
        self.slots.append(rows, tokens.long(), logprobs)
