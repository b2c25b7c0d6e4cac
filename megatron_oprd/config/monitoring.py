"""Sections about what watches a run: the log, the health of the student and the processes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_oprd.config.section import PROMPTS, RATIO, SECONDS, STEPS, TOKENS, Section


class WandbConfig(Section):
    """A run in Weights & Biases; needs `pip install megatron_oprd[wandb]`."""

    project: str = Field(min_length=1, description="project of Weights & Biases")
    name: str | None = Field(None, description="name of the run; null: that of the run folder")
    group: str | None = Field(None, description="group of the run")
    mode: Literal["online", "offline"] = Field(
        "online", description="offline: write to wandb/ in the run folder, to be sent with `wandb sync`"
    )


class LoggingConfig(Section):
    """The lines and curves of a run. They come beside `metrics.jsonl`, which has every step."""

    tensorboard: bool = Field(True, description="draw curves for TensorBoard, in tensorboard/ of the run folder")
    wandb: WandbConfig | None = Field(None, description="draw curves in Weights & Biases; null: do not")
    every: int = Field(1, ge=1, description="print a line and draw curves every so many steps", json_schema_extra=STEPS)


class HealthConfig(Section):
    """Checks whether the student collapses; docs/health.md describes them."""

    every: int = Field(
        0, ge=0, description="check every so many steps; 0: never. Default 10 with a bridge", json_schema_extra=STEPS
    )
    prompts: int = Field(64, ge=1, description="prompts that the start model answers", json_schema_extra=PROMPTS)
    max_new_tokens: int = Field(256, ge=1, description="longest of these answers", json_schema_extra=TOKENS)
    perplexity_ratio: float = Field(
        1.25, gt=1.0, description="warn above this multiple of the first perplexity", json_schema_extra=RATIO
    )
    stop: bool = Field(False, description="end the training at the first warning, with exit code 3")

    @model_validator(mode="after")
    def _stop_needs_checks(self) -> HealthConfig:
        if self.stop and not self.every:
            raise ValueError("health.stop=true needs health.every above 0; set health.every=10, for example")
        return self


class WatchdogConfig(Section):
    """Supervision of the processes; docs/long_runs.md describes it."""

    heartbeat_seconds: float = Field(
        10.0, ge=0.0, description="time between the heartbeats of a rank; 0: no watchdog", json_schema_extra=SECONDS
    )
    timeout_seconds: float = Field(
        1800.0, gt=0.0, description="end the run after this time without progress of a rank", json_schema_extra=SECONDS
    )
    straggler_every: int = Field(
        0, ge=0, description="time a fixed piece of work on every device every so many steps; 0: never",
        json_schema_extra=STEPS,
    )  # fmt: skip
    straggler_ratio: float = Field(
        1.5, gt=1.0, description="a device is slow above this multiple of the median time", json_schema_extra=RATIO
    )
