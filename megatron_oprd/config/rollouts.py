"""Sections about text: prompts, rollouts and evaluation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_oprd.config.section import PROMPTS, STEPS, TOKENS, Section


class DataConfig(Section):
    """The prompts of training."""

    prompts: list[str] = Field([], description="Parquet or JSONL files, or dataset names on the Hugging Face hub")
    prompt_key: str = Field("prompt", description="column with the prompt, as text or as messages")
    teacher_prompt_key: str | None = Field(
        None, description="column with the teacher's prompt; null: the teacher has the student's prompt"
    )
    max_prompt_tokens: int = Field(2048, ge=1, description="longer prompts are left out", json_schema_extra=TOKENS)
    shuffle: bool = Field(True, description="shuffle the prompts in each epoch")
    append_instruction: Literal["auto"] | bool = Field(
        "auto", description="ask for a boxed answer; auto: only in prompts that are graded as mathematics"
    )
    chat_template_kwargs: dict[str, Any] = Field({}, description="arguments of the chat template")
    teacher_chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="arguments of the chat template for the teacher's prompts; null: chat_template_kwargs"
    )

    @property
    def own_teacher_prompts(self) -> bool:
        """Return True if the teacher's prompts may differ from the student's."""
        return self.teacher_prompt_key is not None or self.teacher_chat_template_kwargs is not None

    @property
    def teacher_kwargs(self) -> dict[str, Any]:
        """Return the arguments of the chat template for the teacher's prompts."""
        own = self.teacher_chat_template_kwargs
        return self.chat_template_kwargs if own is None else own


class RolloutConfig(Section):
    """The student's responses of a training step."""

    engine: Literal["megatron", "replay"] = Field(
        "megatron", description="generate with the student, or replay stored token ids"
    )
    path: str | None = Field(None, description="JSONL file of stored rollouts; needed by engine replay")
    prompts_per_step: int = Field(8, ge=1, description="prompts of a training step", json_schema_extra=PROMPTS)
    samples_per_prompt: int = Field(2, ge=1, description="responses to each prompt")
    temperature: float = Field(1.0, ge=0.0, description="sampling temperature; 0: greedy")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="nucleus sampling; 1: off")
    top_k: int = Field(0, ge=0, description="sample among the k most likely tokens; 0: all", json_schema_extra=TOKENS)
    max_new_tokens: int = Field(16384, ge=1, description="longest response", json_schema_extra=TOKENS)

    @model_validator(mode="after")
    def _replay_needs_a_path(self) -> RolloutConfig:
        if self.engine == "replay" and not self.path:
            raise ValueError("rollout.path: engine replay needs the JSONL file to read")
        return self


class EvaluationConfig(Section):
    """Evaluation of the student on held-out prompts."""

    every: int = Field(
        0, ge=0, description="evaluate at the start, at the end and every so many steps; 0: never",
        json_schema_extra=STEPS,
    )  # fmt: skip
    data: list[str] = Field([], description="prompt files with the right answers")
    samples: int = Field(16, ge=1, description="answers to each prompt")
    temperature: float = Field(0.7, ge=0.0, description="sampling temperature; 0: greedy")
    top_p: float = Field(0.95, gt=0.0, le=1.0, description="nucleus sampling; 1: off")
    max_new_tokens: int = Field(31744, ge=1, description="longest answer", json_schema_extra=TOKENS)
