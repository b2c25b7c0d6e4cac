"""Data that one stage of a training step passes to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:  # importing torch takes seconds, and commands check their arguments before they need it
    import torch

FinishReason = Literal["eos", "length", "horizon", "replay"]


class UserError(Exception):
    """A mistake in what the user gave us. Commands print its one line and exit with code 2.

    Args:
        message: what is wrong and where. It may contain the advice.
        advice: what to do next, if a caller may replace it by better advice.
    """

    everywhere = False  # whether all ranks are known to raise it

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(message, advice)  # both in `args`, so that pickling keeps them
        self.message, self.advice = message, advice

    def __str__(self) -> str:
        return f"{self.message}; {self.advice}" if self.advice else self.message


class ServiceFailed(Exception):
    """A program beside this one failed. Commands print the one line and exit with code 1; the same command resumes."""


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt."""

    index: int  # its row, counted over all prompt files before shuffling
    prompt_ids: tuple[int, ...]
    text: str = ""
    data_source: str = ""
    ground_truth: str | tuple[str, ...] | None = None  # the right answer, or several of which any is right
    # How an answer is compared with `ground_truth`: the last boxed answer mathematically, or the whole string.
    answer_style: Literal["rule", "exact"] = "rule"
    teacher_prompt_ids: tuple[int, ...] | None = None  # the prompt for the teacher; None: the student's prompt


