"""The output-space objective where the final states are: the LM head, the log-sum-exp and the objective in one pass
over chunks of tokens, on this rank's part of the vocabulary. No tensor of tokens x vocabulary is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_oprd.config import OutputConfig
from megatron_oprd.losses.lm_head import default_chunk_tokens, logits_of
from megatron_oprd.losses.output_space import METRICS, token_objective
from megatron_oprd.losses.reduction import output_sums
from megatron_oprd.losses.vocabulary import VocabularyShard
from megatron_oprd.parallel.sequence_rows import gather_rows, scatter_sum_rows
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.types import DeviceSelection

HEAD_ROWS = 16384  # of a head whose gradient has another dtype than the head: bounds the buffer between them


@dataclass(frozen=True)
class Heads:
    """The LM heads on a rank of the student's last stage, all cut over tensor-parallel ranks as the student's is.

    A vocabulary is as long as the shortest of all models': rows beyond it are padding and take no probability.
    """

    student: torch.nn.Parameter  # [padded vocabulary / tensor size, d_S]
    teachers: tuple[torch.Tensor, ...]  # each [rows, d_T], of the student's rows those in the vocabulary
    first: int  # the token id of the first row

    @property
    def rows(self) -> int:
        """Rows of this rank in the vocabulary."""
        return len(self.teachers[0])


class OutputLoss:
    """Values, metrics and gradients of one objective (method of OPRD eq. (3)-(5)) for micro-batches of one step.

    Called on the selected rows of this rank, it adds the gradient of the head to the head's at once and returns that of
    the states: chunk by chunk, so that logits exist for `chunk_tokens` tokens at a time. `temperature`: that of the
    rollouts.
    """

    def __init__(
        self, config: OutputConfig, heads: Heads, topology: Topology, *, temperature: float, with_metrics: bool
    ) -> None:
        self.config = config
        self.heads = heads
        self.temperature = temperature
        self.with_metrics = with_metrics
        self.sequence_group = topology.groups.tp if topology.sequence_parallel else None
        group = topology.groups.tp if topology.tensor_size > 1 else None
        self.shard = VocabularyShard(heads.first, group, widest=len(heads.student))

    def __call__(
        self, student: torch.Tensor, teacher: torch.Tensor, selection: DeviceSelection
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient [rows, d_S] of the weighted sum of the objective for `student` [rows, d_S], in its dtype, and the
        sums [1 + METRICS] float64: of weight * value, then of the metrics (zero without them), over the rows of all
        tensor-parallel ranks.

        `teacher` [rows, d_T of the widest]: the final states at the same tokens, each row of its own teacher.
        Communicates over the tensor-parallel group: every rank of it calls this at the same time.
        """
        held = (student, teacher, selection.weights, selection.token_ids)
        if self.sequence_group is not None:
            held = tuple(gather_rows(part, selection.rows_per_rank, self.sequence_group) for part in held)
        student, teacher, weights, token_ids = held
        gradient = torch.zeros_like(student)
        sums = torch.zeros(1 + len(METRICS), dtype=torch.float64, device=student.device)
        for number, head in enumerate(self.heads.teachers):
            for chunk in self._chunks(selection, number):
                gradient[chunk], of_chunk = self._chunk(
                    student[chunk], teacher[chunk], head, token_ids[chunk], weights[chunk]
                )
                sums += of_chunk
        return self._sum_over_vocabulary(gradient, selection), sums

    def _sum_over_vocabulary(self, gradient: torch.Tensor, selection: DeviceSelection) -> torch.Tensor:
        """Each rank's part of the vocabulary gave it a part of the states' gradient."""
        if self.sequence_group is not None:
            return scatter_sum_rows(gradient, selection.rows_per_rank, self.sequence_group)
        return self.shard.sum(gradient)

    def _chunk(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        teacher_head: torch.Tensor,
        token_ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's part of the gradient for `student` [tokens, d_S], and the chunk's sums."""
        head = self.heads.student.detach()[: self.heads.rows]
        result = token_objective(
            logits_of(student, head, self.temperature),
            logits_of(teacher[:, : teacher_head.shape[1]], teacher_head, self.config.teacher_temperature),
            token_ids,
            self.shard,
            self.config,
            with_metrics=self.with_metrics,
        )
        sums = output_sums(result, weights)
        scale = (self.config.weight / self.temperature) * weights
        for_logits = result.gradient.mul_(scale.to(result.gradient.dtype)[:, None]).to(student.dtype)
        if self.heads.student.requires_grad:
            _add_head_gradient(self.heads.student, for_logits, student)
        return for_logits @ head, sums

    def _chunks(self, selection: DeviceSelection, teacher: int) -> list[slice] | list[torch.Tensor]:
        """Return the rows of a teacher among those of all tensor-parallel ranks, chunk by chunk."""
        num_rows = sum(selection.rows_per_rank)
        size = self.config.chunk_tokens
        if size == "auto":
            size = default_chunk_tokens(len(self.heads.student))
        elif size is None:
            size = max(num_rows, 1)
        if len(self.heads.teachers) == 1:  # slices, which copy nothing
            return [slice(start, start + size) for start in range(0, num_rows, size)]
        rows = selection.rows_of_teacher.get(teacher)
        return [] if rows is None else list(rows.split(size))


def _add_head_gradient(head: torch.nn.Parameter, for_logits: torch.Tensor, states: torch.Tensor) -> None:
    """Add for_logits^T states to the gradient of the head's first rows, where mcore's DDP keeps it.

    Not through autograd, which would make a second matrix of the head's size for every micro-batch; a tied embedding
    adds its own part to the same buffer.
    """
    if getattr(head, "main_grad", None) is None:
        if head.grad is None:
            head.grad = torch.zeros_like(head)
        target = head.grad
    else:
        target = head.main_grad
    rows = for_logits.shape[1]
    if target.dtype == for_logits.dtype:
        target[:rows].addmm_(for_logits.t(), states)
        return
    for start in range(0, rows, HEAD_ROWS):
        block = for_logits[:, start : start + HEAD_ROWS]
        target[start : start + block.shape[1]].add_(block.t() @ states)
