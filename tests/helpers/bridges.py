"""Bridges between random models: any numbers will do where gradients are compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_oprd.bridge.record import Bridge, ModelOrigin, Origin, Positions
from megatron_oprd.bridge.store import write_bridge
from megatron_oprd.checkpoint.weights import content_hash
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.types import LayerPair, PairBridge


def random_maps(student: ModelSpec, teacher: ModelSpec, rank: int, seed: int = 3) -> dict[LayerPair, PairBridge]:
    """Maps for every pair of layers that there can be."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    width = teacher.hidden_size
    of_teacher = {
        layer: (torch.linalg.qr(draw(width, rank))[0].T.contiguous(), draw(width))
        for layer in range(1, teacher.num_layers + 1)
    }
    return {
        LayerPair(layer, of): PairBridge(draw(rank, student.hidden_size), teacher_map, mean)
        for layer in range(1, student.num_layers + 1)
        for of, (teacher_map, mean) in of_teacher.items()
    }


DEFAULT = Positions("last_k", 2000, 0, final_norm=True)


def save_random_bridge(
    folder: Path, student: Path, teacher: Path, rank: int, positions: Positions | None = DEFAULT
) -> Path:
    """Save a random bridge between two models; without `positions` it fits any positions."""
    specs = read_model_spec(student), read_model_spec(teacher)
    return save_bridge(folder, student, teacher, random_maps(*specs, rank), positions)


def save_bridge(
    folder: Path,
    student: Path,
    teacher: Path,
    maps: Mapping[LayerPair, PairBridge],
    positions: Positions | None = DEFAULT,
) -> Path:
    """Save a bridge with the given maps."""
    specs = read_model_spec(student), read_model_spec(teacher)
    rank = len(next(iter(maps.values())).student_map)
    models = [
        ModelOrigin(str(path), content_hash(path), spec.num_layers, spec.hidden_size, None)
        for path, spec in zip((student, teacher), specs, strict=True)
    ]
    origin = Origin(*models, positions, None, method="closed_form", coverage=None, seed=None, version=None)
    write_bridge(folder, Bridge(rank, maps, {}, origin))
    return folder
