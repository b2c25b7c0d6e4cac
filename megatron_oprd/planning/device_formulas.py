"""What a CUDA device does that the CPU on which an update is traced cannot: known by formula."""

from __future__ import annotations

import re

import torch

from megatron_oprd.config import Config
from megatron_oprd.hf.load import named_parameters
from megatron_oprd.models.model import Stage

BYTES = {"bf16": 2, "fp32": 4}
_LINEAR = re.compile(r"decoder\.layers\.(\d+)\..*linear_\w+\.weight$")


def as_traced(config: Config) -> Config:
    """The configuration without what needs a device; what it changes of the memory is counted by this module."""
    parallel = {"overlap_grad_reduce": False, "overlap_param_gather": False, "tp_comm_overlap": False}
    optimizer = {"precision_aware": False, "cpu_offload": 0.0}
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update={**parallel, "cp_comm_type": "auto"}),
            "optimizer": config.optimizer.model_copy(update=optimizer),
            "precision": type(config.precision)(dtype=config.precision.dtype, attention="sdpa"),
        }
    )


def state_bytes(config: Config) -> float:
    """Optimizer state on the device, bytes a parameter.

    AdamW keeps two fp32 moments and, beside bf16 weights, an fp32 copy; precision-aware, bf16 moments and the 16 lower
    bits of the copy. The share `optimizer.cpu_offload` of all of it is in CPU memory.
    """
    if config.optimizer.precision_aware:
        return 2 + 2 + 2
    master = 0 if config.precision.dtype == "fp32" else 4
    moments = 8 if config.optimizer.name == "adamw" else 0
    return (master + moments) * (1 - config.optimizer.cpu_offload)


def linear_bytes(config: Config, *, teacher: bool) -> int:
    """Bytes a parameter of the linear layers of blocks that compute in FP8: with the copies that Transformer Engine
    keeps of bf16 weights, transposed too where there is a backward pass; of FP8 weights there is nothing else."""
    size = BYTES[config.precision.dtype]
    if not teacher:
        return size + (2 if config.precision.fp8 else 0)
    return {"off": size, "compute": size + 1, "weights": 1}[config.precision.teacher_fp8]


def is_linear(name: str, config: Config, depth: int) -> bool:
    """Whether a Megatron parameter, by its name in the whole model, is the weight of a linear layer that may compute in
    FP8. `depth`: blocks that the model is built with, of which the lowest and highest stay in bf16."""
    kept, found = config.precision.keep_bf16, _LINEAR.match(name)
    return found is not None and kept.first <= int(found[1]) < depth - kept.last


def linear_parameters(stage: Stage, config: Config, depth: int) -> list[torch.Tensor]:
    """The weights of `is_linear` in these chunks."""
    return [one for name, one in named_parameters(stage).items() if is_linear(name, config, depth)]
