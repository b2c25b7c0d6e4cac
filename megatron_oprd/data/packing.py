"""Select the tokens of a global batch for each term of the loss, and pack rollouts into micro-batches.

Nothing in this module communicates.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_oprd.config import FlowConfig, OutputConfig, RepresentationConfig
from megatron_oprd.losses.flow import spread_positions
from megatron_oprd.losses.positions import select_positions
from megatron_oprd.losses.reduction import count, token_weight
from megatron_oprd.types import (
    DeviceBatch,
    DeviceSelection,
    GlobalCounts,
    PackedBatch,
    Rollout,
    Selection,
    SequenceGroups,
)


@dataclass(frozen=True)
class Term:
    """A term of the loss over the global batch: the selected tokens of each rollout, and how they are averaged."""

    positions: tuple[tuple[int, ...], ...]  # for each rollout: indices into the response, ascending
    teacher_positions: tuple[tuple[int, ...], ...]  # the same tokens: indices into the teacher's response tokens
    token_ids: tuple[tuple[int, ...], ...]  # the ids of these tokens in the student's vocabulary
    shift: int  # offset from a token's row to the row of the hidden state that is compared
    aggregation: str
    counts: GlobalCounts
    first_numbers: tuple[int, ...]  # for each rollout: the number of its first selected token in the global batch
    by_sequence: bool = False  # True if the loss of a token depends on other tokens of its rollout

    def teacher_view(self) -> Term:
        """Return the term with the positions of the teacher's tokens; numbers and weights stay the same."""
        return dataclasses.replace(self, positions=self.teacher_positions)


def representation_term(config: RepresentationConfig, rollouts: Sequence[Rollout]) -> Term:
    """Select the tokens whose hidden states the representation loss compares; none if its weight is zero.

    In a rollout with an alignment, only tokens at sync points are selected and counted.
    """
    chosen = chosen_positions(config, rollouts)
    both = [
        (positions, positions) if rollout.alignment is None else rollout.alignment.comparable(positions, config.shift)
        for rollout, positions in zip(rollouts, chosen, strict=True)
    ]
    student, teacher = [pair[0] for pair in both], [pair[1] for pair in both]
    # The hidden state at token t is that after token t; shift -1 takes the state that predicts token t.
    return _term(rollouts, student, teacher, config.aggregation, config.shift)


def chosen_positions(config: RepresentationConfig, rollouts: Sequence[Rollout]) -> list[tuple[int, ...]]:
    """Return the tokens of each rollout that the configuration selects, before sync points are considered."""
    return [
        tuple(select_positions(rollout.response_mask, config.positions, config.k)) if config.weight else ()
        for rollout in rollouts
    ]


def output_term(config: OutputConfig, rollouts: Sequence[Rollout]) -> Term:
    """Select the tokens whose next-token distributions the output-space objective compares.

    The hidden state is that of the preceding token, which predicts the selected token.
    """
    positions = [
        tuple(select_positions(rollout.response_mask, config.positions, config.positions_k))
        if config.objective != "none"
        else ()
        for rollout in rollouts
    ]
    return _term(rollouts, positions, positions, config.aggregation, -1, by_sequence=config.importance > 0)


def flow_term(config: FlowConfig, rollouts: Sequence[Rollout]) -> Term:
    """Select the positions of each rollout between which the loss on hidden flow compares directions."""
    positions = [tuple(spread_positions(rollout.response_mask, config.positions)) for rollout in rollouts]
    return _term(rollouts, positions, positions, "sequence_mean", 0, by_sequence=True)


@dataclass(frozen=True)
class Terms:
    """The terms of the loss over the global batch."""

    representation: Term
    output: Term
    flow: Term | None = None  # None: no loss on hidden flow

    def teacher_view(self) -> Terms:
        """Return the terms with the positions of the teacher's tokens."""
        flow = None if self.flow is None else self.flow.teacher_view()
        return Terms(self.representation.teacher_view(), self.output.teacher_view(), flow)


def _term(
    rollouts: Sequence[Rollout],
    positions: list[tuple[int, ...]],
    teacher_positions: list[tuple[int, ...]],
    aggregation: str,
    shift: int,
    *,
    by_sequence: bool = False,
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
        by_sequence,
    )


@dataclass(frozen=True)
class Padding:
    """Multiples to which a micro-batch is padded."""

    sequence_multiple: int = 1  # of the length of each sequence (context parallelism)
    batch_multiple: int = 1  # of the tokens of the micro-batch (sequence parallelism, FP8); of sequence_multiple too


