"""The update of the student's side of a bridge, where it is trained. Known to raise the cosine while accuracy falls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_oprd.config import OptimizerConfig
from megatron_oprd.models.projection import StudentMap
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime.files import explain_os_errors
from megatron_oprd.types import UserError

FILE = "maps.safetensors"


class MapOptimizer:
    """Plain SGD or AdamW, as of the student, without decay and clipping, of P_S of the layers on this rank.

    Every rank that holds a layer holds all of its map and makes the same update of it.
    """

    def __init__(self, maps: Mapping[int, StudentMap], config: OptimizerConfig, topology: Topology) -> None:
        self.maps = dict(sorted(maps.items()))
        self.topology = topology
        weights = [one.weight for one in self.maps.values()]
        self.optimizer: torch.optim.Optimizer | None = None  # a stage may own no compared layer
        if weights and config.name == "adamw":
            self.optimizer = torch.optim.AdamW(weights, lr=config.lr, betas=config.betas, weight_decay=0.0)
        elif weights:
            self.optimizer = torch.optim.SGD(weights, lr=config.lr)

    def step(self, learning_rate: float) -> None:
        """One update from the gradients of all ranks, which are zero after it. Communicates over the data- and
        context-parallel group, under sequence parallelism over the tensor-parallel one too."""
        if self.optimizer is None:
            return
        for one in self.maps.values():
            for group in self.topology.token_groups:
                dist.all_reduce(one.gradient, group=group)
            one.weight.grad = one.gradient
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        for one in self.maps.values():
            assert one.gradient is not None  # whoever has an optimizer gathers gradients
            one.gradient.zero_()

    def save(self, folder: Path) -> None:
        """Write the maps of all stages and their moments. Collective over the world; its first rank writes. Raises
        UserError on every rank for a disk that does not take it."""
        mine = {}
        for layer, one in self.maps.items():
            state = self.optimizer.state[one.weight] if self.optimizer is not None else {}
            mine |= {f"layer_{layer}.{name}": value.cpu() for name, value in {"map": one.weight, **state}.items()}
        stages = gather_objects(mine, self.topology.groups.pp)
        tensors = {name: tensor for stage in stages for name, tensor in stage.items()}

        def write() -> None:
            with explain_os_errors(folder / FILE):
                save_file(tensors, folder / FILE)

        on_rank_zero(write)

    def load(self, folder: Path) -> None:
        """Put the maps and moments back that `save` wrote. No communication. Raises UserError for a layer or a shape
        that the file does not have."""
        held = load_file(folder / FILE)
        for layer, one in self.maps.items():
            prefix = f"layer_{layer}."
            parts = {name.removeprefix(prefix): value for name, value in held.items() if name.startswith(prefix)}
            if "map" not in parts or parts["map"].shape != one.weight.shape:
                raise UserError(f"{folder / FILE} has no map of layer {layer} of shape {tuple(one.weight.shape)}")
            one.weight.copy_(parts.pop("map"))
            assert self.optimizer is not None  # there is a layer
            moved = {name: value if name == "step" else value.to(one.weight.device) for name, value in parts.items()}
            if moved:
                self.optimizer.state[one.weight] = moved
