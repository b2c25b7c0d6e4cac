"""Read and write bridge files: a folder with `bridge.json` and `bridge.safetensors`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_oprd.bridge.ps_bank import read_ps_bank
from megatron_oprd.bridge.record import Bridge, ModelOrigin, Origin, PairStatistics
from megatron_oprd.config import MAKE_A_BRIDGE
from megatron_oprd.runtime.files import write_folder, write_json
from megatron_oprd.types import LayerPair, PairBridge, UserError

DOCUMENT, TENSORS = "bridge.json", "bridge.safetensors"
FORMAT = 1
_ORTHONORMAL = 1e-3  # largest entry of |P_T P_T^T - I| that is accepted


@dataclass(frozen=True)
class _Pair:
    """An entry of the list `pairs` of bridge.json."""

    student: int
    teacher: int
    statistics: PairStatistics | None


@dataclass(frozen=True)
class _Document:
    """The content of bridge.json, without the key `format`."""

    __pydantic_config__ = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    rank: int
    origin: Origin
    pairs: tuple[_Pair, ...]


def write_bridge(folder: str | Path, bridge: Bridge) -> None:
    """Write a bridge into a new folder, completely or not at all. No communication.

    Raises:
        UserError: the folder is not empty, the disk cannot be written, or `read_bridge` would reject the bridge.
    """
    _check_maps(folder, bridge)
    pairs = tuple(_Pair(pair.student, pair.teacher, bridge.statistics.get(pair)) for pair in bridge.maps)
    document = _Document(bridge.rank, bridge.origin, pairs)
    tensors = {
        f"{_prefix(pair)}.{field.name}": getattr(maps, field.name).detach().cpu().clone().contiguous()
        for pair, maps in bridge.maps.items()
        for field in dataclasses.fields(PairBridge)
    }
    with write_folder(folder) as partial:
        save_file(tensors, partial / TENSORS)
        write_json(partial / DOCUMENT, {"format": FORMAT, **dataclasses.asdict(document)})


def read_bridge(path: str | Path) -> Bridge:
    """Read a folder written by `write_bridge`, or a `ps_bank.pt` of the paper's authors. No communication.

    Returns:
        The bridge, with its maps on the CPU.

    Raises:
        UserError: a file is missing, damaged or inconsistent. One line that names the file.
    """
    try:
        return _read(Path(path))
    except UserError as error:
        if error.advice:
            raise
        raise UserError(error.message, f"copy the bridge again or {MAKE_A_BRIDGE}") from None


def _read(path: Path) -> Bridge:
    if path.suffix == ".pt":
        bridge = _from_ps_bank(path, read_ps_bank(path))
    else:
        document = _read_document(path)
        pairs = {LayerPair(pair.student, pair.teacher): pair.statistics for pair in document.pairs}
        statistics = {pair: values for pair, values in pairs.items() if values is not None}
        bridge = Bridge(document.rank, _read_maps(path / TENSORS, tuple(pairs)), statistics, document.origin)
        path = path / TENSORS
    _check_maps(path, bridge)
    return bridge


def _from_ps_bank(path: Path, maps: dict[LayerPair, PairBridge]) -> Bridge:
    first = next(iter(maps.values()), None)
    if first is None or first.student_map.ndim != 2 or first.teacher_map.ndim != 2:
        raise UserError(f"{path} holds no pair of layers with two matrices")
    student, teacher = (
        ModelOrigin(path=None, hash=None, num_layers=None, hidden_size=matrix.shape[-1], tokenizer=None)
        for matrix in (first.student_map, first.teacher_map)
    )
    origin = Origin(student, teacher, None, None, method="adamw", coverage=None, seed=None, version=None)
    return Bridge(rank=len(first.student_map), maps=maps, statistics={}, origin=origin)


def _read_document(folder: Path) -> _Document:
    path = folder / DOCUMENT
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no bridge at {folder}: {DOCUMENT} is missing", MAKE_A_BRIDGE) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise UserError(f"{path} is not of format {FORMAT}, the one that this version reads", MAKE_A_BRIDGE)
    try:
        document = pydantic.TypeAdapter(_Document).validate_json(json.dumps(values))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {where}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None
    if len({(pair.student, pair.teacher) for pair in document.pairs}) < len(document.pairs):
        raise UserError(f"{path}: pairs names a pair of layers twice")
    return document


def _read_maps(path: Path, pairs: Sequence[LayerPair]) -> dict[LayerPair, PairBridge]:
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing, but {DOCUMENT} is there") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or corrupt: {error}") from None
    parts = [field.name for field in dataclasses.fields(PairBridge)]
    expected = {f"{_prefix(pair)}.{part}" for pair in pairs for part in parts}
    for name in sorted(expected ^ tensors.keys()):
        verb = "lacks" if name in expected else "holds"
        raise UserError(f"{path} {verb} {name}, which {DOCUMENT} {'names' if name in expected else 'does not name'}")
    return {pair: PairBridge(**{part: tensors[f"{_prefix(pair)}.{part}"] for part in parts}) for pair in pairs}


def _check_maps(path: str | Path, bridge: Bridge) -> None:
    """Raise UserError for maps of a wrong shape, dtype or layer, and for teacher maps without orthonormal rows."""
    if bridge.rank < 1 or not bridge.maps:
        raise UserError(f"{path} has rank {bridge.rank} and {len(bridge.maps)} pairs of layers; both must be 1 or more")
    widths = {"student": bridge.origin.student.hidden_size, "teacher": bridge.origin.teacher.hidden_size}
    shapes = {
        "student_map": (bridge.rank, widths["student"]),
        "teacher_map": (bridge.rank, widths["teacher"]),
        "teacher_mean": (widths["teacher"],),
    }
    first_of_layer: dict[int, tuple[LayerPair, PairBridge]] = {}  # by teacher layer
    for pair, maps in bridge.maps.items():
        for name, shape in shapes.items():
            tensor, where = getattr(maps, name), f"{path}: {_prefix(pair)}.{name}"
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                raise UserError(
                    f"{where} is {tensor.dtype} of shape {tuple(tensor.shape)}, it must be torch.float32 of {shape}"
                )
            if not torch.isfinite(tensor).all():
                raise UserError(f"{where} has entries that are NaN or infinite")
        for model, layer in (("student", pair.student), ("teacher", pair.teacher)):
            depth = getattr(bridge.origin, model).num_layers
            if layer < 1 or (depth is not None and layer > depth):
                raise UserError(f"{path}: {_prefix(pair)} names a layer that the {model} does not have")
        deviation = maps.teacher_map @ maps.teacher_map.T - torch.eye(bridge.rank).to(maps.teacher_map)
        if deviation.abs().max() > _ORTHONORMAL:
            raise UserError(f"{path}: the rows of {_prefix(pair)}.teacher_map are not orthonormal")
        other, first = first_of_layer.setdefault(pair.teacher, (pair, maps))
        if not all(torch.equal(getattr(first, name), getattr(maps, name)) for name in ("teacher_map", "teacher_mean")):
            raise UserError(
                f"{path}: {_prefix(other)} and {_prefix(pair)} share a teacher layer but not its map and mean"
            )


def _prefix(pair: LayerPair) -> str:
    return f"student_{pair.student}.teacher_{pair.teacher}"
