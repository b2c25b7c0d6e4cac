"""The student in training: trainable parameters, mcore's DDP, optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_oprd.config import Config, OptimizerConfig
from megatron_oprd.hf.load import named_parameters
from megatron_oprd.models.layer_plan import LayerPlan
from megatron_oprd.models.model import Stage
from megatron_oprd.models.state_map import StateMap
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime import cpu_stand_ins
from megatron_oprd.training.map_optimizer import MapOptimizer
from megatron_oprd.training.optimizer_arguments import optimizer_arguments
from megatron_oprd.training.overlap import wrap
from megatron_oprd.training.teacher_average import TeacherAverage


@dataclass(frozen=True)
class Student:
    """This rank's chunks of the student, its layout and its optimizer; with a bridge or maps, those of this rank."""

    stage: Stage
    plan: LayerPlan
    topology: Topology
    ddp: list[DistributedDataParallel]  # one around each chunk
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    maps: Mapping[int, StateMap] = field(default_factory=dict)  # by student layer, those on this rank
    map_optimizer: MapOptimizer | None = None
    average: TeacherAverage | None = None  # of the weights, for a teacher that follows the student


def build_student(
    stage: Stage,
    config: Config,
    plan: LayerPlan,
    topology: Topology,
    maps: Mapping[int, StateMap] | None = None,
) -> Student:
    """Wrap loaded chunks for training.

    `maps`: the maps of the compared layers; the student keeps those of this rank.
    Communicates over: the world (mcore aligns parameter groups).
    """
    freeze_unreached(stage, config, plan)
    distributed = (
        config.parallel.distributed_optimizer and config.optimizer.name == "adamw"
    )  # SGD has no state to divide
    with cpu_stand_ins.cpu_devices():
        ddp = wrap(stage, config.parallel, distributed=distributed)
        if topology.device.type == "cuda":
            _add_to_main_grads(stage)
        bf16 = config.precision.dtype == "bf16"
        arguments = optimizer_arguments(config.optimizer, bf16=bf16, distributed=distributed)
        optimizer = get_megatron_optimizer(MegatronOptimizerConfig(**arguments), ddp)
    stage.config.finalize_model_grads_func = _finalize_without_division
    own_maps = {layer: one for layer, one in (maps or {}).items() if plan.student_stage(layer) in topology.stages}
    representation = config.loss.representation
    return Student(
        stage,
        plan,
        topology,
        ddp,
        optimizer,
        _scheduler(optimizer, config.optimizer, config.train.steps),
        own_maps,
        MapOptimizer(own_maps, config.optimizer, topology, representation.map.lr)
        if representation.trains_maps
        else None,
    )


def _add_to_main_grads(stage: Stage) -> None:
    """Let the products that compute weights' gradients add them to `main_grad`, in Transformer Engine's layers.

    Megatron-Core's setting for it, gradient_accumulation_fusion, would also need Apex for embedding and LM head.
    """
    for module in stage.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def freeze_unreached(stage: Stage, config: Config, plan: LayerPlan) -> None:
    """Set requires_grad to False for parameters that the user freezes and for parameters that no loss reaches.

    A parameter without a gradient must not be decayed, and needs no optimizer state. Freezing either name of a tied
    embedding freezes the one matrix, so that its copies on the first and last pipeline stage stay equal.
    """
    frozen = set(config.student.freeze)
    tied = any(chunk.share_embeddings_and_output_weights for chunk in stage)
    for name, parameter in named_parameters(stage).items():
        if name.startswith("decoder.layers."):
            reached = int(name.split(".")[2]) < plan.student_last_layer
        elif name.startswith("decoder.final_layernorm"):
            reached = plan.student_final_norm
        elif tied:
            reached = not frozen
        elif name.startswith("embedding"):
            reached = "embedding" not in frozen
        else:  # an untied LM head, which hidden states do not depend on
            reached = plan.output and "lm_head" not in frozen
        parameter.requires_grad_(reached)


def _scheduler(optimizer: MegatronOptimizer, config: OptimizerConfig, steps: int) -> OptimizerParamScheduler:
    """Build the schedule: linear warm-up over `warmup_fraction` of the steps, then constant or cosine to 0.

    With W steps of warm-up, step n has the rate n / (W + 1) of the peak: no step has a rate of 0.
    """
    warmup_steps = min(math.floor(config.warmup_fraction * steps), max(steps - 1, 0))
    decay = config.weight_decay if config.name == "adamw" else 0.0
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr / (warmup_steps + 1),
        max_lr=config.lr,
        min_lr=0.0,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=max(steps, 1),
        lr_decay_style=config.schedule,
        start_wd=decay,
        end_wd=decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def _finalize_without_division(model: list[torch.nn.Module], num_tokens: Any = None, **kwargs: Any) -> None:
    """Reduce gradients over data-parallel ranks and shared embeddings, without division by a number of tokens.

    The token weights are normalised over the global batch already.
    """
    finalize_model_grads(model, None, **kwargs)