@dataclass(frozen=True)
class Alignment:
    """A response in the tokens of a teacher with another tokenizer, and its sync points.

    A sync point is a token of the student and a token of the teacher that end after the same bytes of the response:
    only there can hidden states be compared (OPRD eq. (11)-(15) across tokenizers).
    """

    teacher_ids: tuple[int, ...]  # the teacher's tokens after its own prompt
    student_positions: tuple[int, ...]  # sync points: indices into the student's response, strictly increasing
    teacher_positions: tuple[int, ...]  # the same sync points: indices into teacher_ids, strictly increasing
    student_tokens: int  # length of the student's response
    teacher_tokens_cut: int = 0  # tokens left out of teacher_ids because they exceed the teacher's limit

    @property
    def coverage(self) -> float:
        """Return the sync points for each token of the student's response; 1 for an empty response."""
        return len(self.student_positions) / self.student_tokens if self.student_tokens else 1.0

    def comparable(self, positions: Sequence[int], shift: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the positions whose hidden states can be compared, and the teacher's positions for them.

        Args:
            positions: indices into the student's response, ascending.
            shift: offset from a position to its hidden state. 0: a sync point is comparable. -1: a token after a sync
                point is, and so is the first token, because both prompts end before it. The teacher's position is then
                one after the sync point; it may equal the number of the teacher's tokens.
        """
        student, teacher = (
            np.array([-1, *read], np.int64) - shift for read in (self.student_positions, self.teacher_positions)
        )
        chosen = np.isin(student, positions)
        return tuple(student[chosen].tolist()), tuple(teacher[chosen].tolist())


@dataclass(frozen=True)
class Rollout:
    """A prompt and the student's response."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # with the EOS token, if the response ends with one
    response_mask: tuple[int, ...]  # 1 for each response token that the student sampled, otherwise 0
    finish_reason: FinishReason
    prompt_index: int = 0
    sample_index: int = 0
    data_source: str = ""
    teacher_prompt_ids: tuple[int, ...] | None = None  # the prompt for the teacher; None: the student's prompt
    alignment: Alignment | None = None  # the response for a teacher with another tokenizer; None: the same tokens
    logprobs: tuple[float, ...] | None = None  # of each sampled token under the policy that sampled it, if asked for

    def __post_init__(self) -> None:
        if len(self.response_mask) != len(self.response_ids):
            raise ValueError(f"response_mask has {len(self.response_mask)} entries for {len(self.response_ids)} tokens")


@dataclass(frozen=True)
class GlobalCounts:
    """Counts of the global batch by which one term of the loss is normalised (OPRD eq. (6)); equal on every rank."""

    sequences: int  # rollouts with at least one selected token
    tokens: int  # selected tokens


@dataclass(frozen=True)
class Selection:
    """The N tokens of a micro-batch that one term of the loss compares, on this rank. All tensors are on the CPU."""

    selected: torch.Tensor  # [N] int64: rows of this rank's hidden states, without duplicates
    token_numbers: torch.Tensor  # [N] int64: the number of each token among all selected tokens of the global batch
    weights: torch.Tensor  # [N] float64: weight of each token in the global mean (not divided by the number of layers)
    token_ids: torch.Tensor  # [N] int64: the response tokens, as the student sampled them
    teachers: torch.Tensor  # [N] int64: the number of the teacher of each token
    # Sequence-parallel ranks hold different tokens. Their rows are gathered in the order of the ranks.
    rows_per_rank: tuple[int, ...]  # N on each sequence-parallel rank; (N,) without sequence parallelism
    rows_of_teacher: Mapping[int, torch.Tensor]  # teacher -> [n] int64: its rows among the gathered ones
    by_sequence: bool = False  # True if the term needs `groups`
    groups: SequenceGroups | None = None  # once the micro-batch is cut into the parts of the ranks, if needed

    def __len__(self) -> int:
        return len(self.selected)


@dataclass(frozen=True)
class SequenceGroups:
    """The selected tokens of a micro-batch by sequence, for a term that compares tokens of a sequence with each other.
    The same numbers in both forms of a batch.

    Ranks that share the tokens of a sequence gather their rows, in the order of the ranks.
    """

    rows_per_rank: tuple[int, ...]  # on each context-parallel rank, and there on each sequence-parallel rank
    grid: (
        torch.Tensor
    )  # [sequences, positions] int64: places among the gathered rows; short sequences repeat their last
    places: torch.Tensor  # [N] int64: the places of this rank's rows in `grid.flatten()`
    lengths: torch.Tensor  # [sequences] int64: positions of each sequence, at least one
    weights: torch.Tensor  # [sequences] float64: weight of each sequence in the global mean

    def rows_per_context_rank(self, context_size: int) -> list[int]:
        """Return the rows of each context-parallel rank, those of all its sequence-parallel ranks."""
        counts, size = self.rows_per_rank, len(self.rows_per_rank) // context_size
        return [sum(counts[first : first + size]) for first in range(0, len(counts), size)]


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch of T tokens in its host form: whole sequences, one after the other. All tensors are on the CPU.

    Padding stands at the end of a sequence (context parallelism) or is a sequence of its own (sequence parallelism,
    FP8); it is never selected. Under context parallelism a rank has a part of every sequence, and T counts its tokens.
    """

    tokens: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64, from 0 in each sequence
    lengths: torch.Tensor  # [T] int64: the length of each token's sequence, without padding
    bounds: tuple[int, ...]  # [sequences + 1] cumulative lengths of the whole sequences, with padding
    representation: Selection  # tokens whose hidden states the representation loss compares
    output: Selection  # tokens whose next-token distributions the output-space objective compares
    flow: Selection | None = None  # positions that the loss on hidden flow compares; None: no such loss
    # Context parallelism: [T * context size] int64, the place of each row among the gathered rows of all ranks.
    context_order: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def selection(self, key: StateKey) -> Selection:
        """Return the tokens at which the states with this key are compared."""
        if isinstance(key, FlowKey):
            assert self.flow is not None
            return self.flow
        return self.output if key == FINAL_STATES else self.representation


@dataclass(frozen=True)
class DeviceSelection:
    """The device form of a `Selection`: what a loss reads during forward and backward."""

    selected: torch.Tensor
    weights: torch.Tensor
    token_ids: torch.Tensor
    rows_per_rank: tuple[int, ...]
    rows_of_teacher: Mapping[int, torch.Tensor]
    groups: SequenceGroups | None = None

    def __len__(self) -> int:
        return len(self.selected)


@dataclass(frozen=True)
class DeviceBatch:
    """The device form of a micro-batch: what a forward pass reads.

    Nothing in it is ever copied back to the CPU. Code that runs on the CPU reads `host`.
    """

    host: PackedBatch
    tokens: torch.Tensor
    position_ids: torch.Tensor
    lengths: torch.Tensor
    representation: DeviceSelection
    output: DeviceSelection
    context_order: torch.Tensor | None
    flow: DeviceSelection | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def selection(self, key: StateKey) -> DeviceSelection:
        """Return the tokens at which the states with this key are compared."""
        if isinstance(key, FlowKey):
            assert self.flow is not None
            return self.flow
        return self.output if key == FINAL_STATES else self.representation


# The key of the final states (layer L after the final norm), which the LM head and output-space objectives read.
FINAL_STATES: Final = "final_states"


class FlowKey(NamedTuple):
    """The key of a layer's hidden states at the positions of the hidden-flow loss."""

    layer: int


# The key of hidden states: a layer, numbered from 1 to L, FINAL_STATES, or the key of another loss on a layer.
StateKey = int | Literal["final_states"] | FlowKey


@dataclass(frozen=True)
class LayerPair:
    """Student layer and the teacher layer it is compared with, both 1-based block numbers (OPRD eq. (11))."""

    student: int
    teacher: int


@dataclass(frozen=True)
class PairBridge:
    """The maps that make the two layers of a pair comparable (OPRD eq. (12)-(14)), in float32.

    z_S = P_S h_S is compared with z_T = P_T (h_T - mu_T); both have r numbers for each token.
    """

    student_map: torch.Tensor  # P_S [r, d_S]
    teacher_map: torch.Tensor  # P_T [r, d_T], orthonormal rows, the leading principal direction first
    teacher_mean: torch.Tensor  # mu_T [d_T]


@dataclass(frozen=True)
class StepReport:
    """The results of one student update, equal on every rank."""

    loss: float  # of the global batch
    grad_norm: float  # before clipping
    learning_rate: float
    metrics: dict[str, float] = field(default_factory=dict)  # by name
    # Mean square of the teacher's states of this step, by student layer; empty if no weight depends on it.
    layer_squares: dict[int, float] = field(default_factory=dict)
