"""Configuration: Hydra composes YAML from ``conf/``, dataclasses check every key, type and range.

Why both: Hydra gives groups and ``key=value`` overrides; the dataclasses are what the code reads, so that a wrong key or
value stops the run before anything is loaded, with the nearest valid name in the message.

    config = load_config("config", ["method=on_policy", "train.steps=50"])
    config.train.steps  # 50
"""

from distill.config.checks import build, check_keys, in_range, nearest, one_of
from distill.config.loading import check_config, compose_config, conf_folder, defaults_of, load_config
from distill.config.sections import (
    AggregationSpec,
    CommConfig,
    EngineConfig,
    EvalSection,
    LoraSpec,
    ModelConfig,
    ModelSpec,
    MonitorSection,
    RolloutConfig,
    RunConfig,
    RunSection,
    ServerSpec,
    TrainSection,
)
from distill.config.teacher import TeacherSection, TeacherServerSpec, TeacherSource

__all__ = [
    "AggregationSpec",
    "CommConfig",
    "EngineConfig",
    "EvalSection",
    "LoraSpec",
    "ModelConfig",
    "ModelSpec",
    "MonitorSection",
    "RolloutConfig",
    "RunConfig",
    "RunSection",
    "ServerSpec",
    "TeacherSection",
    "TeacherServerSpec",
    "TeacherSource",
    "TrainSection",
    "build",
    "check_config",
    "check_keys",
    "compose_config",
    "conf_folder",
    "defaults_of",
    "in_range",
    "load_config",
    "nearest",
    "one_of",
]
