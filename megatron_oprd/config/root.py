"""The whole configuration of a run: its sections, and what must hold between them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_oprd.config.sections import (
    BatchConfig,
    BridgeConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    HealthConfig,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RecomputeConfig,
    RolloutConfig,
    Section,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    WatchdogConfig,
)


class Config(Section):
    student: StudentConfig
    teacher: TeacherConfig | None = None
    teachers: dict[str, TeacherConfig] = Field({})  # by the data_source of the prompts that each one teaches
    teachers_in_memory: Literal["all", "one"] = "all"
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    loss: LossConfig = LossConfig()
    parallel: ParallelConfig = ParallelConfig()
    batch: BatchConfig = BatchConfig()
    precision: PrecisionConfig = PrecisionConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    health: HealthConfig = HealthConfig()
    bridge: BridgeConfig = BridgeConfig()
    watchdog: WatchdogConfig = WatchdogConfig()

    @model_validator(mode="before")
    @classmethod
    def _health_of_a_bridge(cls, values: Any) -> Any:
        """A student led by a bridge alone may collapse: it is watched unless the user says otherwise."""
        match values:
            case {"loss": {"representation": {"bridge": str()}}}:
                health = values.get("health", {})
                return {**values, "health": {"every": 10, **health} if isinstance(health, dict) else health}
        return values

    @model_validator(mode="after")
    def _prompts_or_replay(self) -> Config:
        if self.rollout.engine == "megatron" and not self.data.prompts:
            raise ValueError("data.prompts: name at least one prompt file (only rollout.engine=replay needs none)")
        return self

    @model_validator(mode="after")
    def _one_teacher_or_several(self) -> Config:
        if self.teacher is None and not self.teachers:
            raise ValueError("teacher is required: teacher.path, or teachers with one for each data_source")
        if self.teacher is not None and self.teachers:
            raise ValueError("teacher and teachers are both given: name one teacher for all prompts, or several")
        if "" in self.teachers:
            raise ValueError("teachers: the name '' is empty; name each teacher by the data_source of its prompts")
        return self

    @model_validator(mode="after")
    def _stored_prompts_of_the_teacher(self) -> Config:
        if self.rollout.engine == "replay" and self.data.teacher_prompt_key is not None:
            raise ValueError(
                f"data.teacher_prompt_key={self.data.teacher_prompt_key} is not read with rollout.engine=replay; put "
                "teacher_prompt_ids into the lines of rollout.path"
            )
        return self

    @model_validator(mode="after")
    def _a_temperature_for_probabilities(self) -> Config:
        if self.loss.reads_output and self.rollout.temperature == 0:
            raise ValueError(
                f"rollout.temperature=0 has no probabilities for loss.output.objective={self.loss.output.objective}; "
                "use one above 0"
            )
        return self

    @property
    def named_teachers(self) -> dict[str, TeacherConfig]:
        """The teachers by data_source; a single one, which teaches all prompts, under the empty name."""
        return self.teachers if self.teacher is None else {"": self.teacher}


def teacher_section(name: str) -> str:
    """The section of the configuration where one of `named_teachers` stands."""
    return f"teachers.{name}" if name else "teacher"


def teacher_title(name: str) -> str:
    """What messages call one of `named_teachers`."""
    return f"teacher {name}" if name else "teacher"


# How messages tell the way to a bridge.
MAKE_A_BRIDGE = "make a bridge with torchrun -m megatron_oprd.bridge.fit --config F"
