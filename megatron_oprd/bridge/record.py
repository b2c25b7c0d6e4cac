"""What is stored of a bridge: its maps, how well they do, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_oprd.types import LayerPair, PairBridge


@dataclass(frozen=True)
class ModelOrigin:
    """One of the two models; what is not known, or does not exist, is None."""

    path: str | None
    hash: str | None  # of the weights, checkpoint/weights.py::content_hash
    num_layers: int | None
    hidden_size: int
    tokenizer: str | None  # data/tokenizer.py::tokenizer_hash; None: the folder has none


@dataclass(frozen=True)
class Positions:
    """Which tokens' states were read, as the keys of `loss.representation` say it; `k` is None where they read none."""

    mode: Literal["all", "last", "last_k", "first_k"]
    k: int | None
    shift: int
    final_norm: bool

    def __post_init__(self) -> None:
        if self.mode in ("all", "last"):
            object.__setattr__(self, "k", None)


@dataclass(frozen=True)
class Counts:
    """What the maps were fitted on."""

    prompts: int
    sequences: int
    tokens: int
    held_out_tokens: int


@dataclass(frozen=True)
class Origin:
    """Where a bridge comes from; what the file that it was read from does not say is None."""

    student: ModelOrigin
    teacher: ModelOrigin
    positions: Positions | None
    counts: Counts | None
    method: Literal["closed_form", "adamw"]
    coverage: float | None  # share of the selected tokens that are sync points; None: one tokenizer
    seed: int | None
    version: str | None  # of this package


@dataclass(frozen=True)
class PairStatistics:
    """How well a pair's bridge does, on held-out tokens; cosines are means of cos(z_S, z_T) over tokens."""

    eigenvalues: tuple[float, ...]  # [r], of the teacher's covariance on training tokens
    explained_variance: float
    ridge: float | None
    error: float  # mean of ||z_S - z_T||^2
    total: float  # mean of ||z_T||^2
    cosine_before: float
    cosine_after: float


@dataclass(frozen=True)
class Bridge:
    """The maps of every pair at one rank, how well they do and where they come from."""

    rank: int
    maps: Mapping[LayerPair, PairBridge]
    statistics: Mapping[LayerPair, PairStatistics]  # of all pairs, or of none
    origin: Origin
