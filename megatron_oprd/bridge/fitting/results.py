"""What a fit leaves: a bridge for each rank, and how well each does, layer by layer."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_oprd.bridge.fitting.solve import PairFit
from megatron_oprd.bridge.record import Bridge, Origin, PairStatistics
from megatron_oprd.bridge.store import write_bridge
from megatron_oprd.runtime.files import write_json
from megatron_oprd.types import LayerPair

Fits = dict[LayerPair, dict[int, PairFit]]  # by pair and rank
Cosines = Mapping[LayerPair, Mapping[int, tuple[float, float]]]  # before and after fitting


def write_results(folder: Path, fits: Fits, cosines: Cosines, origin: Origin) -> None:
    """`rank_<r>/` for each rank, in the place of an earlier one, and `fit.json`. One rank calls it."""
    rows = []
    for rank in ranks_of(fits):
        told = {pair: _statistics(by_rank[rank], cosines[pair][rank]) for pair, by_rank in fits.items()}
        maps = {pair: by_rank[rank].bridge for pair, by_rank in fits.items()}
        target = folder / f"rank_{rank}"
        shutil.rmtree(target, ignore_errors=True)
        write_bridge(target, Bridge(rank, maps, told, origin))
        for pair, one in told.items():
            rows.append({"rank": rank, "student": pair.student, "teacher": pair.teacher} | dataclasses.asdict(one))
    write_json(folder / "fit.json", {"origin": dataclasses.asdict(origin), "fits": rows})


def print_results(folder: Path, fits: Fits, cosines: Cosines) -> None:
    """A row for each rank, means over the pairs."""
    table = Table("rank", "cosine before", "after", "explained variance", "error / size", title="Held-out tokens")
    for rank in ranks_of(fits):
        of_rank = [by_rank[rank] for by_rank in fits.values()]
        before, after = (statistics.mean(one[rank][side] for one in cosines.values()) for side in (0, 1))
        explained = statistics.mean(one.explained_variance for one in of_rank)
        error = statistics.mean(one.error / one.total if one.total else 0.0 for one in of_rank)
        table.add_row(str(rank), f"{before:.3f}", f"{after:.3f}", f"{explained:.3f}", f"{error:.3f}")
    Console().print(table)
    for rank in ranks_of(fits):
        print(f"loss.representation.bridge={folder / f'rank_{rank}'}")


def ranks_of(fits: Fits) -> list[int]:
    return list(next(iter(fits.values())))


def _statistics(fit: PairFit, cosines: tuple[float, float]) -> PairStatistics:
    before, after = cosines
    return PairStatistics(
        eigenvalues=tuple(fit.eigenvalues.tolist()),
        explained_variance=fit.explained_variance,
        ridge=fit.ridge,
        error=fit.error,
        total=fit.total,
        cosine_before=before,
        cosine_after=after,
    )
