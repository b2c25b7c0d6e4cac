"""Export a distributed Megatron-Core model to a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_oprd.hf.companions import config_with_dtype
from megatron_oprd.hf.convert import from_megatron, unshard
from megatron_oprd.hf.experts import fuse_experts
from megatron_oprd.hf.kept import kept_tensors
from megatron_oprd.hf.load import named_parameters
from megatron_oprd.hf.names import Entry, entries, megatron_shapes, shard_shape
from megatron_oprd.hf.weight_files import stored_name
from megatron_oprd.hf.writer import MAX_SHARD_BYTES, HFWriter
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime.files import check_new_folder


@dataclass(frozen=True)
class WrittenWeights:
    """The form of the weights that an export writes."""

    dtype: torch.dtype | None = None  # None: the model's dtype
    max_shard_bytes: int = MAX_SHARD_BYTES  # size limit of a safetensors file


def export_hf(
    stage: torch.nn.ModuleList,
    spec: ModelSpec,
    topology: Topology,
    source: str | Path,
    target: str | Path,
    written: WrittenWeights = WrittenWeights(),
) -> None:
    """Write a model as a Hugging Face folder, with experts in the form of `spec`.

    Args:
        stage: this rank's chunks of the model.
        source: folder whose tokenizer, chat template, generation config and kept tensors are copied.
        target: the new folder.
        written: dtype and size of the safetensors files.

    Collective over the world: the ranks send one parameter at a time to rank 0, which writes it. Rank 0 needs memory
    for two copies of one parameter and one file, and for the experts of one layer if they are fused. Raises UserError
    on every rank when the folder cannot be written, and RuntimeError for a model without all parameters.
    """
    on_rank_zero(lambda: check_new_folder(target))
    tensors = gather_hf_tensors(stage, spec, topology)
    failure = None
    if topology.rank == 0:
        failure = _write(
            tensors, spec, source, target, written.dtype or next(stage.parameters()).dtype, written.max_shard_bytes
        )
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
    """Write all tensors. Return an error instead of raising it, after the remaining tensors have been received.

    Otherwise the sending ranks would wait forever.
    """
    config = config_with_dtype(spec.hf_config, dtype)
    try:
        with HFWriter(
            target, max_shard_bytes, companions=source, config=config, eos_token_ids=spec.eos_token_ids
        ) as writer:
            for name, tensor in fuse_experts(tensors, spec) if spec.fused_experts else tensors:
                writer.write(stored_name(name, text_tower=spec.text_tower), tensor.to(dtype))
            for name, tensor in kept_tensors(source, spec):
                writer.write(name, tensor)
    except Exception as error:
        _exhaust(tensors)
        return error
    return None


def _exhaust(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    for _ in tensors:
        pass


@dataclass(frozen=True)
class _Source:
    """The ranks that send a parameter or its shards, and the shape and dtype of what each rank sends."""

    ranks: tuple[int, ...]  # all tensor-parallel ranks in order, or one rank
    shape: tuple[int, ...]
    dtype: torch.dtype


def gather_hf_tensors(
    stage: torch.nn.ModuleList, spec: ModelSpec, topology: Topology
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) for every Hugging Face tensor of the model on rank 0, and nothing on other ranks.

    The tensors are complete, on the device and in the dtype of the model, in the order of the table. Only the first
    replica of a parameter sends. Collective over the world: every rank must exhaust the iterator.

    Raises:
        RuntimeError: on every rank, if a parameter is missing or has a wrong shape.
    """
    return HFTensorStream(stage, spec, topology).gather(root=0)


