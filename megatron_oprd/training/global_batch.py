"""The global batch of a step, which every rank has, and this rank's micro-batches of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from megatron_oprd.config import BatchConfig, LossConfig
from megatron_oprd.data.balance import assign, sequence_cost
from megatron_oprd.data.context_parallel_slices import Slice, cut
from megatron_oprd.data.packing import (
    Padding,
    Term,
    Terms,
    chosen_positions,
    flow_term,
    num_tokens,
    output_term,
    pack,
    representation_term,
    to_device,
)
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.types import DeviceBatch, Rollout


def share_rollouts(local_rollouts: Sequence[Rollout], topology: Topology) -> list[Rollout]:
    """Gather the rollouts of all replicas on every rank, in the order of the ranks.

    Token ids are small. With all of them, every rank computes any layout without further communication.
    Communicates over: the data- and context-parallel group.
    """
    return [rollout for part in gather_objects(list(local_rollouts), topology.groups.dp_cp) for rollout in part]


@dataclass(frozen=True)
class GlobalBatch:
    """The rollouts of a step, the same on every rank, and all that is needed to make micro-batches of them."""

    rollouts: tuple[Rollout, ...]
    teachers: tuple[int, ...]  # for each rollout, the number of the teacher that it is compared with
    loss: LossConfig  # decides which tokens are selected, and their weights
    batch: BatchConfig
    student: ModelSpec  # the cost of its layers is what is balanced
    pad_tokens: int = 1  # the tokens of a rank in a micro-batch are padded to a multiple of it, as FP8 requires
    layer_factors: Mapping[int, float] = field(default_factory=dict)  # of each student layer's loss; empty: 1 for all

    @cached_property
    def representation(self) -> Term:
        return representation_term(self.loss.representation, self.rollouts)

    @cached_property
    def output(self) -> Term:
        return output_term(self.loss.output, self.rollouts)

    @cached_property
    def flow(self) -> Term | None:
        return flow_term(self.loss.flow, self.rollouts) if self.loss.reads_flow else None

    @property
    def terms(self) -> Terms:
        """Return the terms of the loss."""
        return Terms(self.representation, self.output, self.flow)

    def micro_batches(self, topology: Topology, *, teacher: int | None = None) -> list[DeviceBatch]:
        """Return this rank's micro-batches in a layout; every rank has the same number of them.

        The cost of the student's layers is spread evenly over data-parallel ranks and micro-batches. Rollouts without
        a selected token contribute nothing and are left out. A selected token has the same number in every layout and
        for every model. No communication.

        Args:
            topology: the layout of the model that runs.
            teacher: the number of a teacher, for its tokens of the rollouts that it teaches; None for the student.

        Raises:
            UserError: a rollout does not fit into a micro-batch.
        """
        useful = [
            number
            for number in range(len(self.rollouts))
            if any(term.positions[number] for term in (self.representation, self.output, self.flow) if term is not None)
            and teacher in (None, self.teachers[number])
        ]
        lengths = [max_num_tokens(self.rollouts[number]) for number in useful]
        shares = assign(
            lengths,
            [sequence_cost(length, self.student) for length in lengths],
            topology.data_size,
            self.batch.max_tokens_per_micro_batch,
            multiple=topology.pipeline_size if topology.virtual_size > 1 else 1,  # the interleaved schedule's rounds
            packing=self.batch.packing,
        )
        batches = ([useful[member] for member in members] for members in shares[topology.data_rank])
        return [self._micro_batch(numbers, topology, as_teacher=teacher is not None) for numbers in batches]

    def _micro_batch(self, numbers: Sequence[int], topology: Topology, *, as_teacher: bool) -> DeviceBatch:
        rollouts = [self.rollouts[number] for number in numbers]
        terms = self.terms
        if as_teacher:
            rollouts = [teacher_view(rollout) for rollout in rollouts]
            terms = terms.teacher_view()
        sequence_multiple = 2 * topology.context_size if topology.context_size > 1 else 1
        sequence_size = topology.tensor_size if topology.sequence_parallel else 1
        batch_multiple = math.lcm(sequence_multiple, topology.context_size * self.pad_tokens) * sequence_size
        teachers = [self.teachers[number] for number in numbers]
        place = Slice(
            topology.context_rank,
            topology.context_size,
            topology.tensor_rank if topology.sequence_parallel else 0,
            sequence_size,
        )
        packed = pack(rollouts, numbers, terms, teachers, Padding(sequence_multiple, batch_multiple))
        return to_device(cut(packed, place), topology.device)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the batch: response lengths, selected tokens, and alignment with another tokenizer.

        No communication.
        """
        lengths = [len(rollout.response_ids) for rollout in self.rollouts]
        truncated = sum(rollout.finish_reason == "length" for rollout in self.rollouts)
        total = max(len(lengths), 1)
        terms = {"rep": self.representation, "output": self.output} | ({"flow": self.flow} if self.flow else {})
        return {
            **{f"{name}/num_tokens": term.counts.tokens for name, term in terms.items() if any(term.positions)},
            "rollout/length_mean": sum(lengths) / total,
            "rollout/length_max": max(lengths, default=0),
            "rollout/truncated_fraction": truncated / total,
            "rollout/empty_count": sum(not any(rollout.response_mask) for rollout in self.rollouts),
            **self._alignment_metrics(),
        }

    def _alignment_metrics(self) -> dict[str, float]:
        alignments = [rollout.alignment for rollout in self.rollouts if rollout.alignment is not None]
        if not alignments:
            return {}
        chosen = [len(positions) for positions in chosen_positions(self.loss.representation, self.rollouts)]
        kept = [len(positions) for positions in self.representation.positions]
        return {
            "align/coverage": sum(kept) / sum(chosen) if sum(chosen) else 1.0,
            "align/teacher_tokens": sum(len(alignment.teacher_ids) for alignment in alignments) / len(alignments),
            "align/teacher_tokens_cut": sum(alignment.teacher_tokens_cut for alignment in alignments),
            "align/no_sync": sum(some > 0 and none == 0 for some, none in zip(chosen, kept, strict=True)),
        }


def teacher_view(rollout: Rollout) -> Rollout:
    """Return the rollout with the teacher's prompt and the teacher's tokens of the response.

    With another tokenizer, no teacher token is marked as a sampled token.
    """
    if rollout.teacher_prompt_ids is not None:
        rollout = dataclasses.replace(rollout, prompt_ids=rollout.teacher_prompt_ids)
    if rollout.alignment is None or rollout.alignment.teacher_ids == rollout.response_ids:
        return rollout
    teacher_ids = rollout.alignment.teacher_ids
    return dataclasses.replace(rollout, response_ids=teacher_ids, response_mask=(0,) * len(teacher_ids))


def max_num_tokens(rollout: Rollout) -> int:
    """Return the tokens of a rollout for the student or for the teacher, whichever are more.

    Both models use this length to assign rollouts, so that the same rollouts are in the same micro-batches.
    """
    return max(num_tokens(rollout), num_tokens(teacher_view(rollout)))
