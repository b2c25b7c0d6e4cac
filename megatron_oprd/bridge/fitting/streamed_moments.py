"""Sum the moments of every layer pair over all rollouts and ranks, and save the sums at fixed steps."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_oprd.bridge.fitting.moments import Moments
from megatron_oprd.bridge.fitting.paired_states import ModelPair
from megatron_oprd.parallel.rank_zero import on_every_rank, on_rank_zero
from megatron_oprd.runtime.files import commit_partial, explain_os_errors, partial_of, prepare_partial
from megatron_oprd.types import LayerPair, UserError

PARTS = ("train", "held_out")
PairMoments = dict[str, Moments]  # by the names in PARTS


class StreamedMoments:
    """Moments of the layer pairs on this rank: the sums over all ranks, and the local states added since `all_reduce`.

    A resumed fit is equal bit for bit, because `all_reduce` is called at the same steps in every fit.
    """

    def __init__(self, models: ModelPair, folder: Path) -> None:
        self.models = models
        self.folder = folder
        self.total = {pair: self._empty() for pair in models.layer_pairs}
        self._local = {pair: self._empty() for pair in models.layer_pairs}

    def add(self, pair: LayerPair, student: torch.Tensor, teacher: torch.Tensor, held_out: torch.Tensor) -> None:
        """Add the states [tokens, d_S] and [tokens, d_T] of a pair to the part train or held_out. No communication.

        Args:
            held_out: [tokens] bool.
        """
        for part, chosen in zip(PARTS, (~held_out, held_out), strict=True):
            self._local[pair][part].add(student[chosen], teacher[chosen])

    def all_reduce(self) -> None:
        """Add the local states of all ranks to `total`.

        Communicates over: the ranks that have other tokens of the same layers (`Topology.token_groups`).
        """
        for pair, parts in self._local.items():
            for part, moments in parts.items():
                for group in self.models.topology.token_groups:
                    moments.reduce(group)
                self.total[pair][part].merge(moments)
            self._local[pair] = self._empty()

    def save(self, step: int) -> None:
        """Save the sums of the first `step` steps and delete older files. Collective over the world."""
        target, topology = self.folder / f"step_{step:07d}", self.models.topology
        on_rank_zero(lambda: prepare_partial(target))

        def write() -> None:
            if topology.replica_rank or topology.tensor_rank:
                return  # another rank writes the same sums
            with explain_os_errors(target):
                for pair, parts in self.total.items():
                    tensors = {f"{part}.{name}": t.cpu() for part in PARTS for name, t in parts[part].tensors().items()}
                    save_file(tensors, partial_of(target) / _name(pair))

        on_every_rank(write)
        on_rank_zero(lambda: self._commit(target))

    def resume(self) -> int:
        """Load the saved sums and return the number of steps that they contain. Collective over the world.

        Raises:
            UserError: a file is damaged.
        """
        saved = on_rank_zero(lambda: sorted(path.name for path in self.folder.glob("step_???????")))
        if not saved:
            return 0
        on_every_rank(lambda: self._load(self.folder / saved[-1]))
        return int(saved[-1].removeprefix("step_"))

    def _load(self, saved: Path) -> None:
        for pair in self.total:
            try:
                tensors = load_file(saved / _name(pair), device=str(self.models.topology.device))
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
        widths = self.models.student_spec.hidden_size, self.models.teacher_spec.hidden_size
        return {part: Moments.empty(*widths, self.models.topology.device) for part in PARTS}


def _name(pair: LayerPair) -> str:
    return f"student_{pair.student}.teacher_{pair.teacher}.safetensors"
