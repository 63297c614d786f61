"""The settings of the stage and of its losses, named as in TRL where TRL has them."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from alignkit import halvings, option

Beta = Annotated[float, Gt(0)]


@dataclass(frozen=True)
class DPOConfig:
    """The ``dpo`` table: settings in addition to ``train``."""

    max_length: Annotated[int, Gt(0)] = option(2048, "maximum tokens of prompt and answer together")
    too_long: Literal["error", "skip"] = option(
        "error", "an answer longer than max_length: stop, or leave it out of its ranking"
    )
    shared_prompt: bool | None = option(
        None, "compute a prompt once for all its answers; null: if that is supported and faster"
    )
    precompute_ref_log_probs: bool = option(
        False, "compute the reference log-probabilities once before training, then free the reference model"
    )
    eval_prompts: Annotated[int, Ge(0)] = option(32, "held-out prompts to answer at each evaluation; 0: none")
    response_length: Annotated[int, Gt(0)] = option(128, "maximum tokens of these answers", only_with="eval_prompts")


def less_memory(config: DPOConfig) -> list[dict[str, Any]]:
    """No reference model in memory, then shorter sequences, from the mildest."""
    precomputed = [] if config.precompute_ref_log_probs else [{"precompute_ref_log_probs": True}]
    return [*precomputed, *halvings("max_length", config.max_length, 128, too_long="skip")]


@dataclass(frozen=True)
class BetaConfig:
    """The ``loss`` table of losses whose only setting is ``beta``."""

    beta: Beta = option(0.1, "strength of the penalty for moving away from the reference")


@dataclass(frozen=True)
class RobustConfig(BetaConfig):
    """The ``loss`` table of ``robust``."""

    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = option(0.1, "assumed share of pairs with the wrong label")


@dataclass(frozen=True)
class ExoConfig(BetaConfig):
    """The ``loss`` table of ``exo_pair``."""

    label_smoothing: Annotated[float, Gt(0), Lt(0.5)] = option(1e-3, "assumed share of pairs with the wrong label")


@dataclass(frozen=True)
class AotConfig(BetaConfig):
    """The ``loss`` table of ``aot`` and ``aot_unpaired``."""

    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = option(0.0, "assumed share of pairs with the wrong label")


@dataclass(frozen=True)
class DiscopopConfig(BetaConfig):
    """The ``loss`` table of ``discopop``."""

    discopop_tau: Annotated[float, Gt(0)] = option(0.05, "temperature of the mixture of the two losses")


@dataclass(frozen=True)
class SimpoConfig:
    """The ``loss`` table of ``simpo``."""

    beta: Beta = option(2.0, "scale of the mean log-probability per token")
    gamma: Annotated[float, Ge(0)] = option(1.0, "target margin between the rewards of the two answers")


@dataclass(frozen=True)
class OrpoConfig:
    """The ``loss`` table of ``orpo``."""

    beta: Beta = option(0.1, "weight of the odds ratio beside the likelihood of the chosen answer")


@dataclass(frozen=True)
class CpoConfig:
    """The ``loss`` table of ``cpo``."""

    beta: Beta = option(0.1, "scale of the difference of the log-probabilities")
    cpo_alpha: Annotated[float, Ge(0)] = option(1.0, "weight of the negative log-likelihood of the chosen answer")
