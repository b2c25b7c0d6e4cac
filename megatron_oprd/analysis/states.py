"""Run the teacher, the student and the student before its training on the same rollouts, layer pair by layer pair."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_oprd.models.layer_plan import LayerPlan
from megatron_oprd.models.model import Stage
from megatron_oprd.models.projection import StudentMap
from megatron_oprd.models.tap_rows import selected_rows
from megatron_oprd.models.targets import MicroBatchTargets
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.training.schedule import PassSettings, run_schedule
from megatron_oprd.training.teacher import Teacher
from megatron_oprd.training.teacher_pass import teacher_pass
from megatron_oprd.types import DeviceBatch, LayerPair, StateKey


@dataclass(frozen=True)
class LayerStates:
    """The compared states of a layer pair at the selected tokens of one micro-batch on this rank.

    With a bridge they are the projections z_S and z_T (OPRD eq. (14)).
    """

    pair: LayerPair
    students: Mapping[str, torch.Tensor]  # [tokens, width] by the name of the student's state: before, after
    teacher: torch.Tensor  # [tokens, width]
    token_numbers: torch.Tensor  # [tokens] int64: the number of each token among the selected tokens of the batch


@dataclass(frozen=True)
class ComparedModels:
    """This rank's part of the models that are compared."""

    stage: Stage  # the student's chunks
    hidden_size: int  # of the student
    topology: Topology  # the student's layout
    teacher: Teacher
    before: Teacher | None  # the student before its training; its plan pairs each layer with itself
    maps: Mapping[int, StudentMap]  # of a bridge, by student layer

    @property
    def plan(self) -> LayerPlan:
        """Return the layer plan without next-token distributions and hidden flow."""
        return dataclasses.replace(self.teacher.plan, output=False, flow=())

    @property
    def layer_pairs(self) -> tuple[LayerPair, ...]:
        """Return the layer pairs whose student layer is on this rank."""
        return tuple(pair for pair in self.plan.pairs if self.plan.student_stage(pair.student) in self.topology.stages)

    def width(self, layer: int) -> int:
        """Return the number of compared values of a token: the hidden size, or the rank of the bridge."""
        return len(self.maps[layer].weight) if layer in self.maps else self.hidden_size


def compute_states(models: ComparedModels, global_batch: GlobalBatch, add: Callable[[LayerStates], None]) -> None:
    """Run all models and call `add` for each layer pair on this rank and each micro-batch.

    Memory: the targets of one global batch, of the teacher and of the student before its training.
    Communicates over: the process groups of all models.
    """
    plan, topology, stage = models.plan, models.topology, models.stage
    micro_batches = global_batch.micro_batches(topology)
    frozen = [dataclasses.replace(models.teacher, plan=plan), *([models.before] if models.before else [])]
    targets = [teacher_pass([model], global_batch, micro_batches, topology)[0] for model in frozen]

    def taps() -> Iterator[_CompareTap]:
        for number, batch in enumerate(micro_batches):
            yield _CompareTap(batch, [one.of(number) for one in targets], models, add)

    training = stage.training
    stage.eval()
    settings = PassSettings(plan.student_last_layer, plan.student_normed_layer)
    run_schedule(list(stage), topology, micro_batches, taps(), settings)
    stage.train(training)
    assert not any(map(len, targets)), "states that were never compared"


class _CompareTap:
    """A tap that passes the states of one micro-batch to `add` and returns them unchanged."""

    def __init__(
        self,
        batch: DeviceBatch,
        targets: list[MicroBatchTargets],
        models: ComparedModels,
        add: Callable[[LayerStates], None],
    ) -> None:
        self.selected = batch.representation.selected
        self.token_numbers = batch.host.representation.token_numbers.to(models.topology.device)
        self.targets = targets
        self.maps = models.maps
        self.pairs = {pair.student: pair for pair in models.plan.pairs}
        self.add = add

    def __call__(self, key: StateKey, hidden_states: torch.Tensor) -> torch.Tensor:
        if not isinstance(key, int) or key not in self.targets[0]:
            return hidden_states
        teacher, *others = (targets.take(key) for targets in self.targets)
        states = {"after": selected_rows(hidden_states, self.selected)}
        if others:
            states = {"before": others[0], **states}
        if key in self.maps:
            states = {name: self.maps[key](one) for name, one in states.items()}
        self.add(LayerStates(self.pairs[key], states, teacher, self.token_numbers))
        return hidden_states
