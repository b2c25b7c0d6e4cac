"""The output-space objective on the last pipeline stage: logits, value and gradient in one pass over chunks of tokens.

Each tensor-parallel rank computes the logits of its own part of the vocabulary. No tensor of all tokens x vocabulary
exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from megatron_oprd.config import OutputConfig
from megatron_oprd.losses.complete_vocabulary import Logits, complete_objective, is_supported, sampled_log_ratios
from megatron_oprd.losses.importance import position_weights
from megatron_oprd.losses.lm_head import (
    HeadInput,
    add_head_gradient_,
    auto_chunk_tokens,
    logits_gradient,
    logits_of,
    slice_tokens,
    slices,
)
from megatron_oprd.losses.output_space import METRICS, token_objective
from megatron_oprd.losses.reduction import output_sums
from megatron_oprd.losses.vocabulary import VocabularyShard
from megatron_oprd.parallel.sequence_rows import gather_rows, scatter_sum_rows
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.types import DeviceSelection


@dataclass(frozen=True)
class BaseHead:
    """The LM head of the model from which the logits of a teacher are extrapolated."""

    rows: torch.Tensor  # [rows, d_T], for the same token ids as the teacher's
    extrapolate: float  # lambda: logits are base + lambda (teacher - base)


@dataclass(frozen=True)
class Heads:
    """The LM heads of all models on one rank of the student's last stage, with rows for the same token ids.

    The objective covers the smallest vocabulary of all models. Other rows of the student's head get no probability.
    """

    student: torch.nn.Parameter  # [padded vocabulary / tensor size, d_S]
    teachers: tuple[torch.Tensor, ...]  # each [rows, d_T], without rows beyond the smallest vocabulary
    first: int  # the token id of the first row
    bases: Mapping[int, BaseHead] = field(default_factory=dict)  # by the teacher's number

    @property
    def rows(self) -> int:
        """The number of token ids of the smallest vocabulary on this rank."""
        return len(self.teachers[0])


class OutputLoss:
    """An output-space objective (OPRD eq. (3)-(5)) for the micro-batches of a step.

    A call returns the gradient of the student's states and adds the gradient of the student's LM head to the head's
    gradient buffer. Logits exist for `chunk_tokens` tokens at one time. `temperature` is the rollouts' temperature.
    """

    def __init__(
        self, config: OutputConfig, heads: Heads, topology: Topology, *, temperature: float, with_metrics: bool
    ) -> None:
        self.config = config
        self.heads = heads
        self.temperature = temperature
        self.with_metrics = with_metrics
        self.topology = topology
        self.sequence_group = topology.groups.tp if topology.sequence_parallel else None
        group = topology.groups.tp if topology.tensor_size > 1 else None
        self.shard = VocabularyShard(heads.first, group, widest=len(heads.student))

    def __call__(
        self, student: torch.Tensor, teacher: torch.Tensor, selection: DeviceSelection
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradient of the states and the sums for metrics.

        Args:
            student: [N, d_S], the student's final states at the selected tokens of this rank.
            teacher: [N, width], the final states of each token's own teacher, followed by those of its base if its
                logits are extrapolated. `width` is that of the widest row.
            selection: the selected tokens.

        Returns:
            The gradient [N, d_S] of the weighted sum of the objective, in the dtype of `student`.
            The sums [1 + METRICS] in float64 of weight * value and of each metric (zero without metrics), over the
            tokens of all tensor-parallel ranks.

        Communicates over the tensor-parallel group, and with `importance` over the context-parallel group; all their
        ranks must call this together.
        """
        rows = (student, teacher, selection.weights, selection.token_ids)
        if self.sequence_group is not None:
            rows = tuple(gather_rows(part, selection.rows_per_rank, self.sequence_group) for part in rows)
        student, teacher, weights, token_ids = rows
        if self.config.importance:
            weights = weights * self._importance(student, teacher, token_ids, selection)
        gradient = torch.zeros_like(student)
        sums = torch.zeros(1 + len(METRICS), dtype=torch.float64, device=student.device)
        for number, head in enumerate(self.heads.teachers):
            for chunk in self._chunks(selection, number):
                teacher_part = _teacher_input(teacher[chunk], head, self.heads.bases.get(number))
                gradient[chunk], chunk_sums = self._chunk(
                    student[chunk], teacher_part, token_ids[chunk], weights[chunk]
                )
                sums += chunk_sums
        return self._sum_over_vocabulary(gradient, selection), sums

    def _importance(
        self, student: torch.Tensor, teacher: torch.Tensor, token_ids: torch.Tensor, selection: DeviceSelection
    ) -> torch.Tensor:
        """Return the weight by position [rows] of each row of the tensor-parallel ranks, float64.

        One more pass through the LM heads of all models, without gradients and with the logits of one chunk at a time.
        """
        ratios = torch.zeros(len(student), dtype=torch.float64, device=student.device)
        for number, head in enumerate(self.heads.teachers):
            for chunk in self._chunks(selection, number):
                teacher_part = _teacher_input(teacher[chunk], head, self.heads.bases.get(number))
                ratios[chunk] = self._log_ratios(student[chunk], teacher_part, token_ids[chunk])
        groups, own = selection.groups, slice(None)
        assert groups is not None  # the selection was made for the same loss
        if self.topology.context_size > 1:
            counts = groups.rows_per_context_rank(self.topology.context_size)
            first = sum(counts[: self.topology.context_rank])
            own = slice(first, first + counts[self.topology.context_rank])
            ratios = gather_rows(ratios, counts, self.topology.groups.cp)
        weights = torch.empty(len(ratios), dtype=torch.float64, device=ratios.device)
        weights[groups.grid] = position_weights(ratios[groups.grid], groups.lengths, self.config.importance)
        return weights[own]

    def _log_ratios(self, student: torch.Tensor, teacher: HeadInput, token_ids: torch.Tensor) -> torch.Tensor:
        """Return log q - log p [n] of the sampled tokens of a chunk."""
        head = self.heads.student.detach()[: self.heads.rows]
        of_student, of_teacher = logits_of(HeadInput(student, head)), logits_of(teacher)
        temperatures = self.temperature, self.config.teacher_temperature
        # On a GPU no temporary has the size of the logits.
        size = len(student) if student.is_cuda else slice_tokens(len(self.heads.student))
        parts = [
            sampled_log_ratios(
                Logits(of_student[part], temperatures[0]),
                Logits(of_teacher[part], temperatures[1]),
                token_ids[part],
                self.shard,
            )
            for part in slices(len(student), size)
        ]
        return torch.cat(parts)

    def _sum_over_vocabulary(self, gradient: torch.Tensor, selection: DeviceSelection) -> torch.Tensor:
        """Sum the gradient of the states over the tensor-parallel ranks, each of which has the part that its own rows
        of the head contribute."""
        if self.sequence_group is not None:
            return scatter_sum_rows(gradient, selection.rows_per_rank, self.sequence_group)
        return self.shard.sum(gradient)

    def _chunk(
        self, student: torch.Tensor, teacher: HeadInput, token_ids: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the part of the gradient of `student` [n, d_S] from this rank's vocabulary, and the chunk's sums."""
        head = self.heads.student.detach()[: self.heads.rows]
        scale = (self.config.weight / self.temperature) * weights
        sums = torch.zeros(1 + len(METRICS), dtype=torch.float64, device=student.device)

        def objective(student_logits: torch.Tensor, teacher_logits: torch.Tensor, part: slice) -> torch.Tensor:
            if self.temperature != 1:
                student_logits.div_(self.temperature)
            if self.config.teacher_temperature != 1:
                teacher_logits.div_(self.config.teacher_temperature)
            result = token_objective(
                student_logits,
                teacher_logits,
                token_ids[part],
                self.shard,
                self.config,
                with_metrics=self.with_metrics,
            )
            sums.add_(output_sums(result, weights[part]))
            return result.gradient.mul_(scale[part].to(result.gradient.dtype)[:, None])

        def fused_objective(student_logits: torch.Tensor, teacher_logits: torch.Tensor, part: slice) -> torch.Tensor:
            models = Logits(student_logits, self.temperature), Logits(teacher_logits, self.config.teacher_temperature)
            result = complete_objective(*models, token_ids, self.shard, self.config, scale)
            sums.add_(output_sums(result, weights))
            return result.gradient

        if student.is_cuda and not self.with_metrics and is_supported(self.config):
            for_logits = logits_gradient(HeadInput(student, head), teacher, fused_objective, None)
            return self._products(for_logits, student, head), sums
        # Without chunks (`chunk_tokens: null`), the objective has all tokens at once too.
        size = len(student) if self.config.chunk_tokens is None else slice_tokens(len(self.heads.student))
        for_logits = logits_gradient(HeadInput(student, head), teacher, objective, size)
        return self._products(for_logits, student, head), sums

    def _products(self, for_logits: torch.Tensor, student: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Add to the gradient of the head, and return the gradient of the states."""
        if self.heads.student.requires_grad:
            add_head_gradient_(_gradient_buffer(self.heads.student), for_logits, student)
        return for_logits @ head

    def _chunks(self, selection: DeviceSelection, teacher: int) -> list[slice] | list[torch.Tensor]:
        """Return the rows of a teacher among those of all tensor-parallel ranks, chunk by chunk."""
        num_rows = sum(selection.rows_per_rank)
        size = self.config.chunk_tokens
        if size == "auto":
            size = auto_chunk_tokens(len(self.heads.student), self.heads.student.dtype)
        elif size is None:
            size = max(num_rows, 1)
        if len(self.heads.teachers) == 1:  # slices, which copy nothing
            return list(slices(num_rows, size))
        rows = selection.rows_of_teacher.get(teacher)
        return [] if rows is None else list(rows.split(size))


def _teacher_input(rows: torch.Tensor, head: torch.Tensor, base: BaseHead | None) -> HeadInput:
    """Return the input of a teacher's head from rows of targets, and that of its base."""
    width = head.shape[1]
    if base is None:
        return HeadInput(rows[:, :width], head)
    # Copies: a product with a part of wider rows may round differently, and equal models shall change no bit.
    of_teacher, of_base = (rows[:, start : start + width].contiguous() for start in (0, width))
    return HeadInput(of_teacher, head, HeadInput(of_base, base.rows), base.extrapolate)


def _gradient_buffer(head: torch.nn.Parameter) -> torch.Tensor:
    """Return the gradient buffer of the head, `main_grad` under Megatron-Core's DDP.

    Autograd would allocate a second matrix of the head's size for every micro-batch. The gradient of a tied embedding
    is added to the same buffer.
    """
    if getattr(head, "main_grad", None) is not None:
        return head.main_grad
    if head.grad is None:
        head.grad = torch.zeros_like(head)
    return head.grad
