"""Sums over the tokens of stored answers, from the final hidden states of student and teacher.

Logits exist for a chunk of tokens at one time, and only for this rank's part of the vocabulary.
"""

from __future__ import annotations

import torch

from megatron_oprd.losses.lm_head import slice_tokens
from megatron_oprd.losses.vocabulary import VocabularyShard
from megatron_oprd.models.output_loss import Heads
from megatron_oprd.parallel.sequence_rows import gather_rows
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.types import DeviceSelection

# Each is a sum over tokens; without a teacher the last four are zero.
SUMS = ("loss", "entropy", "reverse_kl", "forward_kl", "teacher_loss", "argmax_agreement")


class TokenSums:
    """Computes the SUMS of the selected tokens of one micro-batch.

    The student's negative log-likelihood and entropy cover its vocabulary without padding. The other sums cover the
    token ids that both models have. Log-softmax is computed in float32.

    Args:
        head: the student's LM head on this rank, with padding.
        vocab_size: number of token ids of the student.
        topology: the student's layout.
        heads: the LM heads of both models; None: no teacher is measured.
    """

    def __init__(self, head: torch.Tensor, vocab_size: int, topology: Topology, heads: Heads | None) -> None:
        first = topology.tensor_rank * len(head)
        self.head = head[: max(min(len(head), vocab_size - first), 0)]
        self.teacher_head = None if heads is None else heads.teachers[0]
        group = topology.groups.tp if topology.tensor_size > 1 else None
        self.shard = VocabularyShard(first, group, widest=len(head))
        self.sequence_group = topology.groups.tp if topology.sequence_parallel else None
        self.chunk_tokens = slice_tokens(len(head))

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor | None, selection: DeviceSelection) -> torch.Tensor:
        """Return the SUMS in float64, equal on all tensor-parallel ranks.

        `student`: hidden states [rows, d_S]. `teacher`: hidden states [rows, d_T] of the same tokens, or None.
        Communicates over the tensor-parallel group.
        """
        rows = [student, selection.token_ids] if teacher is None else [student, selection.token_ids, teacher]
        if self.sequence_group is not None:
            rows = [gather_rows(part, selection.rows_per_rank, self.sequence_group) for part in rows]
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=student.device)
        for chunk in zip(*(part.split(self.chunk_tokens) for part in rows), strict=True):
            if len(chunk[0]):
                sums += self._chunk(*chunk)
        return sums

    def _chunk(
        self, student: torch.Tensor, token_ids: torch.Tensor, teacher: torch.Tensor | None = None
    ) -> torch.Tensor:
        ids = token_ids[:, None]
        log_p = (student @ self.head.t()).float()
        if teacher is not None:
            assert self.teacher_head is not None  # loaded with the teacher
            head = self.teacher_head
            log_q = (teacher[:, : head.shape[1]] @ head.t()).float()
            # Rank before subtracting the log-sum-exp, whose rounding depends on the number of ranks.
            agreement = (self.shard.top(log_p[:, : len(head)], 1) == self.shard.top(log_q, 1))[:, 0]
        self.shard.normalize_(log_p)
        likelihood = self.shard.gather(log_p, ids)[:, 0]
        entropy = self.shard.sum(-(log_p.exp() * log_p).sum(-1))
        sums = [-likelihood, entropy]
        if teacher is not None:
            log_p = log_p[:, : len(head)]
            self.shard.normalize_(log_p, log_q)
            teacher_likelihood = self.shard.gather(log_q, ids)[:, 0]
            ratio = log_p - log_q
            # In place of the log-probabilities: no further tensor of the chunk's size is needed.
            reverse_kl = log_p.exp_().mul_(ratio).sum(-1)
            forward_kl = -log_q.exp_().mul_(ratio).sum(-1)
            sums += self.shard.sum(torch.stack([reverse_kl, forward_kl])).unbind()
            sums += [-teacher_likelihood, agreement.to(entropy.dtype)]
        sums += [torch.zeros_like(entropy)] * (len(SUMS) - len(sums))
        return torch.stack(sums).double().sum(1)
