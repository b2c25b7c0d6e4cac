"""Sections about text: prompts, rollouts and evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_oprd.config.section import BYTES, FRACTION, PROMPTS, RANKS, SECONDS, STEPS, TOKENS, PathText, Section


class DataConfig(Section):
    """The prompts of training."""

    prompts: list[PathText] = Field([], description="Parquet or JSONL files, or dataset names on the Hugging Face hub")
    prompt_key: str = Field("prompt", description="column with the prompt, as text or as messages")
    teacher_prompt_key: str | None = Field(
        None, description="column with the teacher's prompt; null: the teacher has the student's prompt"
    )
    answer_key: str | None = Field(
        None, description="column with the right answer; null: ground_truth in the column reward_model"
    )
    drop_final_answer: bool = Field(
        False, description="leave out a last message of the assistant; otherwise it is an error"
    )
    max_prompt_tokens: int = Field(2048, ge=1, description="longer prompts are left out", json_schema_extra=TOKENS)
    shuffle: bool = Field(True, description="shuffle the prompts in each epoch")
    group_by_teacher: bool = Field(
        False, description="with several teachers: all prompts of a step belong to one teacher; the teachers take turns"
    )
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


class RolloutServerConfig(Section):
    """The vLLM servers of rollout.engine=vllm."""

    addresses: list[str] = Field([], description="servers that run already, each as host:port")
    python: PathText | None = Field(
        None, description="Python of the environment of a server that the run starts and ends itself"
    )
    tensor: int = Field(1, ge=1, description="tensor-parallel size of the started server", json_schema_extra=RANKS)
    devices: list[Annotated[int, Field(ge=0)]] = Field(
        [], description="GPUs of the started server, one for each tensor-parallel rank; empty: the first ones"
    )
    memory: float = Field(
        0.5, gt=0.0, lt=1.0, description="share of a device's memory for the started server", json_schema_extra=FRACTION
    )
    max_running: int = Field(64, ge=1, description="requests that a server runs at once")
    sync: Literal["file", "nccl"] = Field(
        "file",
        description="transport of the weights to the servers: files, or process groups of nccl (gloo without CUDA)",
    )
    sync_dir: PathText | None = Field(
        None, description="folder that the run and the servers share for the weights; null: shared memory"
    )
    bucket_bytes: int = Field(
        256 * 1024**2, ge=1, description="weights that are transferred at once", json_schema_extra=BYTES
    )
    stall_seconds: float = Field(
        300.0, gt=0.0, description="a server has failed after this time without a new token", json_schema_extra=SECONDS
    )
    batch_invariant: bool = Field(
        False, description="the started server computes each answer independently of its batch, bit for bit (GPU)"
    )

    @field_validator("addresses")
    @classmethod
    def _addresses_have_host_and_port(cls, addresses: list[str]) -> list[str]:
        for address in addresses:
            host, _, port = address.removeprefix("http://").rstrip("/").rpartition(":")
            if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise ValueError(
                    f"rollout.server.addresses: {address!r} is not of the form host:port; write it like 127.0.0.1:8000"
                )
        if len({address.removeprefix("http://").rstrip("/") for address in addresses}) < len(addresses):
            raise ValueError(f"rollout.server.addresses={addresses} names a server twice; name each once")
        return addresses

    @model_validator(mode="after")
    def _devices_are_one_for_each_rank(self) -> RolloutServerConfig:
        if self.devices and len(set(self.devices)) != self.tensor:
            raise ValueError(
                f"rollout.server.devices={self.devices} must name {self.tensor} different GPUs, one for each of "
                f"rollout.server.tensor={self.tensor} ranks"
            )
        return self


class RolloutHorizonConfig(Section):
    """A limit on the tokens of a response that grows with the training step, up to rollout.max_new_tokens."""

    start: int = Field(ge=1, description="tokens of a response in the first steps", json_schema_extra=TOKENS)
    grow: int = Field(ge=0, description="tokens that are added at a time", json_schema_extra=TOKENS)
    every: int = Field(ge=1, description="steps after which tokens are added", json_schema_extra=STEPS)


class RolloutConfig(Section):
    """The student's responses of a training step."""

    engine: Literal["megatron", "vllm", "replay"] = Field(
        "megatron", description="generate with the student, with vLLM servers, or replay stored token ids"
    )
    path: PathText | None = Field(None, description="JSONL file of stored rollouts; needed by engine replay")
    ahead: Literal[0, 1] = Field(
        0,
        description="updates between the weights that sample rollouts and those that train on them; 1: the rollouts of "
        "the next step are generated while the student trains",
        json_schema_extra=STEPS,
    )
    prompts_per_step: int = Field(8, ge=1, description="prompts of a training step", json_schema_extra=PROMPTS)
    samples_per_prompt: int = Field(2, ge=1, description="responses to each prompt")
    temperature: float = Field(1.0, ge=0.0, description="sampling temperature; 0: greedy")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="nucleus sampling; 1: off")
    top_k: int = Field(0, ge=0, description="sample among the k most likely tokens; 0: all", json_schema_extra=TOKENS)
    max_new_tokens: int = Field(16384, ge=1, description="longest response", json_schema_extra=TOKENS)
    horizon: Literal["auto"] | RolloutHorizonConfig | None = Field(
        None,
        description="end responses earlier: auto after the last token that any loss compares (positions first_k), or "
        "a limit that grows with the step",
    )
    tokens_per_second: float | None = Field(
        None,
        gt=0.0,
        description="measured rate at which the run generates, all ranks or servers added; for `plan`, which "
        "estimates it with null",
    )
    server: RolloutServerConfig = RolloutServerConfig()

    @property
    def generates(self) -> bool:
        """Return True if the responses are generated, from the prompts of `data`, and not replayed."""
        return self.engine != "replay"

    @model_validator(mode="after")
    def _horizon_needs_generation(self) -> RolloutConfig:
        if self.horizon is not None and not self.generates:
            raise ValueError(
                "rollout.horizon limits generation, and rollout.engine=replay has stored responses; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _vllm_needs_a_server(self) -> RolloutConfig:
        if self.engine == "vllm":
            if bool(self.server.addresses) == bool(self.server.python):
                given = "both are" if self.server.python else "neither is"
                raise ValueError(
                    f"rollout.engine=vllm needs rollout.server.addresses or rollout.server.python; {given} given"
                )
            if not (self.temperature == 0 or 0.01 <= self.temperature <= 2):
                raise ValueError(
                    f"rollout.temperature={self.temperature:g}: vLLM samples with 0 or with 0.01 to 2; "
                    "rollout.engine=megatron with any"
                )
        return self

    @model_validator(mode="after")
    def _replay_needs_a_path(self) -> RolloutConfig:
        if self.engine == "replay" and not self.path:
            raise ValueError("rollout.path: rollout.engine=replay needs a JSONL file of rollouts; name it")
        return self

    @model_validator(mode="after")
    def _replay_generates_nothing_ahead(self) -> RolloutConfig:
        if self.engine == "replay" and self.ahead:
            raise ValueError(
                f"rollout.ahead={self.ahead} is not possible with rollout.engine=replay: stored rollouts are not "
                "generated; leave it out"
            )
        return self


BestMetric = Literal["perplexity", "forward_kl", "reverse_kl", "argmax_agreement", "cosine", "avg@n", "best@n"]


class EvaluationConfig(Section):
    """Evaluation of the student on held-out prompts."""

    every: int = Field(
        0, ge=0, description="evaluate at the start, at the end and every so many steps; 0: never",
        json_schema_extra=STEPS,
    )  # fmt: skip
    data: list[PathText] = Field([], description="prompt files, with the right answers if there are any")
    samples: int = Field(16, ge=0, description="answers of the student to each prompt; 0: none")
    temperature: float = Field(0.7, ge=0.0, description="sampling temperature; 0: greedy")
    top_p: float = Field(0.95, gt=0.0, le=1.0, description="nucleus sampling; 1: off")
    max_new_tokens: int | None = Field(
        None, ge=1, description="longest answer; null: as rollout.max_new_tokens", json_schema_extra=TOKENS
    )
    teacher_answers: Literal["auto"] | bool = Field(
        "auto",
        description="let the teacher answer each prompt once, and measure the student on these answers; auto: if no "
        "prompt has a right answer and there is one teacher with the student's tokenizer",
    )
    answers_dir: PathText | None = Field(
        None,
        description="folder of the teacher's answers, which runs may share; null: teacher_answers in train.run_dir",
    )
    best: BestMetric | None = Field(
        None, description="keep the checkpoint that is best by this metric over all data sources, and export it too"
    )
    patience: int = Field(
        0, ge=0, description="end training after so many evaluations in a row that are not the best; 0: never"
    )

    @model_validator(mode="after")
    def _best_needs_evaluations(self) -> EvaluationConfig:
        if self.best and not self.every:
            raise ValueError(f"evaluation.best={self.best} needs evaluation.every above 0")
        if self.patience and not self.best:
            raise ValueError(f"evaluation.patience={self.patience} needs evaluation.best, the metric that must improve")
        return self
