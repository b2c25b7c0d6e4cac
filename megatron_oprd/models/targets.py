"""The teacher's states between the two models: held for each micro-batch until the student has read them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from megatron_oprd.types import StateKey

States = dict[StateKey, torch.Tensor]  # [selected tokens, d_T] of each layer


class TeacherTargets:
    """For each micro-batch and student layer the teacher's states at the selected tokens, detached.

    `layers`: those that the student compares on this rank. With `produce`, the teacher is streamed: the states of a
    micro-batch are made when it starts, and no more than those of the micro-batches in flight exist. With `offload`
    they wait in CPU memory (pinned, when the student is on CUDA).
    No communication, but for what `produce` does.
    """

    def __init__(
        self,
        layers: Collection[StateKey],
        device: torch.device,
        *,
        offload: bool = False,
        produce: Callable[[int], States] | None = None,
    ) -> None:
        self.layers = frozenset(layers)
        self.device = device
        self.offload = offload
        self._produce = produce
        self._held: dict[tuple[int, StateKey], torch.Tensor] = {}  # by micro-batch and student layer
        self.most_bytes = 0  # the most that was held at one time

    def put(self, micro_batch: int, states: States) -> None:
        """Take the states of a micro-batch, by student layer; several may share one tensor. Raises KeyError when a
        layer that the student compares is not among them."""
        parked: dict[int, torch.Tensor] = {}
        for layer in self.layers:
            one = states[layer]
            if id(one) not in parked:
                parked[id(one)] = self._park(one)
            self._held[micro_batch, layer] = parked[id(one)]
        self.most_bytes = max(self.most_bytes, self.num_bytes)

    def of(self, micro_batch: int) -> MicroBatchTargets:
        """The targets of one micro-batch, made now when the teacher is streamed."""
        if self._produce is not None:
            self.put(micro_batch, self._produce(micro_batch))
        return MicroBatchTargets(self, micro_batch)

    def read(self, micro_batch: int, layer: StateKey) -> torch.Tensor:
        """The target of a student layer, on the student's device."""
        return self._held[micro_batch, layer].to(self.device, non_blocking=True)

    def take(self, micro_batch: int, layer: StateKey) -> torch.Tensor:
        """`read`, and forget it: its memory is free once no other student layer waits for the same states."""
        return self._held.pop((micro_batch, layer)).to(self.device, non_blocking=True)

    def __len__(self) -> int:
        """How many targets of student layers are still to be read."""
        return len(self._held)

    @property
    def num_bytes(self) -> int:
        """Bytes held now, states that several student layers wait for counted once."""
        held = {id(states): states for states in self._held.values()}
        return sum(states.numel() * states.element_size() for states in held.values())

    def _park(self, states: torch.Tensor) -> torch.Tensor:
        if not self.offload or states.device.type == "cpu":
            return states
        parked = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
        return parked.copy_(states)


@dataclass(frozen=True)
class MicroBatchTargets:
    """What the loss sees of `TeacherTargets`: the targets of its own micro-batch, by student layer."""

    targets: TeacherTargets
    micro_batch: int

    def __contains__(self, layer: object) -> bool:
        return layer in self.targets.layers

    def read(self, layer: StateKey) -> torch.Tensor:
        return self.targets.read(self.micro_batch, layer)

    def take(self, layer: StateKey) -> torch.Tensor:
        return self.targets.take(self.micro_batch, layer)
