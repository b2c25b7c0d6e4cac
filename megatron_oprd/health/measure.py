"""Measurement of stored answers: forward passes of the student and the teacher that do not change training.

`watch.py` calls `measure_answers`. Works in every parallel layout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_oprd.config import BatchConfig, LossConfig, OutputConfig, RepresentationConfig
from megatron_oprd.losses.lm_head import slice_tokens
from megatron_oprd.losses.vocabulary import VocabularyShard
from megatron_oprd.models.model import Stage
from megatron_oprd.models.output_loss import Heads
from megatron_oprd.models.taps import selected_rows
from megatron_oprd.models.targets import MicroBatchTargets
from megatron_oprd.parallel.collectives import sum_over
from megatron_oprd.parallel.sequence_rows import gather_rows
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.training.schedule import PassSettings, run_schedule
from megatron_oprd.training.teacher import Teacher
from megatron_oprd.training.teacher_pass import teacher_pass
from megatron_oprd.types import FINAL_STATES, DeviceSelection, ModelSpec, Rollout, StateKey

# Selects every token of an answer, at the hidden state that predicts it, as an output-space objective does.
EVERY_TOKEN = LossConfig(
    representation=RepresentationConfig(weight=0.0), output=OutputConfig(objective="full_kl", positions="all")
)
MOST_NATS = 700.0  # per token; the perplexity of a larger loss is not a finite number


@dataclass(frozen=True)
class MeasuredModels:
    """The student and, for the KL, the teacher, on this rank."""

    stage: Stage  # the student's chunks
    spec: ModelSpec  # the student
    topology: Topology  # the student's layout
    batch: BatchConfig
    pad_tokens: int = 1  # as in GlobalBatch
    teacher: Teacher | None = None  # None: no KL is measured
    # Returns the LM heads of both models on the student's last stage, else None. Called for each measurement.
    load_heads: Callable[[], Heads | None] = lambda: None


@dataclass(frozen=True)
class Measurement:
    """Means over all tokens of the answers, at temperature 1."""

    perplexity: float  # exp of the mean negative log-likelihood
    entropy: float  # of the next-token distribution, in nats
    reverse_kl: float | None  # KL(student || teacher) in nats; None without a teacher


def has_teacher_distribution(teachers: Sequence[Teacher]) -> bool:
    """Return True if there is a single teacher and it is built up to its final norm, as its logits require."""
    return len(teachers) == 1 and teachers[0].plan.teacher_final_norm


def measure_answers(models: MeasuredModels, answers: Sequence[Rollout]) -> Measurement:
    """Measure perplexity, entropy and KL of `answers`, which are the same on every rank.

    Log-softmax is computed in float32 over the vocabulary without padding; for the KL over the token ids that both
    models have. Weights, gradients and random-number generators are not changed. Communicates over all groups.

    Returns: the same measurement on every rank.
    """
    stage, topology, teacher = models.stage, models.topology, models.teacher
    heads = models.load_heads()
    global_batch = GlobalBatch(
        tuple(answers), (0,) * len(answers), EVERY_TOKEN, models.batch, models.spec, models.pad_tokens
    )
    micro_batches = global_batch.micro_batches(topology)
    sums = torch.zeros(3, dtype=torch.float64, device=topology.device)
    is_last = topology.num_stages - 1 in topology.stages
    sum_tokens = _TokenSums(stage[-1].lm_head.detach(), models.spec.vocab_size, topology, heads) if is_last else None
    targets = None
    if teacher is not None:
        teacher = dataclasses.replace(teacher, plan=dataclasses.replace(teacher.plan, pairs=(), output=True))
        targets, _ = teacher_pass([teacher], global_batch, micro_batches, topology)

    def taps() -> Iterator[_Tap]:
        for number, micro_batch in enumerate(micro_batches):
            yield _Tap(micro_batch.output, sum_tokens, sums, None if targets is None else targets.of(number))

    training = stage.training
    stage.eval()
    run_schedule(list(stage), topology, micro_batches, taps(), PassSettings())
    stage.train(training)
    values: list[float] = sums.tolist()
    for group in (topology.groups.dp_cp, topology.groups.pp):  # tensor-parallel ranks have equal sums
        values = sum_over(values, group, topology.device)
    loss, entropy, reverse_kl = (value / max(global_batch.output.counts.tokens, 1) for value in values)
    return Measurement(math.exp(min(loss, MOST_NATS)), entropy, None if teacher is None else reverse_kl)


@dataclass(frozen=True)
class _Tap:
    """Adds the sums over one micro-batch to `sums` at the final hidden states, and returns all states unchanged."""

    selection: DeviceSelection
    sum_tokens: _TokenSums | None  # None: this rank has no last stage
    sums: torch.Tensor
    targets: MicroBatchTargets | None

    def __call__(self, layer: StateKey, hidden_states: torch.Tensor) -> torch.Tensor:
        if layer == FINAL_STATES:
            assert self.sum_tokens is not None  # only the last stage has final states
            student = selected_rows(hidden_states, self.selection.selected)
            teacher = None if self.targets is None else self.targets.take(FINAL_STATES)
            self.sums.add_(self.sum_tokens(student, teacher, self.selection))
        return hidden_states


class _TokenSums:
    """Sums over tokens, computed from final hidden states chunk by chunk on this rank's part of the vocabulary."""

    def __init__(self, head: torch.Tensor, vocab_size: int, topology: Topology, heads: Heads | None) -> None:
        first = topology.tensor_rank * len(head)
        self.head = head[: max(min(len(head), vocab_size - first), 0)]
        self.teacher_head = None if heads is None else heads.teachers[0]
        self.shard = VocabularyShard(first, topology.groups.tp if topology.tensor_size > 1 else None)
        self.sequence_group = topology.groups.tp if topology.sequence_parallel else None
        self.chunk_tokens = slice_tokens(len(head))

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor | None, selection: DeviceSelection) -> torch.Tensor:
        """Return the sums [3] in float64 of negative log-likelihood, entropy and KL over the selected tokens.

        `student`: hidden states [rows, d_S]. `teacher`: hidden states [rows, d_T] of the same tokens, or None.
        Communicates over the tensor-parallel group.
        """
        rows = [student, selection.token_ids] if teacher is None else [student, selection.token_ids, teacher]
        if self.sequence_group is not None:
            rows = [gather_rows(part, selection.rows_per_rank, self.sequence_group) for part in rows]
        sums = torch.zeros(3, dtype=torch.float64, device=student.device)
        for chunk in zip(*(part.split(self.chunk_tokens) for part in rows), strict=True):
            if len(chunk[0]):
                sums += self._chunk(*chunk)
        return sums

    def _chunk(
        self, student: torch.Tensor, token_ids: torch.Tensor, teacher: torch.Tensor | None = None
    ) -> torch.Tensor:
        log_p = (student @ self.head.t()).float()
        self.shard.normalize_(log_p)
        likelihood = self.shard.gather(log_p, token_ids[:, None])[:, 0]
        entropy = self.shard.sum(-(log_p.exp() * log_p).sum(-1))
        reverse_kl = torch.zeros_like(entropy)
        if teacher is not None:
            assert self.teacher_head is not None  # MeasuredModels.load_heads loads it with the teacher
            head = self.teacher_head
            log_q = (teacher[:, : head.shape[1]] @ head.t()).float()
            log_p = log_p[:, : len(head)]
            self.shard.normalize_(log_p, log_q)
            reverse_kl = self.shard.sum((log_p.exp() * (log_p - log_q)).sum(-1))
        return torch.stack([-likelihood, entropy, reverse_kl]).double().sum(1)
