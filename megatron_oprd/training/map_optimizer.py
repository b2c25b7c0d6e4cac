"""The optimizer of a bridge's student maps, if they are trained.

Training them is known to raise the cosine while accuracy falls.
"""

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
    """SGD or AdamW, like the student's optimizer but without decay and clipping, for the maps P_S on this rank.

    Every rank that has a layer has its whole map and makes the same update.
    """

    def __init__(self, maps: Mapping[int, StudentMap], config: OptimizerConfig, topology: Topology) -> None:
        self.maps = dict(sorted(maps.items()))
        self.topology = topology
        weights = [student_map.weight for student_map in self.maps.values()]
        self.optimizer: torch.optim.Optimizer | None = None  # None: this stage has no compared layer
        if weights and config.name == "adamw":
            self.optimizer = torch.optim.AdamW(
                weights, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0
            )
        elif weights:
            self.optimizer = torch.optim.SGD(weights, lr=config.lr)

    def step(self, learning_rate: float) -> None:
        """Sum the gradients over the ranks, update the maps and zero the gradients.

        Communicates over: the data- and context-parallel group; under sequence parallelism also the tensor-parallel
        group.
        """
        if self.optimizer is None:
            return
        for student_map in self.maps.values():
            for group in self.topology.token_groups:
                dist.all_reduce(student_map.gradient, group=group)
            student_map.weight.grad = student_map.gradient
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        for student_map in self.maps.values():
            assert student_map.gradient is not None  # maps with an optimizer collect gradients
            student_map.gradient.zero_()

    def save(self, folder: Path) -> None:
        """Write the maps of all stages and their moments on the first rank. Collective over the world.

        Raises UserError on every rank if the file cannot be written.
        """
        own_tensors = {}
        for layer, student_map in self.maps.items():
            state = self.optimizer.state[student_map.weight] if self.optimizer is not None else {}
            own_tensors |= {
                f"layer_{layer}.{name}": value.cpu() for name, value in {"map": student_map.weight, **state}.items()
            }
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
        for layer, student_map in self.maps.items():
            prefix = f"layer_{layer}."
            parts = {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
            if "map" not in parts or parts["map"].shape != student_map.weight.shape:
                raise UserError(
                    f"{folder / FILE} has no map of layer {layer} of shape {tuple(student_map.weight.shape)}; "
                    "continue with the bridge and the layers of the checkpoint, or name a new train.run_dir"
                )
            student_map.weight.copy_(parts.pop("map"))
            assert self.optimizer is not None  # a rank with a map has an optimizer
            state = {
                name: value if name == "step" else value.to(student_map.weight.device) for name, value in parts.items()
            }
            if state:
                self.optimizer.state[student_map.weight] = state
