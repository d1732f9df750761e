"""Settings: frozen dataclasses, one a command plus the shared ones. Each default stands here once.

A field is an option: `max_new_tokens` is `--max-new-tokens` and TEXTGEN_MAX_NEW_TOKENS; its flags and
help text stand in `cli/options.py`. Values are checked on creation; a bad one is a UsageError that names
the option.
"""

from textgen_cli.config.download import DownloadConfig
from textgen_cli.config.explain import COMPARE, ExplainConfig, Method
from textgen_cli.config.generate import (
    BUILT_IN,
    GENERATION_FIELDS,
    SEED_LIMIT,
    ConstraintConfig,
    DecodingConfig,
    EndpointConfig,
    GenerateConfig,
    PromptConfig,
    SafetyConfig,
    Server,
    Task,
)
from textgen_cli.config.score import ScoreConfig, ScoringConfig
from textgen_cli.config.shared import (
    DEFAULT_MODEL,
    BatchConfig,
    Dtype,
    ModelConfig,
    check_range,
    option_name,
    split_weight,
)

__all__ = [
    "BUILT_IN",
    "COMPARE",
    "DEFAULT_MODEL",
    "GENERATION_FIELDS",
    "SEED_LIMIT",
    "BatchConfig",
    "ConstraintConfig",
    "DecodingConfig",
    "DownloadConfig",
    "Dtype",
    "EndpointConfig",
    "ExplainConfig",
    "GenerateConfig",
    "Method",
    "ModelConfig",
    "PromptConfig",
    "SafetyConfig",
    "ScoreConfig",
    "ScoringConfig",
    "Server",
    "Task",
    "check_range",
    "option_name",
    "split_weight",
]