def pack(
    rollouts: Sequence[Rollout],
    numbers: Sequence[int],
    terms: Terms,
    teachers: Sequence[int],
    padding: Padding,
) -> PackedBatch:
    """Pack rollouts into one micro-batch, one after the other.

    Without rollouts the micro-batch is padding alone: the schedule needs the same number of micro-batches on every
    rank. The padding that fills up a micro-batch repeats its first tokens, so that it does not raise the maximum from
    which FP8 scales are computed.

    Args:
        rollouts: in the tokens of the model that runs.
        numbers: which rollout of the global batch each one is.
        terms: with positions in the tokens of the model that runs.
        teachers: the number of the teacher of each rollout.
    """
    tokens: list[int] = []
    position_ids: list[int] = []
    lengths: list[int] = []
    starts: list[int] = []  # the row of each rollout's first response token
    bounds = [0]
    for rollout in rollouts:
        starts.append(len(tokens) + len(rollout.prompt_ids))
        length = num_tokens(rollout)
        padded = length + -length % padding.sequence_multiple
        tokens += [*rollout.prompt_ids, *rollout.response_ids, *[0] * (padded - length)]
        position_ids += range(padded)
        lengths += [length] * padded
        bounds.append(len(tokens))
    missing = -len(tokens) % padding.batch_multiple if tokens else padding.batch_multiple
    if missing:
        tokens += list(itertools.islice(itertools.cycle(tokens or [0]), missing))
        position_ids += range(missing)
        lengths += [missing] * missing
        bounds.append(len(tokens))
    return PackedBatch(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        position_ids=torch.tensor(position_ids, dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        bounds=tuple(bounds),
        representation=_select(terms.representation, numbers, starts, teachers),
        output=_select(terms.output, numbers, starts, teachers),
        flow=None if terms.flow is None else _select(terms.flow, numbers, starts, teachers),
    )


def _select(term: Term, numbers: Sequence[int], starts: Sequence[int], teachers: Sequence[int]) -> Selection:
    selected: list[int] = []
    token_numbers: list[int] = []
    weights: list[float] = []
    token_ids: list[int] = []
    teacher_of_token: list[int] = []
    for number, start, teacher in zip(numbers, starts, teachers, strict=True):
        chosen = term.positions[number]
        selected += [start + index + term.shift for index in chosen]
        token_numbers += range(term.first_numbers[number], term.first_numbers[number] + len(chosen))
        weights += [token_weight(len(chosen), term.counts, term.aggregation) for _ in chosen]
        token_ids += term.token_ids[number]
        teacher_of_token += [teacher] * len(chosen)
    of_token = torch.tensor(teacher_of_token, dtype=torch.int64)
    return Selection(
        selected=torch.tensor(selected, dtype=torch.int64),
        token_numbers=torch.tensor(token_numbers, dtype=torch.int64),
        weights=torch.tensor(weights, dtype=torch.float64),
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        teachers=of_token,
        rows_per_rank=(len(selected),),
        rows_of_teacher=rows_of_teacher(of_token),
        by_sequence=term.by_sequence,
    )


def rows_of_teacher(teachers: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return the rows [n] int64 of each teacher, from the teacher [N] of each row. No communication."""
    return {number: (teachers == number).nonzero().flatten() for number in teachers.unique().tolist()}


def to_device(batch: PackedBatch, device: torch.device) -> DeviceBatch:
    """Copy a micro-batch to its device. The copy is a new tensor on a CPU too."""

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(tensor, non_blocking=True)

    def copy_selection(selection: Selection) -> DeviceSelection:
        return DeviceSelection(
            copy(selection.selected),
            copy(selection.weights),
            copy(selection.token_ids),
            selection.rows_per_rank,
            {teacher: copy(rows) for teacher, rows in selection.rows_of_teacher.items()},
            None if selection.groups is None else copy_groups(selection.groups),
        )

    def copy_groups(groups: SequenceGroups) -> SequenceGroups:
        tensors = (groups.grid, groups.places, groups.lengths, groups.weights)
        return SequenceGroups(groups.rows_per_rank, *map(copy, tensors))

    return DeviceBatch(
        batch,
        copy(batch.tokens),
        copy(batch.position_ids),
        copy(batch.lengths),
        copy_selection(batch.representation),
        copy_selection(batch.output),
        None if batch.context_order is None else copy(batch.context_order),
        None if batch.flow is None else copy_selection(batch.flow),
    )


def num_tokens(rollout: Rollout) -> int:
    """Return the tokens of a rollout, prompt and response."""
    return len(rollout.prompt_ids) + len(rollout.response_ids)
