"""The moments of every pair over all rollouts and ranks: streamed, summed at fixed steps and kept there on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_oprd.bridge.fitting.moments import Moments
from megatron_oprd.bridge.fitting.paired_states import Readers
from megatron_oprd.parallel.rank_zero import on_every_rank, on_rank_zero
from megatron_oprd.runtime.files import commit_partial, explain_os_errors, partial_of, prepare_partial
from megatron_oprd.types import LayerPair, UserError

PARTS = ("train", "held_out")
PairMoments = dict[str, Moments]  # by PARTS


class StreamedMoments:
    """Of the pairs on this rank: sums over all ranks up to the last `fold`, and what this rank has seen since.

    Folding at fixed steps, whether or not a process died in between, makes a resumed fit bit for bit the same.
    """

    def __init__(self, readers: Readers, folder: Path) -> None:
        self.readers = readers
        self.folder = folder
        self.total = {pair: self._empty() for pair in readers.pairs}
        self._since = {pair: self._empty() for pair in readers.pairs}

    def visit(self, pair: LayerPair, student: torch.Tensor, teacher: torch.Tensor, held_out: torch.Tensor) -> None:
        """Count the states [tokens, d_S] and [tokens, d_T] of a pair; `held_out` [tokens] says for which part."""
        for part, chosen in zip(PARTS, (~held_out, held_out), strict=True):
            self._since[pair][part].add(student[chosen], teacher[chosen])

    def fold(self) -> None:
        """Bring the sums up to date. Communicates over the ranks that hold other tokens of the same layers."""
        for pair, parts in self._since.items():
            for part, moments in parts.items():
                for group in self.readers.topology.token_groups:
                    moments.reduce(group)
                self.total[pair][part].merge(moments)
            self._since[pair] = self._empty()

    def save(self, step: int) -> None:
        """Keep the sums of the first `step` steps and drop those of fewer. Collective over the world."""
        target, topology = self.folder / f"step_{step:07d}", self.readers.topology
        on_rank_zero(lambda: prepare_partial(target))

        def write() -> None:
            if topology.replica_rank or topology.tensor_rank:
                return  # it holds the same sums
            with explain_os_errors(target):
                for pair, parts in self.total.items():
                    tensors = {f"{part}.{n}": t.cpu() for part, one in parts.items() for n, t in one.tensors().items()}
                    save_file(tensors, partial_of(target) / _name(pair))

        on_every_rank(write)
        on_rank_zero(lambda: self._commit(target))

    def resume(self) -> int:
        """Take up the sums on the disk; returns of how many steps they are. Collective over the world. Raises UserError
        for a damaged file."""
        saved = on_rank_zero(lambda: sorted(path.name for path in self.folder.glob("step_???????")))
        if not saved:
            return 0
        on_every_rank(lambda: self._load(self.folder / saved[-1]))
        return int(saved[-1].removeprefix("step_"))

    def _load(self, saved: Path) -> None:
        for pair in self.total:
            try:
                tensors = load_file(saved / _name(pair), device=str(self.readers.topology.device))
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{saved / _name(pair)} is missing or corrupt: {error}; remove {self.folder} to sum anew"
                ) from None
            for part in PARTS:
                named = {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")}
                self.total[pair][part] = Moments.from_tensors(named)

    def _commit(self, target: Path) -> None:
        commit_partial(target)
        for older in self.folder.glob("step_*"):
            if older != target:
                shutil.rmtree(older, ignore_errors=True)

    def _empty(self) -> PairMoments:
        readers = self.readers
        widths = readers.spec.hidden_size, readers.teacher_spec.hidden_size
        return {part: Moments.empty(*widths, readers.topology.device) for part in PARTS}


def _name(pair: LayerPair) -> str:
    return f"student_{pair.student}.teacher_{pair.teacher}.safetensors"
