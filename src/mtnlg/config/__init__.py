"""Typed configs that validate themselves. Nothing here imports torch."""

from mtnlg.config.data import BlendEntry, DataConfig, SourceEntry, TokenizerConfig
from mtnlg.config.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MtnlgError,
    NotYetError,
    TrainingError,
)
from mtnlg.config.generation import EngineConfig
from mtnlg.config.layout import LayoutConfig
from mtnlg.config.layout_rules import layout_problems
from mtnlg.config.model import MegatronModelConfig
from mtnlg.config.presets import PRESETS, preset_fields
from mtnlg.config.run import RunConfig
from mtnlg.config.training import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    PrecisionConfig,
    ScheduleConfig,
    StopConfig,
    TrainingConfig,
)
from mtnlg.config.tuning import DistillationConfig, TuningConfig

__all__ = [
    "PRESETS",
    "BatchConfig",
    "BlendEntry",
    "CheckpointConfig",
    "CheckpointError",
    "ConfigError",
    "DataConfig",
    "DataError",
    "DistillationConfig",
    "EngineConfig",
    "EvaluationConfig",
    "LayoutConfig",
    "LoggingConfig",
    "MegatronModelConfig",
    "MtnlgError",
    "NotYetError",
    "OptimizerConfig",
    "PrecisionConfig",
    "RunConfig",
    "ScheduleConfig",
    "SourceEntry",
    "StopConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "TrainingError",
    "TuningConfig",
    "layout_problems",
    "preset_fields",
]
