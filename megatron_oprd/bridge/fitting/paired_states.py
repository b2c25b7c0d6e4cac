"""Compute the hidden states of both models on the same rollouts, layer pair by layer pair, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.layer_plan import LayerPlan
from megatron_oprd.models.model import Stage
from megatron_oprd.models.tap_rows import selected_rows
from megatron_oprd.models.targets import MicroBatchTargets
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.training.schedule import PassSettings, run_schedule
from megatron_oprd.training.teacher import Teacher
from megatron_oprd.training.teacher_pass import teacher_pass
from megatron_oprd.types import DeviceBatch, LayerPair

# Called with (pair, student states [tokens, d_S], teacher states [tokens, d_T], held out [tokens] bool).
AddStates = Callable[[LayerPair, torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class ModelPair:
    """This rank's part of the student and of the teacher, and the pairs of layers that the bridge connects."""

    student_spec: ModelSpec
    teacher_spec: ModelSpec
    plan: LayerPlan
    topology: Topology
    stage: Stage  # of the student
    teacher: Teacher

    @property
    def layer_pairs(self) -> tuple[LayerPair, ...]:
        """The layer pairs whose student layer is on this rank."""
        stages = self.topology.stages
        return tuple(pair for pair in self.plan.pairs if self.plan.student_stage(pair.student) in stages)

    def compute_states(self, global_batch: GlobalBatch, held_out: torch.Tensor, add: AddStates) -> None:
        """Run both models and call `add` with the states of each layer pair on this rank, micro-batch by micro-batch.

        The states are those of the selected tokens of this rank's micro-batches. Memory: the targets of one global
        batch, as in `teacher_pass`.

        Args:
            held_out: [rollouts] bool.

        Communicates over: the process groups of both models.
        """
        micro_batches = global_batch.micro_batches(self.topology)
        targets, _ = teacher_pass((self.teacher,), global_batch, micro_batches, self.topology)
        tokens_per_rollout = torch.tensor([len(chosen) for chosen in global_batch.representation.positions])
        held_out_tokens = held_out.repeat_interleave(tokens_per_rollout)
        pairs = {pair.student: pair for pair in self.plan.pairs}

        def taps() -> Iterator[_PairTap]:
            for number, batch in enumerate(micro_batches):
                mask = held_out_tokens[batch.host.representation.token_numbers].to(self.topology.device)
                yield _PairTap(batch, targets.of(number), pairs, mask, add)

        self.stage.eval()
        settings = PassSettings(self.plan.student_last_layer, self.plan.student_normed_layer)
        run_schedule(list(self.stage), self.topology, micro_batches, taps(), settings)


class _PairTap:
    """Tap that passes the student's and the teacher's states of a micro-batch to `add`. It stores no states."""

    def __init__(
        self,
        batch: DeviceBatch,
        targets: MicroBatchTargets,
        pairs: Mapping[int, LayerPair],
        held_out: torch.Tensor,
        add: AddStates,
    ) -> None:
        self.batch = batch
        self.targets = targets
        self.pairs = pairs
        self.held_out = held_out
        self.add = add

    def __call__(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        if layer in self.targets:
            states = selected_rows(hidden_states, self.batch.representation.selected)
            self.add(self.pairs[layer], states, self.targets.take(layer), self.held_out)
        return hidden_states
