"""The content of a bridge file: maps, held-out statistics and origin.

The names and the order of the fields of all classes but `Bridge` are those of the keys of `bridge.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_oprd.types import LayerPair, PairBridge


@dataclass(frozen=True)
class ModelOrigin:
    """The properties of a model that a bridge depends on. None means unknown; check_bridge skips unknown properties."""

    path: str | None  # folder of the model; not compared
    hash: str | None  # content_hash of the weights
    num_layers: int | None
    hidden_size: int
    tokenizer: str | None  # tokenizer_hash; None also if the model has no tokenizer


@dataclass(frozen=True)
class Positions:
    """The token positions whose states the maps were fitted on, as in `loss.representation`."""

    mode: Literal["all", "last", "last_k", "first_k"]  # loss.representation.positions
    k: int | None  # None for the modes all and last, which do not use k
    shift: int
    final_norm: bool

    def __post_init__(self) -> None:
        if self.mode in ("all", "last"):
            object.__setattr__(self, "k", None)


@dataclass(frozen=True)
class Counts:
    """The size of the data that the maps were fitted on. Sequences and tokens include the held-out ones."""

    prompts: int
    sequences: int
    tokens: int  # selected tokens
    held_out_tokens: int


@dataclass(frozen=True)
class Origin:
    """The models, tokens and settings of a fit. None means unknown (the authors' files do not contain it)."""

    student: ModelOrigin
    teacher: ModelOrigin
    positions: Positions | None
    counts: Counts | None
    method: Literal["closed_form", "adamw"]
    coverage: float | None  # share of the selected tokens that are sync points; None if both models use one tokenizer
    seed: int | None  # train.seed
    version: str | None  # of this package


@dataclass(frozen=True)
class PairStatistics:
    """The quality of one pair's bridge on held-out tokens."""

    eigenvalues: tuple[float, ...]  # [r] of the covariance of the teacher's states on training tokens
    explained_variance: float  # share of the teacher's variance in the r directions, from 0 to 1
    ridge: float | None  # None for the method adamw
    error: float  # mean of ||z_S - z_T||^2
    total: float  # mean of ||z_T||^2
    cosine_before: float  # mean of cos(z_S, z_T) with the initial random map
    cosine_after: float  # mean of cos(z_S, z_T) with the fitted map


@dataclass(frozen=True)
class Bridge:
    """A bridge: the maps of every layer pair at one rank, with their statistics and origin."""

    rank: int  # r, rows of P_S and P_T
    maps: Mapping[LayerPair, PairBridge]
    statistics: Mapping[LayerPair, PairStatistics]  # empty if the file contains none
    origin: Origin
