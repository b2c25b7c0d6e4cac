"""Parameters of a model and of one rank's part of it, computed from the model's sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_oprd.hf.names import entries, megatron_shapes, shard_shape
from megatron_oprd.model_spec import ModelSpec


@dataclass(frozen=True)
class ModelDivision:
    """Division of a model over ranks."""

    tensor: int  # tensor-parallel size
    pipeline: int  # pipeline-parallel size
    expert: int  # expert-parallel size
    stages: tuple[int, ...]  # layers on each stage; with virtual pipelining, all first chunks come before all second


def rank_parameters(
    spec: ModelSpec,
    division: ModelDivision,
    pipeline_rank: int,
    *,
    lm_head: bool,
    only: Callable[[str], bool] = lambda name: True,
) -> tuple[int, int]:
    """Return the parameters (dense, experts) of one rank of a pipeline rank.

    Args:
        spec: The model.
        division: How it is divided.
        pipeline_rank: The pipeline rank.
        lm_head: True if the model has an LM head.
        only: Return True for the name of a parameter that counts.
    """
    ends = list(itertools.accumulate(division.stages, initial=0))
    own_stages = range(pipeline_rank, len(division.stages), division.pipeline)
    own_layers = {layer for stage in own_stages for layer in range(ends[stage], ends[stage + 1])}
    first, last = 0 in own_stages, len(division.stages) - 1 in own_stages

    def on_this_rank(name: str) -> bool:
        if not only(name):
            return False
        if name.startswith("decoder.layers."):
            return int(name.split(".")[2]) in own_layers
        if name.startswith("embedding"):
            return first or (last and lm_head and spec.tied_embeddings)
        return last and (lm_head or not name.startswith("output_layer"))

    shapes = megatron_shapes(spec, division.tensor)
    dense = experts = 0
    for entry in entries(spec):
        if not on_this_rank(entry.megatron):
            continue
        count = math.prod(shard_shape(entry, shapes[entry.megatron], division.tensor))
        if entry.expert is None:
            dense += count
        else:
            experts += count
    return dense, experts // division.expert
