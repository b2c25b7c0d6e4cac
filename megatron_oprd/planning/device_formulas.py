"""Memory of what only a CUDA device can build: FP8 weights and the optimizers with less state.

The memory trace runs on a CPU without these features (`as_traced`) and corrects its result by these formulas.
"""

from __future__ import annotations

import re

import torch

from megatron_oprd.config import Config
from megatron_oprd.hf.load import named_parameters
from megatron_oprd.models.model import Stage

BYTES = {"bf16": 2, "fp32": 4}  # of one number, by precision.dtype
_LINEAR = re.compile(r"decoder\.layers\.(\d+)\..*linear_\w+\.weight$")


def as_traced(config: Config) -> Config:
    """Return the configuration without the features that need a CUDA device."""
    parallel = {"overlap_grad_reduce": False, "overlap_param_gather": False, "tp_comm_overlap": False}
    optimizer = {"precision_aware": False, "cpu_offload": 0.0}
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update={**parallel, "cp_comm_type": "auto"}),
            "optimizer": config.optimizer.model_copy(update=optimizer),
            "train": config.train.model_copy(update={"device": "cpu"}),
            "precision": type(config.precision)(dtype=config.precision.dtype, attention="sdpa"),
        }
    )


def optimizer_state_bytes(config: Config) -> float:
    """Return the optimizer state on the device, in bytes per parameter.

    AdamW has two fp32 moments and, with bf16 weights, an fp32 copy of the weights. If it is precision-aware, it has
    bf16 moments and the lower 16 bits of the fp32 copy. A share `optimizer.cpu_offload` of the state is in CPU memory.
    """
    if config.optimizer.precision_aware:
        return 2 + 2 + 2
    main_parameters = 0 if config.precision.dtype == "fp32" else 4
    moments = 8 if config.optimizer.name == "adamw" else 0
    return (main_parameters + moments) * (1 - config.optimizer.cpu_offload)


def linear_bytes(config: Config, *, teacher: bool) -> int:
    """Return the bytes per weight of a linear layer that may compute in FP8.

    Transformer Engine stores an FP8 copy of a bf16 weight, and a transposed one if there is a backward pass. An FP8
    weight (`precision.teacher_fp8: weights`) has no copy.
    """
    size = BYTES[config.precision.dtype]
    if not teacher:
        return size + (2 if config.precision.fp8 else 0)
    return {"off": size, "compute": size + 1, "weights": 1}[config.precision.first_teacher_fp8]


def may_be_fp8(name: str, config: Config, depth: int) -> bool:
    """Return True if a parameter is the weight of a linear layer that may compute in FP8.

    Args:
        name: The parameter's name in the complete Megatron model.
        config: The configuration. `precision.keep_bf16` names the lowest and highest layers that stay in bf16.
        depth: The number of layers that the model is built with.
    """
    kept, found = config.precision.keep_bf16, _LINEAR.match(name)
    return found is not None and kept.first <= int(found[1]) < depth - kept.last


def fp8_candidates(stage: Stage, config: Config, depth: int) -> list[torch.Tensor]:
    """Return the parameters of a stage that `may_be_fp8`."""
    return [weight for name, weight in named_parameters(stage).items() if may_be_fp8(name, config, depth)]
