"""The configuration of a run: all sections, and the rules between them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from megatron_oprd.config.bridge import BridgeConfig
from megatron_oprd.config.losses import LossConfig
from megatron_oprd.config.models import ParallelConfig, PrecisionConfig, RecomputeConfig, StudentConfig, TeacherConfig
from megatron_oprd.config.monitoring import HealthConfig, LoggingConfig, WatchdogConfig
from megatron_oprd.config.rollouts import DataConfig, EvaluationConfig, RolloutConfig
from megatron_oprd.config.section import Section
from megatron_oprd.config.training import BatchConfig, CheckpointConfig, MemoryConfig, OptimizerConfig, TrainConfig

FOR_EVALUATION = "evaluation"  # context of the validation for a command that trains nothing


class Config(Section):
    """The configuration of a run."""

    student: StudentConfig
    teacher: TeacherConfig | None = None
    teachers: dict[str, TeacherConfig] = Field(
        {}, description="several teachers in place of teacher: a section like it for each data_source of the prompts"
    )
    teachers_in_memory: Literal["all", "one"] = Field(
        "all", description="one: load each teacher again for each of its passes"
    )
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    loss: LossConfig = LossConfig()
    parallel: ParallelConfig = ParallelConfig()
    batch: BatchConfig = BatchConfig()
    precision: PrecisionConfig = PrecisionConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    memory: MemoryConfig = MemoryConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    health: HealthConfig = HealthConfig()
    bridge: BridgeConfig = BridgeConfig()
    watchdog: WatchdogConfig = WatchdogConfig()

    @model_validator(mode="before")
    @classmethod
    def _check_health_with_a_bridge(cls, values: Any) -> Any:
        """Check the health by default with a bridge, because a student trained only by a bridge may collapse."""
        match values:
            case {"loss": {"representation": {"bridge": str()}}}:
                health = values.get("health", {})
                return {**values, "health": {"every": 10, **health} if isinstance(health, dict) else health}
        return values

    @model_validator(mode="after")
    def _prompts_are_given_or_replayed(self, info: ValidationInfo) -> Config:
        if self.rollout.generates and not self.data.prompts and info.context != FOR_EVALUATION:
            raise ValueError("data.prompts: name at least one prompt file (only rollout.engine=replay needs none)")
        return self

    @model_validator(mode="after")
    def _has_one_teacher_or_several(self, info: ValidationInfo) -> Config:
        if self.teacher is None and not self.teachers and info.context != FOR_EVALUATION:
            raise ValueError("teacher is required: teacher.path, or teachers with one for each data_source")
        if self.teacher is not None and self.teachers:
            raise ValueError("teacher and teachers are both given: name one teacher for all prompts, or several")
        if "" in self.teachers:
            raise ValueError("teachers: the name '' is empty; name each teacher by the data_source of its prompts")
        return self

    @model_validator(mode="after")
    def _replay_stores_the_prompts_of_the_teacher(self) -> Config:
        if self.rollout.engine == "replay" and self.data.teacher_prompt_key is not None:
            raise ValueError(
                f"data.teacher_prompt_key={self.data.teacher_prompt_key} is not read with rollout.engine=replay; put "
                "teacher_prompt_ids into the lines of rollout.path"
            )
        return self

    @model_validator(mode="after")
    def _a_base_needs_its_loss(self) -> Config:
        for name, teacher in self.named_teachers.items():
            if teacher.extrapolates_layers and not self.loss.reads_layers:
                raise ValueError(
                    f"{teacher_section(name)}.base extrapolates hidden states, and loss.representation.weight=0 "
                    "compares none; leave the base out, set a weight, or set base.space=output"
                )
            if teacher.extrapolates_output and not self.loss.reads_output:
                raise ValueError(
                    f"{teacher_section(name)}.base extrapolates distributions, and loss.output.objective=none compares "
                    "none; set an objective, or base.space=representation"
                )
        return self

    @model_validator(mode="after")
    def _an_average_has_float32_weights_of_one_student(self) -> Config:
        for name, teacher in self.named_teachers.items():
            if not teacher.follows_student:
                continue
            optimizer = self.optimizer
            obstacles = {
                "several teachers; name it as teacher.path": bool(self.teachers),
                "teachers_in_memory=one, which loads the weights of the files again; use all": (
                    self.teachers_in_memory == "one"
                ),
                f"precision.teacher_fp8={self.precision.teacher_fp8}, because FP8 copies of weights are made once; "
                "use off": self.precision.first_teacher_fp8 != "off",
                "loss.representation.bridge, which is fitted to a frozen teacher; use null": (
                    self.loss.representation.bridge is not None
                ),
                "optimizer.precision_aware=true, which has no float32 weights; use false": optimizer.precision_aware,
                f"optimizer.cpu_offload={optimizer.cpu_offload:g}, which moves the float32 weights to CPU memory; use "
                "0": optimizer.cpu_offload > 0,
            }
            for obstacle, present in obstacles.items():
                if present:
                    raise ValueError(
                        f"{teacher_section(name)}.ema={teacher.ema:g} does not work with {obstacle}, or ema null"
                    )
        return self

    @model_validator(mode="after")
    def _flow_has_one_teacher(self) -> Config:
        if self.teachers and self.loss.reads_flow:
            raise ValueError(
                f"loss.flow.weight={self.loss.flow.weight:g} compares with one teacher; name it as teacher.path, or "
                "use weight 0"
            )
        return self

    @model_validator(mode="after")
    def _a_map_has_one_teacher(self) -> Config:
        if self.teachers and self.loss.representation.has_map:
            raise ValueError(
                f"loss.representation.map.kind={self.loss.representation.map.kind} leads to one teacher; name it as "
                "teacher.path, or use kind none"
            )
        return self

    @model_validator(mode="after")
    def _groups_need_several_teachers(self) -> Config:
        if self.data.group_by_teacher and len(self.teachers) < 2:
            raise ValueError("data.group_by_teacher=true needs several teachers; name them in teachers or use false")
        if self.data.group_by_teacher and not self.rollout.generates:
            raise ValueError(
                "data.group_by_teacher=true has no effect with rollout.engine=replay, which takes the rollouts of "
                "rollout.path in their order; group the lines of the file, or use false"
            )
        return self

    @model_validator(mode="after")
    def _automatic_horizon_needs_first_tokens(self) -> Config:
        if self.rollout.horizon == "auto" and self.loss.first_tokens is None:
            representation, output = self.loss.representation.positions, self.loss.output.positions
            terms = [f"loss.representation.positions={representation}"] if self.loss.reads_layers else []
            terms += [f"loss.output.positions={output}"] if self.loss.reads_output else []
            terms += [f"loss.flow.weight={self.loss.flow.weight:g}"] if self.loss.reads_flow else []
            complete = " and ".join(term for term in terms if not term.endswith("=first_k"))
            raise ValueError(
                f"rollout.horizon=auto cannot end a response early, because {complete} compares its last token; use "
                "first_k for every loss, or rollout.horizon={start, grow, every}"
            )
        return self

    @model_validator(mode="after")
    def _best_needs_checkpoints(self) -> Config:
        if self.evaluation.best and not self.checkpoint.every:
            raise ValueError(
                f"evaluation.best={self.evaluation.best} keeps a checkpoint, and checkpoint.every=0 makes none; set "
                "checkpoint.every above 0"
            )
        return self

    @model_validator(mode="after")
    def _overlap_needs_micro_batches_of_a_given_size(self) -> Config:
        if self.parallel.tp_comm_overlap and self.batch.max_tokens_per_micro_batch == "auto":
            raise ValueError(
                "parallel.tp_comm_overlap=true needs micro-batches of one length; set batch.max_tokens_per_micro_batch "
                "to a number"
            )
        return self

    @model_validator(mode="after")
    def _output_loss_needs_a_temperature(self) -> Config:
        if self.loss.reads_output and self.rollout.temperature == 0:
            raise ValueError(
                f"rollout.temperature=0 has no probabilities for loss.output.objective={self.loss.output.objective}; "
                "use one above 0"
            )
        return self

    @property
    def named_teachers(self) -> dict[str, TeacherConfig]:
        """Return the teachers by data_source. A single teacher, for all prompts, has the empty name."""
        return self.teachers if self.teacher is None else {"": self.teacher}

    @property
    def evaluation_tokens(self) -> int:
        """Return the most tokens of an answer in an evaluation."""
        return self.evaluation.max_new_tokens or self.rollout.max_new_tokens


def teacher_section(name: str) -> str:
    """Return the key of the section of one of `named_teachers`."""
    return f"teachers.{name}" if name else "teacher"


def teacher_title(name: str) -> str:
    """Return the name of one of `named_teachers` for messages."""
    return f"teacher {name}" if name else "teacher"


# The end of messages about a missing bridge.
MAKE_A_BRIDGE = "make a bridge with torchrun -m megatron_oprd.bridge.fit --config F"
