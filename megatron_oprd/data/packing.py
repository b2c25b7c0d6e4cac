"""Rollouts to packed micro-batches. Pure, no communication: the global counts come in as an argument."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_oprd.config import OutputConfig, RepresentationConfig
from megatron_oprd.losses.positions import select_positions
from megatron_oprd.losses.reduction import count, token_weight
from megatron_oprd.types import GlobalCounts, PackedBatch, Rollout, Selection


@dataclass(frozen=True)
class Term:
    """A term of the loss over the global batch: the tokens that it reads of each rollout, and how they are averaged."""

    positions: tuple[tuple[int, ...], ...]  # of each rollout: indices into the response, ascending
    teacher_positions: tuple[tuple[int, ...], ...]  # the same tokens: indices into what the teacher reads of it
    token_ids: tuple[tuple[int, ...], ...]  # the same tokens themselves, in the student's vocabulary
    shift: int  # from the row where a token is read to the row of the state that is compared
    aggregation: str
    counts: GlobalCounts
    first_rows: tuple[int, ...]  # the number, over all rollouts, of each one's first token

    def teacher_view(self) -> Term:
        """The same tokens, numbers and weights where a teacher with another tokenizer has them."""
        return dataclasses.replace(self, positions=self.teacher_positions)


def representation_term(config: RepresentationConfig, rollouts: Sequence[Rollout]) -> Term:
    """What the loss on hidden states reads of the global batch; nothing when its weight is zero. Of a rollout with an
    alignment, the chosen tokens at which both models have read the same bytes: they alone count. No communication."""
    chosen = chosen_positions(config, rollouts)
    both = [
        (positions, positions) if rollout.alignment is None else rollout.alignment.among(positions, config.shift)
        for rollout, positions in zip(rollouts, chosen, strict=True)
    ]
    student, teacher = [pair[0] for pair in both], [pair[1] for pair in both]
    # The state of token t is where t has been read; shift -1 takes the state that predicted it.
    return _term(rollouts, student, teacher, config.aggregation, config.shift)


def chosen_positions(config: RepresentationConfig, rollouts: Sequence[Rollout]) -> list[tuple[int, ...]]:
    """The tokens of each rollout that the configuration wants compared, before any alignment. No communication."""
    return [
        tuple(select_positions(rollout.response_mask, config.positions, config.k)) if config.weight else ()
        for rollout in rollouts
    ]


def output_term(config: OutputConfig, rollouts: Sequence[Rollout]) -> Term:
    """What the output-space objective reads: the logits that predicted the token. No communication."""
    positions = [
        tuple(select_positions(rollout.response_mask, config.positions, config.positions_k))
        if config.objective != "none"
        else ()
        for rollout in rollouts
    ]
    return _term(rollouts, positions, positions, config.aggregation, -1)


def _term(
    rollouts: Sequence[Rollout],
    positions: list[tuple[int, ...]],
    teacher_positions: list[tuple[int, ...]],
    aggregation: str,
    shift: int,
) -> Term:
    lengths = [len(chosen) for chosen in positions]
    return Term(
        tuple(positions),
        tuple(teacher_positions),
        tuple(
            tuple(rollout.response_ids[index] for index in chosen)
            for rollout, chosen in zip(rollouts, positions, strict=True)
        ),
        shift,
        aggregation,
        count(lengths),
        tuple(itertools.accumulate(lengths, initial=0)),
    )


def pack(
    rollouts: Sequence[Rollout],
    numbers: Sequence[int],
    representation: Term,
    output: Term,
    *,
    teachers: Sequence[int] | None = None,
    sequence_multiple: int = 1,
    batch_multiple: int = 1,
    pad_id: int = 0,
) -> PackedBatch:
    """One micro-batch of whole sequences, laid end to end; none at all make one of padding alone, for a rank that has
    nothing to do while the schedule needs a micro-batch everywhere.

    `rollouts` and the positions of the terms are those of the model that runs. `numbers`: which rollout of the global
    batch each is; `teachers`: the teacher of each, by default the first. Each sequence is padded at its end to a
    multiple of `sequence_multiple` (context parallelism), the whole by a sequence of padding to one of `batch_multiple`
    (sequence parallelism, FP8), itself a multiple of `sequence_multiple`. It reads as the micro-batch begins: states
    like those that are there already change no scale that FP8 finds over all of them.
    """
    tokens: list[int] = []
    positions: list[int] = []
    response: list[bool] = []
    sequence_ids: list[int] = []
    lengths: list[int] = []
    starts: list[int] = []  # the row of each sequence's first response token
    bounds = [0]
    for place, rollout in enumerate(rollouts):
        starts.append(len(tokens) + len(rollout.prompt_ids))
        length = num_tokens(rollout)
        padding = -length % sequence_multiple
        tokens += [*rollout.prompt_ids, *rollout.response_ids, *[pad_id] * padding]
        response += [False] * len(rollout.prompt_ids)
        response += [flag == 1 for flag in rollout.response_mask] + [False] * padding
        positions += range(length + padding)
        sequence_ids += [place] * (length + padding)
        lengths += [length] * (length + padding)
        bounds.append(len(tokens))
    padding = -len(tokens) % batch_multiple if tokens else batch_multiple
    if padding:
        tokens += list(itertools.islice(itertools.cycle(tokens or [pad_id]), padding))
        positions += range(padding)
        response += [False] * padding
        sequence_ids += [len(rollouts)] * padding
        lengths += [padding] * padding
        bounds.append(len(tokens))
    of_teacher = [0] * len(rollouts) if teachers is None else list(teachers)
    return PackedBatch(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        position_ids=torch.tensor(positions, dtype=torch.int64),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        response_mask=torch.tensor(response, dtype=torch.bool),
        sequence_ids=torch.tensor(sequence_ids, dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        representation=_select(representation, numbers, starts, of_teacher),
        output=_select(output, numbers, starts, of_teacher),
        context_order=torch.arange(len(tokens)),
    )


def _select(term: Term, numbers: Sequence[int], starts: Sequence[int], teachers: Sequence[int]) -> Selection:
    selected: list[int] = []
    rows: list[int] = []
    weights: list[float] = []
    token_ids: list[int] = []
    of_teacher: list[int] = []
    for number, start, teacher in zip(numbers, starts, teachers, strict=True):
        chosen = term.positions[number]
        selected += [start + index + term.shift for index in chosen]
        rows += range(term.first_rows[number], term.first_rows[number] + len(chosen))
        weights += [token_weight(len(chosen), term.counts, term.aggregation) for _ in chosen]
        token_ids += term.token_ids[number]
        of_teacher += [teacher] * len(chosen)
    return Selection(
        selected=torch.tensor(selected, dtype=torch.int64),
        rows=torch.tensor(rows, dtype=torch.int64),
        weights=torch.tensor(weights, dtype=torch.float64),
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        teachers=torch.tensor(of_teacher, dtype=torch.int64),
        of_ranks=(len(selected),),
    )


def to_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """The micro-batch with every tensor on `device`."""

    def moved(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return part.to(device, non_blocking=True)
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            fields = {field.name: moved(getattr(part, field.name)) for field in dataclasses.fields(part)}
            return dataclasses.replace(part, **fields)
        return part

    on_device: PackedBatch = moved(batch)
    return on_device


def num_tokens(rollout: Rollout) -> int:
    """Tokens of a rollout, prompt and response."""
    return len(rollout.prompt_ids) + len(rollout.response_ids)
