"""The section of the command `bridge.fit`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_oprd.config.section import FRACTION, PROMPTS, STEPS, Section


class BridgeConfig(Section):
    """The fit of a bridge by `megatron_oprd.bridge.fit`; training does not use this section."""

    prompts: int = Field(2000, ge=2, description="prompts that the student answers", json_schema_extra=PROMPTS)
    ranks: list[Annotated[int, Field(ge=1)]] = Field(
        [8], min_length=1, description="ranks of the maps; one bridge for each"
    )
    held_out_fraction: float = Field(
        0.1, gt=0.0, lt=1.0, description="prompts on which the maps are measured", json_schema_extra=FRACTION
    )
    method: Literal["closed_form", "adamw"] = Field("closed_form", description="how the maps are fitted")
    ridges: list[Annotated[float, Field(ge=0.0)]] = Field(
        [0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0],
        min_length=1,
        description="closed_form: ridge penalties to choose from",
    )
    epochs: int = Field(20, ge=1, description="adamw: passes over the responses")
    lr: float = Field(1.0e-4, gt=0.0, description="adamw: learning rate")
    save_every: int = Field(10, ge=1, description="save the progress of a fit", json_schema_extra=STEPS)
