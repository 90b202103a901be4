"""The typed config tree that all jobs share: its schema, its reader and its error messages.

Loads neither torch nor Ray.
"""

from gptray.config.compute import ComputeConfig
from gptray.config.errors import ConfigError, RunFailed, UserError
from gptray.config.lora_section import LoraConfig
from gptray.config.model_section import ModelConfig
from gptray.config.schema import (
    Config,
    differences,
    dump,
    dump_differences,
    expect_config,
    flatten,
    load_config,
    load_saved,
    override,
)
from gptray.config.sections import DataConfig, OptimConfig, TrackConfig, TrainConfig, TuneConfig
from gptray.config.serve_section import ServeConfig
from gptray.config.use_sections import (
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    QuantizeConfig,
    SampleConfig,
)

__all__ = [
    "ComputeConfig",
    "TrackConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "ExportConfig",
    "GenerateConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "QuantizeConfig",
    "RunFailed",
    "SampleConfig",
    "ServeConfig",
    "TrainConfig",
    "TuneConfig",
    "UserError",
    "differences",
    "dump",
    "dump_differences",
    "expect_config",
    "flatten",
    "load_config",
    "load_saved",
    "override",
]
