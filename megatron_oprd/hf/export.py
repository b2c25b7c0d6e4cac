"""A Megatron-Core model, spread over tensor-parallel ranks and pipeline stages, back into a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_oprd.files import check_new_folder
from megatron_oprd.hf.convert import from_megatron, unshard
from megatron_oprd.hf.load import named_parameters
from megatron_oprd.hf.names import Entry, entries, megatron_shapes, shard_shape
from megatron_oprd.hf.stream import MAX_SHARD_BYTES, HFWriter, config_with_dtype
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.together import on_rank_zero
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.types import ModelSpec


def export_hf(
    model: torch.nn.Module,
    spec: ModelSpec,
    topology: Topology,
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write this model, in `dtype` (None: the model's), to the new folder `target`, with `source`'s tokenizer, chat
    template and generation config beside it. transformers opens the result like any other folder.

    Collective over the world: one parameter at a time is gathered over the tensor-parallel group and sent along the
    pipeline group to rank 0, which writes. Memory beyond the model, on rank 0: one parameter twice and one shard.
    Raises UserError on every rank when the folder cannot be written, RuntimeError for a model that lacks a parameter.
    """
    on_rank_zero(lambda: check_new_folder(target))
    tensors = gather_hf_tensors(model, spec, topology)
    failure = None
    if topology.rank == 0:
        failure = _write(tensors, spec, source, target, dtype or next(model.parameters()).dtype, max_shard_bytes)
    else:
        _exhaust(tensors)

    def outcome() -> None:
        if failure is not None:
            raise failure

    on_rank_zero(outcome)


def _write(
    tensors: Iterator[tuple[str, torch.Tensor]],
    spec: ModelSpec,
    source: str | Path,
    target: str | Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> Exception | None:
    """Write all tensors; returns the error instead of raising it, after taking the remaining tensors from their
    senders: they would wait for ever."""
    config = config_with_dtype(spec.hf_config, dtype)
    try:
        with HFWriter(target, max_shard_bytes, companions=source, config=config) as writer:
            for name, tensor in tensors:
                writer.write(name, tensor.to(dtype))
    except Exception as error:
        _exhaust(tensors)
        return error
    return None


def _exhaust(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    for _ in tensors:
        pass


@dataclass(frozen=True)
class _Place:
    """Which pipeline rank holds a parameter, and what the whole of it looks like."""

    pipeline_rank: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def gather_hf_tensors(
    model: torch.nn.Module, spec: ModelSpec, topology: Topology
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every Hugging Face tensor of the model in the table's order, on rank 0; nothing elsewhere.

    Collective over the world; every rank must exhaust it. The tensors are whole, on the model's device and in its
    dtype. Only the first data-parallel replica communicates. Raises RuntimeError, on every rank, for a model that
    misses a parameter or has one of another shape.
    """
    table = named_parameters(model)
    return _stream(table, _places(table, spec, topology), spec, topology)


def _stream(
    table: dict[str, torch.nn.Parameter], places: dict[str, _Place], spec: ModelSpec, topology: Topology
) -> Iterator[tuple[str, torch.Tensor]]:
    if topology.data_rank == 0:
        for entry in entries(spec):
            whole = _whole(entry, table.get(entry.megatron), places[entry.megatron], topology)
            if whole is not None:
                yield from from_megatron(entry, whole, spec).items()
    dist.barrier()


def _places(table: dict[str, torch.nn.Parameter], spec: ModelSpec, topology: Topology) -> dict[str, _Place]:
    """The first stage that holds each parameter. The copy of a tied head on the last stage is not asked for."""
    held = {name: (tuple(parameter.shape), parameter.dtype) for name, parameter in table.items()}
    stages = gather_objects(held, topology.groups.pp)
    places, shapes = {}, megatron_shapes(spec, topology.tensor_size)
    for entry in entries(spec):
        rank = next((rank for rank, held in enumerate(stages) if entry.megatron in held), None)
        if rank is None:
            raise RuntimeError(f"the model has no {entry.megatron}: only a whole model can be exported")
        (shape, dtype), whole = stages[rank][entry.megatron], shapes[entry.megatron]
        expected = shard_shape(entry, whole, topology.tensor_size)
        if shape != expected:
            raise RuntimeError(f"{entry.megatron} has shape {shape}, the configuration says {expected}")
        places[entry.megatron] = _Place(rank, whole, dtype)
    return places


def _whole(entry: Entry, parameter: torch.Tensor | None, place: _Place, topology: Topology) -> torch.Tensor | None:
    """The whole parameter on rank 0 (tensor-parallel rank 0 of the first stage), None elsewhere."""
    whole = None
    if parameter is not None and topology.pipeline_rank == place.pipeline_rank:
        whole = _gather(entry, parameter.detach(), topology)
    if place.pipeline_rank == 0:
        return whole
    ranks = dist.get_process_group_ranks(topology.groups.pp)
    if whole is not None:
        dist.send(whole.contiguous(), dst=ranks[0], group=topology.groups.pp)
        return None
    if topology.rank != 0:
        return None
    whole = torch.empty(place.shape, dtype=place.dtype, device=topology.device)
    dist.recv(whole, src=ranks[place.pipeline_rank], group=topology.groups.pp)
    return whole


def _gather(entry: Entry, parameter: torch.Tensor, topology: Topology) -> torch.Tensor | None:
    """The whole parameter on tensor-parallel rank 0, None on the others."""
    if topology.tensor_size == 1 or entry.layout == "copy":
        return parameter if topology.tensor_rank == 0 else None
    group = topology.groups.tp
    pieces = [torch.empty_like(parameter) for _ in range(topology.tensor_size)] if topology.tensor_rank == 0 else None
    dist.gather(parameter.contiguous(), pieces, dst=dist.get_process_group_ranks(group)[0], group=group)
    return None if pieces is None else unshard(entry, pieces)
