"""Losses on :class:`alignkit.PreferenceLogps`: one formula each, of a batch and the loss's config.

A formula gives the loss of each of the B pairs, [B]; :func:`mean` makes a loss of it. In the docstrings, c and r are
the log-ratios log(policy / reference) of the chosen and the rejected answer, and d = c - r. Names and defaults are
those of TRL, whose ``DPOTrainer`` is the oracle of the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from alignkit import LossOutput, PreferenceLogps
from alignkit_dpo.config import (
    AotConfig,
    BetaConfig,
    CpoConfig,
    DiscopopConfig,
    ExoConfig,
    OrpoConfig,
    RobustConfig,
    SimpoConfig,
)

if TYPE_CHECKING:
    from torch import Tensor


def mean(formula: Callable[[PreferenceLogps, Any], Tensor]) -> Callable[[Any], Callable[[PreferenceLogps], LossOutput]]:
    """The ``build`` of the loss that is the mean of a formula over a batch."""

    def build(config: Any) -> Callable[[PreferenceLogps], LossOutput]:
        return lambda batch: LossOutput(formula(batch, config).mean())

    return build


def log_ratios(batch: PreferenceLogps) -> tuple[Tensor, Tensor]:
    """log(policy / reference) of the chosen and of the rejected answers, [B] each."""
    assert batch.ref_chosen is not None
    assert batch.ref_rejected is not None
    return batch.chosen - batch.ref_chosen, batch.rejected - batch.ref_rejected


def log_ratios_per_token(batch: PreferenceLogps) -> tuple[Tensor, Tensor]:
    """The log-ratios, each divided by the tokens of its answer, [B] each."""
    chosen, rejected = log_ratios(batch)
    return chosen / batch.chosen_length, rejected / batch.rejected_length


def log_sigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + exp(-x))), stable at both ends."""
    import torch

    return torch.nn.functional.logsigmoid(x)


# --- of the log-ratios -----------------------------------------------------------------------------------------------


def sigmoid(batch: PreferenceLogps, config: BetaConfig) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7): -log sigmoid(beta d)."""
    chosen, rejected = log_ratios(batch)
    return -log_sigmoid(config.beta * (chosen - rejected))


def sigmoid_norm(batch: PreferenceLogps, config: BetaConfig) -> Tensor:
    """DPO on log-ratios per token, as in Tülu 3 (arXiv 2411.15124)."""
    chosen, rejected = log_ratios_per_token(batch)
    return -log_sigmoid(config.beta * (chosen - rejected))


def ipo(batch: PreferenceLogps, config: BetaConfig) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17): (d - 1 / (2 beta))².

    Log-ratios are per token. The paper does not say so; its authors confirmed it to those of TRL.
    """
    chosen, rejected = log_ratios_per_token(batch)
    return (chosen - rejected - 1 / (2 * config.beta)) ** 2


def hinge(batch: PreferenceLogps, config: BetaConfig) -> Tensor:
    """SLiC (arXiv 2305.10425) on DPO's reward, as in RSO (arXiv 2309.06657): max(0, 1 - beta d)."""
    chosen, rejected = log_ratios(batch)
    return (1 - config.beta * (chosen - rejected)).clamp(min=0)


def robust(batch: PreferenceLogps, config: RobustConfig) -> Tensor:
    """DPO that is unbiased if a share ε of the pairs has the wrong label (arXiv 2403.00409, eq. 7)."""
    chosen, rejected = log_ratios(batch)
    scaled, epsilon = config.beta * (chosen - rejected), config.label_smoothing
    return ((1 - epsilon) * -log_sigmoid(scaled) - epsilon * -log_sigmoid(-scaled)) / (1 - 2 * epsilon)


def exo_pair(batch: PreferenceLogps, config: ExoConfig) -> Tensor:
    """EXO (arXiv 2402.00856, eq. 16): KL(q || p) with q = (sigmoid(beta d), sigmoid(-beta d)) and p = (1 - ε, ε)."""
    chosen, rejected = log_ratios(batch)
    log_q, log_q_flipped = (
        log_sigmoid(config.beta * (chosen - rejected)),
        log_sigmoid(config.beta * (rejected - chosen)),
    )
    log_p, log_p_flipped = math.log1p(-config.label_smoothing), math.log(config.label_smoothing)
    return log_q.exp() * (log_q - log_p) + log_q_flipped.exp() * (log_q_flipped - log_p_flipped)


def nca_pair(batch: PreferenceLogps, config: BetaConfig) -> Tensor:
    """NCA (arXiv 2402.05369): -log sigmoid(beta c) - ½ log sigmoid(-beta c) - ½ log sigmoid(-beta r)."""
    chosen, rejected = (config.beta * log_ratio for log_ratio in log_ratios(batch))
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def bco_pair(batch: PreferenceLogps, config: BetaConfig) -> Tensor:
    """BCO (arXiv 2404.04656) without its reward shift: -log sigmoid(beta c) - log sigmoid(-beta r)."""
    chosen, rejected = (config.beta * log_ratio for log_ratio in log_ratios(batch))
    return -log_sigmoid(chosen) - log_sigmoid(-rejected)


