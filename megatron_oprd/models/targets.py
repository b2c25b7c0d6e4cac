"""The teacher's hidden states from the teacher pass until the student's loss has used them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_oprd.types import StateKey

States = dict[StateKey, torch.Tensor]  # [selected tokens, d_T] of each layer


class TeacherTargets:
    """The teacher's states at the selected tokens, for each micro-batch and student layer, detached.

    No communication, except what `produce` does.

    Args:
        layers: the student layers that this rank compares, and FINAL_STATES for an output-space objective.
        device: the student's device.
        offload: keep the states in CPU memory (pinned, when the student is on CUDA) until they are used.
        produce: a function that computes the states of one micro-batch. With it the teacher is streamed: `of` calls it
            when a micro-batch starts, so that only the micro-batches in flight have states in memory.
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
        self.most_bytes = 0  # maximum of num_bytes so far
        self._produce = produce
        self._states: dict[tuple[int, StateKey], torch.Tensor] = {}  # by micro-batch and student layer

    def put(self, micro_batch: int, states: States) -> None:
        """Store the states of a micro-batch by student layer. Several layers may share one tensor.

        Raises:
            KeyError: `states` lacks a layer that the student compares.
        """
        parked: dict[int, torch.Tensor] = {}
        for layer in self.layers:
            tensor = states[layer]
            if id(tensor) not in parked:
                parked[id(tensor)] = self._park(tensor)
            self._states[micro_batch, layer] = parked[id(tensor)]
        self.most_bytes = max(self.most_bytes, self.num_bytes)

    def of(self, micro_batch: int) -> MicroBatchTargets:
        """Return the targets of one micro-batch; with a streamed teacher, compute them first."""
        if self._produce is not None:
            self.put(micro_batch, self._produce(micro_batch))
        return MicroBatchTargets(self, micro_batch)

    def read(self, micro_batch: int, layer: StateKey) -> torch.Tensor:
        """Return the target of a student layer, on the student's device."""
        return self._states[micro_batch, layer].to(self.device, non_blocking=True)

    def release(self, micro_batch: int, layer: StateKey) -> None:
        """Forget the target of a student layer. Its memory is free once no other layer needs the same tensor."""
        del self._states[micro_batch, layer]

    def __len__(self) -> int:
        """Return the number of targets (one for each micro-batch and student layer) that are not yet released."""
        return len(self._states)

    @property
    def num_bytes(self) -> int:
        """Bytes of all stored states; a tensor that several student layers share counts once."""
        tensors = {id(tensor): tensor for tensor in self._states.values()}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def _park(self, states: torch.Tensor) -> torch.Tensor:
        if not self.offload or states.device.type == "cpu":
            return states
        parked = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
        return parked.copy_(states)


@dataclass(frozen=True)
class MicroBatchTargets(Mapping[StateKey, torch.Tensor]):
    """The targets of one micro-batch by student layer: a view of TeacherTargets."""

    targets: TeacherTargets
    micro_batch: int

    def __contains__(self, layer: object) -> bool:
        """Return True if this rank compares the layer, also after its target was released."""
        return layer in self.targets.layers

    def __getitem__(self, layer: StateKey) -> torch.Tensor:
        return self.targets.read(self.micro_batch, layer)

    def __iter__(self) -> Iterator[StateKey]:
        return iter(self.targets.layers)

    def __len__(self) -> int:
        return len(self.targets.layers)

    def release(self, layer: StateKey) -> None:
        """Forget the target of a layer."""
        self.targets.release(self.micro_batch, layer)

    def take(self, layer: StateKey) -> torch.Tensor:
        """Return the target of a layer and forget it."""
        target = self[layer]
        self.release(layer)
        return target
