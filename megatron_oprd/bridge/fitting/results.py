"""Write and print the results of a fit: one bridge for each rank, and the statistics of every layer pair."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from megatron_oprd.bridge.fitting.solve import PairFit
from megatron_oprd.bridge.record import Bridge, Origin, PairStatistics
from megatron_oprd.bridge.store import write_bridge
from megatron_oprd.runtime.files import write_json
from megatron_oprd.types import LayerPair

Fits = dict[LayerPair, dict[int, PairFit]]  # by layer pair and rank
Cosines = Mapping[LayerPair, Mapping[int, tuple[float, float]]]  # (before, after) fitting, by layer pair and rank


def write_results(folder: Path, fits: Fits, cosines: Cosines, origin: Origin) -> None:
    """Write a folder `rank_<r>/` for each rank, replacing an earlier one, and `fit.json`. Call it on one rank."""
    rows = []
    for rank in ranks_of(fits):
        statistics = {pair: _statistics(by_rank[rank], cosines[pair][rank]) for pair, by_rank in fits.items()}
        maps = {pair: by_rank[rank].bridge for pair, by_rank in fits.items()}
        target = folder / f"rank_{rank}"
        shutil.rmtree(target, ignore_errors=True)
        write_bridge(target, Bridge(rank, maps, statistics, origin))
        for pair, values in statistics.items():
            rows.append({"rank": rank, "student": pair.student, "teacher": pair.teacher} | dataclasses.asdict(values))
    write_json(folder / "fit.json", {"origin": dataclasses.asdict(origin), "fits": rows})


def print_results(folder: Path, fits: Fits, cosines: Cosines) -> None:
    """Print a table with one row for each rank (means over the layer pairs) and the setting that selects its bridge."""
    table = Table("rank", "cosine before", "after", "explained variance", "error / size", title="Held-out tokens")
    for rank in ranks_of(fits):
        rank_fits = [by_rank[rank] for by_rank in fits.values()]
        before, after = (mean(by_rank[rank][side] for by_rank in cosines.values()) for side in (0, 1))
        explained = mean(fit.explained_variance for fit in rank_fits)
        error = mean(fit.error / fit.total if fit.total else 0.0 for fit in rank_fits)
        table.add_row(str(rank), f"{before:.3f}", f"{after:.3f}", f"{explained:.3f}", f"{error:.3f}")
    Console().print(table)
    for rank in ranks_of(fits):
        print(f"to train with rank {rank}: loss.representation.bridge={folder / f'rank_{rank}'}")


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
