"""Two context managers over one global state that holds the active precision."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch

from ..common.recipe import Float8CurrentScaling, Recipe
from ..on_cpu import Entered, entered


class FP8GlobalStateManager:
    FP8_ENABLED = False
    FP8_RECIPE: Recipe | None = None
    FP8_DISTRIBUTED_GROUP: Any = None
    FP8_PARAMETERS = False
    HIGH_PRECISION_INIT_VAL = False

    @classmethod
    def reset(cls) -> None:
        cls.set_autocast_state((False, None, None))
        cls.FP8_PARAMETERS = cls.HIGH_PRECISION_INIT_VAL = False

    @classmethod
    def is_fp8_available(cls) -> tuple[bool, str]:
        return True, ""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.FP8_ENABLED

    @classmethod
    def is_fp8_calibration(cls) -> bool:
        return False

    @classmethod
    def with_fp8_parameters(cls) -> bool:
        return cls.FP8_PARAMETERS

    @classmethod
    def with_high_precision_init_val(cls) -> bool:
        return cls.HIGH_PRECISION_INIT_VAL

    @classmethod
    def get_fp8_recipe(cls) -> Recipe:
        return cls.FP8_RECIPE or Float8CurrentScaling()

    @classmethod
    def get_fp8_group(cls) -> Any:
        return cls.FP8_DISTRIBUTED_GROUP

    @classmethod
    def get_autocast_state(cls) -> tuple:
        return cls.FP8_ENABLED, cls.FP8_RECIPE, cls.FP8_DISTRIBUTED_GROUP

    @classmethod
    def set_autocast_state(cls, fp8_state: tuple) -> None:
        cls.FP8_ENABLED, cls.FP8_RECIPE, cls.FP8_DISTRIBUTED_GROUP = fp8_state


def is_fp8_available(return_reason: bool = False) -> bool | tuple[bool, str]:
    return (True, "") if return_reason else True


@contextmanager
def autocast(enabled: bool = True, *, recipe: Recipe | None = None, amax_reduction_group: Any = None):
    entered.append(Entered("autocast", enabled, recipe, amax_reduction_group, torch.is_grad_enabled()))
    before = FP8GlobalStateManager.get_autocast_state()
    FP8GlobalStateManager.set_autocast_state((enabled, recipe, amax_reduction_group))
    try:
        yield
    finally:
        FP8GlobalStateManager.set_autocast_state(before)


def fp8_autocast(enabled: bool = True, *, fp8_recipe: Recipe | None = None, fp8_group: Any = None):
    return autocast(enabled, recipe=fp8_recipe, amax_reduction_group=fp8_group)


@contextmanager
def quantized_model_init(
    enabled: bool = True, recipe: Recipe | None = None, preserve_high_precision_init_val: bool = False
):
    preserve = preserve_high_precision_init_val
    entered.append(Entered("model_init", enabled, recipe, None, torch.is_grad_enabled(), preserve))
    manager = FP8GlobalStateManager
    before = manager.FP8_PARAMETERS, manager.HIGH_PRECISION_INIT_VAL
    manager.FP8_PARAMETERS, manager.HIGH_PRECISION_INIT_VAL = enabled, preserve
    try:
        yield
    finally:
        manager.FP8_PARAMETERS, manager.HIGH_PRECISION_INIT_VAL = before


def fp8_model_init(enabled: bool = True, recipe: Recipe | None = None, preserve_high_precision_init_val: bool = False):
    return quantized_model_init(enabled, recipe, preserve_high_precision_init_val)