def sppo_hard(batch: PreferenceLogps, config: BetaConfig) -> Tensor:
    """SPPO (arXiv 2405.00675, eq. 4.7) with win probabilities 1 and 0: (c - 1 / (2 beta))² + (r + 1 / (2 beta))²."""
    chosen, rejected = log_ratios(batch)
    return (chosen - 0.5 / config.beta) ** 2 + (rejected + 0.5 / config.beta) ** 2


def apo_zero(batch: PreferenceLogps, config: BetaConfig) -> Tensor:
    """APO-zero (arXiv 2408.06266, eq. 7): 1 - sigmoid(beta c) + sigmoid(beta r)."""
    chosen, rejected = (config.beta * log_ratio for log_ratio in log_ratios(batch))
    return 1 - chosen.sigmoid() + rejected.sigmoid()


def apo_down(batch: PreferenceLogps, config: BetaConfig) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8): sigmoid(beta c) + 1 - sigmoid(beta d)."""
    chosen, rejected = (config.beta * log_ratio for log_ratio in log_ratios(batch))
    return chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()


def discopop(batch: PreferenceLogps, config: DiscopopConfig) -> Tensor:
    """DiscoPOP (arXiv 2406.08414, eq. 5): -(1 - w) log sigmoid(beta d) + w exp(-beta d), w = sigmoid(beta d / τ)."""
    chosen, rejected = log_ratios(batch)
    scaled = config.beta * (chosen - rejected)
    weight = (scaled / config.discopop_tau).sigmoid()
    return (1 - weight) * -log_sigmoid(scaled) + weight * (-scaled).exp()


# --- of the distribution over the batch ------------------------------------------------------------------------------


def aot(batch: PreferenceLogps, config: AotConfig) -> Tensor:
    """AOT, paired (arXiv 2406.05882): the margins of the policy dominate those of the reference, quantile by quantile.

    Margins chosen - rejected are sorted over the batch, so that the loss depends on which pairs are in it.
    """
    assert batch.ref_chosen is not None
    assert batch.ref_rejected is not None
    margins = (batch.chosen - batch.rejected).sort().values
    ref_margins = (batch.ref_chosen - batch.ref_rejected).sort().values
    return _smoothed(config.beta * (margins - ref_margins), config.label_smoothing)


def aot_unpaired(batch: PreferenceLogps, config: AotConfig) -> Tensor:
    """AOT, unpaired (arXiv 2406.05882): log-ratios of chosen answers dominate those of rejected ones, by quantile."""
    chosen, rejected = (log_ratio.sort().values for log_ratio in log_ratios(batch))
    return _smoothed(config.beta * (chosen - rejected), config.label_smoothing)


def _smoothed(scaled: Tensor, epsilon: float) -> Tensor:
    """-log sigmoid with label smoothing."""
    return (1 - epsilon) * -log_sigmoid(scaled) + epsilon * -log_sigmoid(-scaled)


# --- without a reference ---------------------------------------------------------------------------------------------


def sft(batch: PreferenceLogps, config: object) -> Tensor:
    """Negative log-likelihood of the chosen answers, a mean over all their tokens; scalar."""
    return -batch.chosen.sum() / batch.chosen_length.sum()


def simpo(batch: PreferenceLogps, config: SimpoConfig) -> Tensor:
    """SimPO (arXiv 2405.14734, eq. 6): the reward is the mean log-probability of a token, with a target margin."""
    difference = batch.chosen / batch.chosen_length - batch.rejected / batch.rejected_length
    return -log_sigmoid(config.beta * difference - config.gamma)


def orpo(batch: PreferenceLogps, config: OrpoConfig) -> Tensor:
    """ORPO (arXiv 2403.07691, eq. 6 and 7): -log p(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected)).

    p is the geometric mean of the probabilities of an answer's tokens, and its odds are p / (1 - p). The paper and its
    code call beta lambda.
    """
    chosen, rejected = batch.chosen / batch.chosen_length, batch.rejected / batch.rejected_length
    log_odds_ratio = (chosen - log_complement(chosen)) - (rejected - log_complement(rejected))
    return -chosen - config.beta * log_sigmoid(log_odds_ratio)


def log_complement(logp: Tensor) -> Tensor:
    """log(1 - exp(logp)), for a probability of at most 1 - 1e-6."""
    import torch

    logp = logp.clamp(max=-1e-6)
    return torch.where(logp > -math.log(2), (-torch.expm1(logp)).log(), torch.log1p(-logp.exp()))


def cpo(batch: PreferenceLogps, config: CpoConfig) -> Tensor:
    """CPO (arXiv 2401.08417, eq. 3): DPO's loss without a reference, plus the chosen answer's negative log-likelihood.

    The latter is per token and weighted by ``cpo_alpha``, as in TRL; the paper does not divide by tokens.
    """
    preference = -log_sigmoid(config.beta * (batch.chosen - batch.rejected))
    return preference - config.cpo_alpha * batch.chosen / batch.chosen_length
