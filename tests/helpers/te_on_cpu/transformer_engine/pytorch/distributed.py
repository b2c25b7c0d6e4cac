"""Activation checkpointing that recomputes in the precision of the forward pass, and the tracker of random states."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from .quantization import FP8GlobalStateManager

_recompute_enabled = False


class activation_recompute_forward(AbstractContextManager):
    def __init__(self, activation_recompute: bool = False, recompute_phase: bool = False):
        self.activation_recompute, self.recompute_phase = activation_recompute, recompute_phase

    def __enter__(self) -> None:
        global _recompute_enabled
        _recompute_enabled = self.activation_recompute and FP8GlobalStateManager.is_fp8_enabled()

    def __exit__(self, *exc_details: Any) -> None:
        global _recompute_enabled
        _recompute_enabled = False


def is_fp8_activation_recompute_enabled() -> bool:
    return _recompute_enabled


def checkpoint(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Recompute `function` in backward. Random states are not replayed: the tested models have no dropout."""
    use_reentrant = kwargs.pop("use_reentrant", True)
    for ignored in ("distribute_saved_activations", "tp_group", "get_rng_state_tracker"):
        kwargs.pop(ignored, None)
    precision = FP8GlobalStateManager.get_autocast_state()

    def run(*inputs: Any) -> Any:
        before = FP8GlobalStateManager.get_autocast_state()
        FP8GlobalStateManager.set_autocast_state(precision)
        try:
            with activation_recompute_forward(True, recompute_phase=torch.is_grad_enabled()):
                return function(*inputs, **kwargs)
        finally:
            FP8GlobalStateManager.set_autocast_state(before)

    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=use_reentrant)


class CudaRNGStatesTracker:
    """torch.cuda's states, which on a CPU are torch's own once `cpu_stand_ins.install` ran."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.states_: dict[str, torch.Tensor] = {}
        self.seeds_: set[int] = set()

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self.states_ = states

    def add(self, name: str, seed: int) -> None:
        if seed in self.seeds_ or name in self.states_:
            raise RuntimeError(f"seed {seed} or state {name} already exists")
        self.seeds_.add(seed)
        before = torch.cuda.get_rng_state()
        torch.cuda.manual_seed(seed)
        self.states_[name] = torch.cuda.get_rng_state()
        torch.cuda.set_rng_state(before)

    @contextmanager
    def fork(self, name: str = "model-parallel-rng"):
        before = torch.cuda.get_rng_state()
        torch.cuda.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.cuda.get_rng_state()
            torch.cuda.set_rng_state(before)
