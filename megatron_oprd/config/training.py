"""Sections about training: micro-batches, optimizer, steps and checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_oprd.config.section import FRACTION, GIGABYTES, MINUTES, STEPS, TOKENS, PathText, Section


class BatchConfig(Section):
    """The division of a step's sequences into micro-batches."""

    max_tokens_per_micro_batch: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        32768,
        description="limit of a micro-batch, before context parallelism divides it; auto: what memory and the shortest "
        "step allow",
        json_schema_extra=TOKENS,
    )
    packing: bool = Field(True, description="pack several sequences into a micro-batch; false: one sequence in each")


class MemoryConfig(Section):
    """The memory for which `recompute: auto` and `batch.max_tokens_per_micro_batch: auto` choose."""

    limit_gb: float | None = Field(
        None, gt=0.0, description="memory of a process; null: its share of the device", json_schema_extra=GIGABYTES
    )
    margin: float = Field(
        0.1, ge=0.0, lt=1.0, description="part of this memory that stays free", json_schema_extra=FRACTION
    )


class OptimizerConfig(Section):
    """The optimizer and the schedule of its learning rate."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="sgd is plain: no momentum, no weight decay")
    lr: float = Field(1.0e-5, gt=0.0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's decay rates of the two moments")
    eps: float = Field(
        1.0e-15,
        gt=0.0,
        description="AdamW's epsilon; far below one element of the gradient, which is about 2e-8 with normalize=l2",
    )
    weight_decay: float = Field(0.01, ge=0.0, description="AdamW's weight decay; norms and biases have none")
    clip_grad: float = Field(1.0, ge=0.0, description="largest norm of the gradient; 0: no clipping")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="learning rate after the warm-up")
    warmup_fraction: float = Field(
        0.03,
        ge=0.0,
        le=1.0,
        description="linear warm-up, of train.steps; of W steps of warm-up step n has n/(W+1) of the peak",
        json_schema_extra=FRACTION,
    )
    precision_aware: bool = Field(
        False,
        description="6 instead of 12 bytes of state per parameter; needs Transformer Engine and a GPU",
    )
    cpu_offload: float = Field(
        0.0, ge=0.0, le=1.0, description="part of the state that is in CPU memory", json_schema_extra=FRACTION
    )


class TrainConfig(Section):
    """The run."""

    steps: int = Field(500, ge=0, description="training steps", json_schema_extra=STEPS)
    seed: int = Field(0, ge=0, description="seed of the order of prompts and of sampling")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device; auto: CUDA if the machine has it")
    run_dir: PathText = Field(description="folder of the run: logs, checkpoints, export and report")


class CheckpointConfig(Section):
    """Training checkpoints and the export."""

    every: int = Field(
        50, ge=0, description="save every so many steps and at the end; 0: only on a signal", json_schema_extra=STEPS
    )
    every_minutes: float = Field(
        0.0,
        ge=0.0,
        description="also save when the last checkpoint is so old, by the clock of rank 0; 0: never",
        json_schema_extra=MINUTES,
    )
    keep: int = Field(2, ge=1, description="newest checkpoints to keep")
    resume: Literal["auto", "never"] = Field("auto", description="resume from the newest complete checkpoint")
    export_hf: bool = Field(True, description="export the student to Hugging Face format at the end")
    export_dtype: Literal["bf16", "fp16", "fp32"] | None = Field(
        None, description="dtype of the exported weights; null: the dtype in the config.json of student.path"
    )
    asynchronous: bool = Field(False, description="write a checkpoint while training continues")
