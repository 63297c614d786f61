"""alignkit: RLHF on one GPU, every stage a plugin. Importing it imports no torch."""

from typing import TYPE_CHECKING

from alignkit.batches import (
    Answers,
    HiddenStates,
    LossOutput,
    OffPolicy,
    PolicyBatch,
    PreferenceLogps,
    Question,
    RankedScores,
    RatedLogps,
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
    halvings,
    option,
)
from alignkit.errors import (
    AlignkitError,
    ConfigError,
    DataError,
    PluginError,
    UnavailableError,
    did_you_mean,
    one_line,
)
from alignkit.hookspecs import hookimpl
from alignkit.lazy import lazy_imports
from alignkit.protocols import Engine, Plan, Result, RewardFunction, Run, RunConfig
from alignkit.rows import Conversation, Demonstration, Located, Message, Prompt, Ranking, Rated, Row, Text

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
    "FinishedRun",
    "HiddenStates",
    "Judge",
    "Located",
    "Loss",
    "LossOutput",
    "Message",
    "NoConfig",
    "OffPolicy",
    "Optimizer",
    "Plan",
    "PluginError",
    "PolicyBatch",
    "PreferenceLogps",
    "Prompt",
    "Question",
    "RankedScores",
    "Ranking",
    "Rated",
    "RatedLogps",
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
    "UnavailableError",
    "__version__",
    "check",
    "compare",
    "did_you_mean",
    "export",
    "fields_of",
    "halvings",
    "hookimpl",
    "load",
    "one_line",
    "option",
    "plan",
    "rank",
    "sample",
    "score",
    "train",
]

if TYPE_CHECKING:
    from alignkit.api.answers import rank, sample, score
    from alignkit.api.comparing import compare
    from alignkit.api.exports import export
    from alignkit.api.runs import FinishedRun, load
    from alignkit.api.training import check, plan, train
else:
    __getattr__, __dir__ = lazy_imports(__name__, __file__)
