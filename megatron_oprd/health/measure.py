"""How likely a student finds given answers, in every layout: forward passes alone, which leave training as it is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_oprd.config import BatchConfig, LossConfig, OutputConfig, RepresentationConfig
from megatron_oprd.losses.lm_head import default_chunk_tokens
from megatron_oprd.losses.vocabulary import VocabularyShard
from megatron_oprd.models.model import Stage
from megatron_oprd.models.output_loss import Heads
from megatron_oprd.models.taps import selected_rows
from megatron_oprd.models.targets import MicroBatchTargets
from megatron_oprd.parallel.collectives import sum_over
from megatron_oprd.parallel.sequence_rows import gather_rows
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.training.schedule import run_schedule
from megatron_oprd.training.teacher import Teacher
from megatron_oprd.training.teacher_pass import teacher_pass
from megatron_oprd.types import FINAL_STATES, ModelSpec, Rollout, Selection, StateKey

# Every token of an answer, at the state that predicted it: what an output-space objective reads.
EVERY_TOKEN = LossConfig(
    representation=RepresentationConfig(weight=0.0), output=OutputConfig(objective="full_kl", positions="all")
)
MOST_NATS = 700.0  # a token; above it a perplexity is no finite number


@dataclass(frozen=True)
class Reading:
    """Means over all tokens of the answers, at temperature 1: exp of the mean negative log-likelihood, the entropy of
    the next-token distribution, and its KL from the teacher's (student || teacher), both in nats."""

    perplexity: float
    entropy: float
    reverse_kl: float | None


def can_be_asked(teachers: Sequence[Teacher]) -> bool:
    """Whether the next-token distribution of a single teacher is known without building more of it: it reaches up to
    its final norm."""
    return len(teachers) == 1 and teachers[0].plan.teacher_final_norm


def read_answers(
    stage: Stage,
    spec: ModelSpec,
    topology: Topology,
    answers: Sequence[Rollout],
    batch: BatchConfig,
    *,
    teacher: Teacher | None = None,
    heads: Heads | None = None,
    pad_tokens: int = 1,
) -> Reading:
    """Read `answers`, the same on every rank, with the student; the result is the same on every rank.

    `teacher`: the one to compare with, and then on the student's last stage the `heads` of both. `pad_tokens`: as of a
    `GlobalBatch`. Log-softmax in float32
    over the vocabulary without padding; where both models are compared, over what both know. Weights, gradients and
    random numbers stay as they are. Communicates over all groups.
    """
    global_batch = GlobalBatch(tuple(answers), (0,) * len(answers), EVERY_TOKEN, batch, spec, pad_tokens)
    micro_batches = global_batch.micro_batches(topology)
    sums = torch.zeros(3, dtype=torch.float64, device=topology.device)
    is_last = topology.num_stages - 1 in topology.stages
    reader = _Reader(stage[-1].lm_head.detach(), spec.vocab_size, topology, heads) if is_last else None
    targets = None
    if teacher is not None:
        plan = dataclasses.replace(teacher.plan, pairs=(), output=True)
        teacher = dataclasses.replace(teacher, plan=plan)
        targets, _ = teacher_pass([teacher], global_batch, micro_batches, topology)

    def taps() -> Iterator[_Tap]:
        for number, one in enumerate(micro_batches):
            yield _Tap(one.output, reader, sums, None if targets is None else targets.of(number))

    training = stage.training
    stage.eval()
    run_schedule(list(stage), topology, micro_batches, taps(), last_layer=None, normed_layer=None, forward_only=True)
    stage.train(training)
    values: list[float] = sums.tolist()
    for group in (topology.groups.dp_cp, topology.groups.pp):  # tensor-parallel ranks have all sums alike
        values = sum_over(values, group, topology.device)
    loss, entropy, reverse_kl = (value / max(global_batch.output.counts.tokens, 1) for value in values)
    return Reading(math.exp(min(loss, MOST_NATS)), entropy, None if teacher is None else reverse_kl)


@dataclass(frozen=True)
class _Tap:
    """Adds the sums of one micro-batch to `sums` where the final states are; everything passes through."""

    selection: Selection
    reader: _Reader | None
    sums: torch.Tensor
    targets: MicroBatchTargets | None

    def __call__(self, layer: StateKey, hidden_states: torch.Tensor) -> torch.Tensor:
        if layer == FINAL_STATES:
            assert self.reader is not None  # only the last stage has final states
            student = selected_rows(hidden_states, self.selection.selected)
            teacher = None if self.targets is None else self.targets.take(FINAL_STATES)
            self.sums.add_(self.reader(student, teacher, self.selection))
        return hidden_states


class _Reader:
    """Sums over tokens from their final states, chunk by chunk, on this rank's part of the vocabulary."""

    def __init__(self, head: torch.Tensor, vocab_size: int, topology: Topology, heads: Heads | None) -> None:
        first = topology.tensor_rank * len(head)
        self.head = head[: max(min(len(head), vocab_size - first), 0)]
        self.teacher_head = None if heads is None else heads.teachers[0]
        self.shard = VocabularyShard(first, topology.groups.tp if topology.tensor_size > 1 else None)
        self.sequence_group = topology.groups.tp if topology.sequence_parallel else None
        self.chunk_tokens = default_chunk_tokens(len(head))

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor | None, selection: Selection) -> torch.Tensor:
        """[3] float64 over `student` [rows, d_S] and, with a teacher, its states [rows, d_T] at the same tokens: of the
        negative log-likelihood, of the entropy and of the KL. Communicates over the tensor-parallel group."""
        held = [student, selection.token_ids] if teacher is None else [student, selection.token_ids, teacher]
        if self.sequence_group is not None:
            held = [gather_rows(part, selection.of_ranks, self.sequence_group) for part in held]
        sums = torch.zeros(3, dtype=torch.float64, device=student.device)
        for chunk in zip(*(part.split(self.chunk_tokens) for part in held), strict=True):
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
            assert self.teacher_head is not None  # whoever asks a teacher brings its head
            head = self.teacher_head
            log_q = (teacher[:, : head.shape[1]] @ head.t()).float()
            log_p = log_p[:, : len(head)]
            self.shard.normalize_(log_p, log_q)
            reverse_kl = self.shard.sum((log_p.exp() * (log_p - log_q)).sum(-1))
        return torch.stack([-likelihood, entropy, reverse_kl]).double().sum(1)
