"""Both models read the same rollouts, frozen, and a tap sees each pair of states where the student's is born."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_oprd.config import Config
from megatron_oprd.models.layer_plan import LayerPlan
from megatron_oprd.models.model import Stage
from megatron_oprd.models.taps import selected_rows
from megatron_oprd.models.targets import MicroBatchTargets
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.training.schedule import run_schedule
from megatron_oprd.training.teacher import Teacher
from megatron_oprd.training.teacher_pass import teacher_pass
from megatron_oprd.types import LayerPair, ModelSpec, PackedBatch

# What a pair of states is for: (pair, student [tokens, d_S], teacher [tokens, d_T], held out [tokens] bool).
Visit = Callable[[LayerPair, torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Readers:
    """Student and teacher on this rank, and how their layers belong together."""

    config: Config
    spec: ModelSpec  # of the student
    teacher_spec: ModelSpec
    plan: LayerPlan
    topology: Topology
    stage: Stage
    teacher: Teacher

    @property
    def pairs(self) -> tuple[LayerPair, ...]:
        """The pairs whose student layer lives on this rank."""
        stages = self.topology.stages
        return tuple(pair for pair in self.plan.pairs if self.plan.student_stage(pair.student) in stages)

    def read(self, global_batch: GlobalBatch, held_out: torch.Tensor, visit: Visit) -> None:
        """Show `visit` the states of this rank's layers at this rank's share of the selected tokens.

        `held_out`: [rollouts] bool. Memory: what `teacher_pass` holds. Communicates over the groups of both models.
        """
        micro_batches = global_batch.micro_batches(self.topology)
        targets, _ = teacher_pass((self.teacher,), global_batch, micro_batches, self.topology)
        counts = torch.tensor([len(chosen) for chosen in global_batch.representation.positions])
        of_tokens = held_out.repeat_interleave(counts)
        pairs = {pair.student: pair for pair in self.plan.pairs}

        def taps() -> Iterator[_VisitingTap]:
            for number, batch in enumerate(micro_batches):
                mask = of_tokens[batch.representation.rows.cpu()].to(self.topology.device)
                yield _VisitingTap(batch, targets.of(number), pairs, mask, visit)

        self.stage.eval()
        run_schedule(
            list(self.stage),
            self.topology,
            micro_batches,
            taps(),
            last_layer=self.plan.student_last_layer,
            normed_layer=self.plan.student_normed_layer,
            forward_only=True,
        )


class _VisitingTap:
    """Shows the states of the compared layers of a micro-batch, the teacher's beside them, and keeps none."""

    def __init__(
        self,
        batch: PackedBatch,
        targets: MicroBatchTargets,
        pairs: Mapping[int, LayerPair],
        held_out: torch.Tensor,
        visit: Visit,
    ) -> None:
        self.batch = batch
        self.targets = targets
        self.pairs = pairs
        self.held_out = held_out
        self.visit = visit

    def __call__(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        if layer in self.targets:
            states = selected_rows(hidden_states, self.batch.representation.selected)
            self.visit(self.pairs[layer], states, self.targets.take(layer), self.held_out)
        return hidden_states