class HFTensorStream:
    """The Hugging Face tensors of a distributed model, as often as they are needed.

    Construction is collective over the world. Only the first replica of a parameter sends.

    Raises:
        RuntimeError: on every rank, if a parameter is missing or has a wrong shape.
    """

    def __init__(self, stage: torch.nn.ModuleList, spec: ModelSpec, topology: Topology) -> None:
        self._table = named_parameters(stage)
        self._sources = _sources(self._table, spec, topology)
        self._spec = spec
        self._topology = topology

    def gather(self, root: int | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) for the complete tensors, on the device and in the dtype of the model.

        Collective over the world: every rank must exhaust the iterator. The next parameter is being received while the
        caller uses a tensor, so the memory of two parameters is needed.

        Args:
            root: the rank that receives all tensors. None: each tensor is yielded on the first rank that has a part of
                it, so that pipeline stages and experts do not share a sender.
        """
        received = None
        # All ranks send in the order in which the receivers receive, so no rank waits forever.
        for entry in entries(self._spec):
            source = self._sources[entry.megatron]
            receiver = source.ranks[0] if root is None else root
            if self._topology.rank == receiver:
                requested = entry, [self._request(entry, rank, source) for rank in source.ranks]
                if received is not None:
                    yield from self._complete(*received)
                received = requested
            elif self._topology.rank in source.ranks:
                dist.send(self._table[entry.megatron].detach().contiguous(), dst=receiver)
        if received is not None:
            yield from self._complete(*received)
        dist.barrier()

    def _request(self, entry: Entry, rank: int, source: _Source) -> tuple[torch.Tensor, dist.Work | None]:
        """Return the buffer for what `rank` sends of a parameter, and the operation that fills the buffer."""
        if rank == self._topology.rank:
            return self._table[entry.megatron].detach(), None
        piece = torch.empty(source.shape, dtype=source.dtype, device=self._topology.device)
        return piece, dist.irecv(piece, src=rank)

    def _complete(
        self, entry: Entry, requested: list[tuple[torch.Tensor, dist.Work | None]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for _, operation in requested:
            if operation is not None:
                operation.wait()
        pieces = [piece for piece, _ in requested]
        yield from from_megatron(entry, unshard(entry, pieces), self._spec).items()


def _sources(table: dict[str, torch.nn.Parameter], spec: ModelSpec, topology: Topology) -> dict[str, _Source]:
    """Return the sending ranks of each parameter. The copy of a tied LM head on the last stage is not sent."""
    sends = {
        entry.megatron: (tuple(table[entry.megatron].shape), table[entry.megatron].dtype)
        for entry in entries(spec)
        if entry.megatron in table and _is_sender(entry, topology)
    }
    senders: dict[str, dict[int, tuple[tuple[int, ...], torch.dtype]]] = {}
    for rank, sent in enumerate(gather_objects(sends, dist.group.WORLD)):
        for name, shape_and_dtype in sent.items():
            senders.setdefault(name, {})[rank] = shape_and_dtype
    sources, shapes = {}, megatron_shapes(spec, topology.tensor_size)
    for entry in entries(spec):
        by_rank = senders.get(entry.megatron, {})
        if len(by_rank) != (topology.tensor_size if entry.cut else 1):
            raise RuntimeError(f"the model has no {entry.megatron}: only a whole model can be exported")
        expected = shard_shape(entry, shapes[entry.megatron], topology.tensor_size)
        for shape, _ in by_rank.values():
            if shape != expected:
                raise RuntimeError(f"{entry.megatron} has shape {shape}, the configuration says {expected}")
        _, dtype = next(iter(by_rank.values()))
        sources[entry.megatron] = _Source(tuple(by_rank), expected, dtype)
    return sources


def _is_sender(entry: Entry, topology: Topology) -> bool:
    """Return True if this rank is the first replica of an entry that it has."""
    # Expert parallelism spans tensor-, context- and data-parallel ranks, so experts have replicas of their own.
    replicas = topology.groups.dp_cp if entry.expert is None else topology.groups.expt_dp
    first = dist.get_process_group_ranks(replicas)[0] == topology.rank
    return first and (entry.cut or entry.expert is not None or topology.tensor_rank == 0)
