"""Convert the optimizer configuration to the arguments of mcore."""

from __future__ import annotations

from typing import Any

import torch

from megatron_oprd.config import OptimizerConfig


def optimizer_arguments(config: OptimizerConfig, *, bf16: bool, distributed: bool) -> dict[str, Any]:
    """Return the arguments of mcore's OptimizerConfig.

    Args:
        config: the section `optimizer`.
        bf16: True if the weights have dtype bf16, otherwise float32.
        distributed: True if the optimizer state is divided over the data-parallel ranks.
    """
    adamw = config.name == "adamw"
    return {
        "optimizer": "adam" if adamw else "sgd",
        "lr": config.lr,
        "min_lr": 0.0,
        "weight_decay": config.weight_decay if adamw else 0.0,
        "adam_beta1": config.betas[0],
        "adam_beta2": config.betas[1],
        "adam_eps": config.eps,
        "sgd_momentum": 0.0,
        "clip_grad": config.clip_grad,
        "bf16": bf16,
        "params_dtype": torch.bfloat16 if bf16 else torch.float32,
        "use_distributed_optimizer": distributed,
        **(_precision_aware() if config.precision_aware else {}),
        **(_cpu_offload(config.cpu_offload) if config.cpu_offload else {}),
    }


def _precision_aware() -> dict[str, Any]:
    """Return the arguments for a state of 6 bytes instead of 12 for each parameter.

    Moments are in bf16, gradients in float32. Of the float32 weights only the 16 bits are stored that the bf16 weights
    lack.
    """
    return {
        "use_precision_aware_optimizer": True,
        "main_grads_dtype": torch.float32,
        "main_params_dtype": torch.float32,
        "store_param_remainders": True,
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16,
    }


def _cpu_offload(fraction: float) -> dict[str, Any]:
    """Return the arguments for keeping and updating a fraction of the float32 weights and moments in CPU memory."""
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": fraction,
        "overlap_cpu_optimizer_d2h_h2d": True,
        "use_precision_aware_optimizer": True,  # mcore's offloading requires it
    }
