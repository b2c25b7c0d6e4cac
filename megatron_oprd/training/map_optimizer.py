"""The optimizer of the maps of hidden states, if they are trained: a bridge's student maps, or maps of full width.

Training a bridge's maps is known to raise the cosine while accuracy falls.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_oprd.config import OptimizerConfig
from megatron_oprd.models.state_map import StateMap
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime.files import explain_os_errors
from megatron_oprd.types import UserError

FILE = "maps.safetensors"
ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")


class MapOptimizer:
    """SGD or AdamW, like the student's optimizer but without decay and clipping, for the maps on this rank.

    Every rank that has a layer has its whole map and makes the same update.
    """

    def __init__(
        self, maps: Mapping[int, StateMap], config: OptimizerConfig, topology: Topology, peak_lr: float | None = None
    ) -> None:
        self.maps = dict(sorted(maps.items()))
        self.topology = topology
        self.scale = 1.0 if peak_lr is None else peak_lr / config.lr  # of the student's learning rate
        weights = [weight for state_map in self.maps.values() for weight in state_map.parameters.values()]
        self.optimizer: torch.optim.Optimizer | None = None  # None: this stage has no compared layer
        if weights and config.name == "adamw":
            self.optimizer = torch.optim.AdamW(
                weights, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0
            )
        elif weights:
            self.optimizer = torch.optim.SGD(weights, lr=config.lr)

    def step(self, learning_rate: float) -> None:
        """Sum the gradients over the ranks, update the maps and zero the gradients.

        `learning_rate` is the student's. Communicates over: the data- and context-parallel group; under sequence
        parallelism also the tensor-parallel group.
        """
        if self.optimizer is None:
            return
        for state_map in self.maps.values():
            for name, gradient in state_map.gradients.items():
                for group in self.topology.token_groups:
                    dist.all_reduce(gradient, group=group)
                state_map.parameters[name].grad = gradient
        self.optimizer.param_groups[0]["lr"] = self.scale * learning_rate
        self.optimizer.step()
        for state_map in self.maps.values():
            for gradient in state_map.gradients.values():
                gradient.zero_()

    def save(self, folder: Path) -> None:
        """Write the maps of all stages and their moments on the first rank. Collective over the world.

        Raises UserError on every rank if the file cannot be written.
        """
        own_tensors = {}
        for layer, state_map in self.maps.items():
            for name, weight in state_map.parameters.items():
                state = self.optimizer.state[weight] if self.optimizer is not None else {}
                own_tensors[f"layer_{layer}.{name}"] = weight.cpu()
                own_tensors |= {f"{_prefix(layer, name)}{key}": value.cpu() for key, value in state.items()}
        stages = gather_objects(own_tensors, self.topology.groups.pp)
        tensors = {name: tensor for stage in stages for name, tensor in stage.items()}

        def write() -> None:
            with explain_os_errors(folder / FILE):
                save_file(tensors, folder / FILE)

        on_rank_zero(write)

    def load(self, folder: Path) -> None:
        """Load the maps and moments that `save` wrote. No communication.

        Raises UserError if the file lacks a layer or has another shape.
        """
        saved = load_file(folder / FILE)
        for layer, state_map in self.maps.items():
            for name, weight in state_map.parameters.items():
                stored = saved.get(f"layer_{layer}.{name}")
                if stored is None or stored.shape != weight.shape:
                    raise UserError(
                        f"{folder / FILE} has no map of layer {layer} of shape {tuple(weight.shape)}; continue with "
                        "the bridge or the map and the layers of the checkpoint, or name a new train.run_dir"
                    )
                weight.copy_(stored)
                assert self.optimizer is not None  # a rank with a map has an optimizer
                prefix = _prefix(layer, name)
                state = {
                    key: saved[f"{prefix}{key}"] if key == "step" else saved[f"{prefix}{key}"].to(weight.device)
                    for key in ADAMW_STATE
                    if f"{prefix}{key}" in saved
                }
                if state:
                    self.optimizer.state[weight] = state


def _prefix(layer: int, name: str) -> str:
    """Return the beginning of the names of a matrix's moments. A single matrix, `map`, has its layer's alone."""
    return f"layer_{layer}." if name == "map" else f"layer_{layer}.{name}."
