"""alignkit: RLHF on one GPU, every stage a plugin. Importing it imports no torch."""

from alignkit.batches import (
    Answers,
    HiddenStates,
    LossOutput,
    PolicyBatch,
    PreferenceLogps,
    Question,
    RankedScores,
    SampledAnswers,
    Sampling,
    TokenLogps,
)
from alignkit.components import (
    Component,
    DataFormat,
    Judge,
    Loss,
    NoConfig,
    Optimizer,
    Reward,
    Rollout,
    Stage,
    Tuner,
    fields_of,
    option,
)
from alignkit.errors import AlignkitError, ConfigError, DataError, PluginError, did_you_mean, one_line
from alignkit.hookspecs import hookimpl
from alignkit.protocols import Engine, Plan, Result, RewardFunction, Run, RunConfig
from alignkit.rows import Conversation, Demonstration, Located, Message, Prompt, Ranking, Row, Text

__version__ = "0.1.0"
API_VERSION = "0.1"  # of what plugins use; a plugin says which it is built for: dependencies = ["alignkit>=0.1,<0.2"]

__all__ = [
    "API_VERSION",
    "AlignkitError",
    "Answers",
    "Component",
    "ConfigError",
    "Conversation",
    "DataError",
    "DataFormat",
    "Demonstration",
    "Engine",
    "HiddenStates",
    "Judge",
    "Located",
    "Loss",
    "LossOutput",
    "Message",
    "NoConfig",
    "Optimizer",
    "Plan",
    "PluginError",
    "PolicyBatch",
    "PreferenceLogps",
    "Prompt",
    "Question",
    "RankedScores",
    "Ranking",
    "Result",
    "Reward",
    "RewardFunction",
    "Rollout",
    "Row",
    "Run",
    "RunConfig",
    "SampledAnswers",
    "Sampling",
    "Stage",
    "Text",
    "TokenLogps",
    "Tuner",
    "__version__",
    "did_you_mean",
    "fields_of",
    "hookimpl",
    "one_line",
    "option",
]
