"""The configuration of a run: checked and frozen."""

from megatron_oprd.config.bridge import BridgeConfig
from megatron_oprd.config.loss_schedule import ScheduleConfig
from megatron_oprd.config.losses import FlowConfig, LossConfig, OutputConfig, RepresentationConfig, StateMapConfig
from megatron_oprd.config.models import (
    KeepBf16Config,
    ModelFolder,
    ParallelConfig,
    PrecisionConfig,
    RecomputeConfig,
    StudentConfig,
    TeacherConfig,
    TeacherParallelConfig,
)
from megatron_oprd.config.monitoring import HealthConfig, LoggingConfig, WandbConfig, WatchdogConfig
from megatron_oprd.config.reading import (
    changed_keys,
    default_text,
    dump_config,
    leaves,
    load_config,
    parse_config,
    with_settings,
)
from megatron_oprd.config.rollouts import DataConfig, EvaluationConfig, RolloutConfig
from megatron_oprd.config.root import MAKE_A_BRIDGE, Config, teacher_section, teacher_title
from megatron_oprd.config.training import BatchConfig, CheckpointConfig, MemoryConfig, OptimizerConfig, TrainConfig

__all__ = [
    "MAKE_A_BRIDGE",
    "BatchConfig",
    "BridgeConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "FlowConfig",
    "HealthConfig",
    "KeepBf16Config",
    "LoggingConfig",
    "LossConfig",
    "MemoryConfig",
    "ModelFolder",
    "OptimizerConfig",
    "OutputConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RecomputeConfig",
    "RepresentationConfig",
    "RolloutConfig",
    "ScheduleConfig",
    "StateMapConfig",
    "StudentConfig",
    "TeacherConfig",
    "TeacherParallelConfig",
    "TrainConfig",
    "WandbConfig",
    "WatchdogConfig",
    "changed_keys",
    "default_text",
    "dump_config",
    "leaves",
    "load_config",
    "parse_config",
    "teacher_section",
    "teacher_title",
    "with_settings",
]
