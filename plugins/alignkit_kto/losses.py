"""KTO's loss, a function of :class:`alignkit.RatedLogps`. TRL's ``KTOTrainer`` is the oracle of the tests."""

from __future__ import annotations

from collections.abc import Callable

from alignkit import LossOutput, RatedLogps
from alignkit_kto.config import KTOLossConfig


def kto(config: KTOLossConfig) -> Callable[[RatedLogps], LossOutput]:
    """KTO (arXiv 2402.01306, eq. 7 and 8): the mean of w (1 - sigmoid(±beta (r - z))).

    r is log(policy / reference) of an answer, z the KL to the reference, the sign is + for good answers and - for bad
    ones, and w is the weight of good or of bad answers.
    """

    def loss(batch: RatedLogps) -> LossOutput:
        assert batch.ref_logps is not None
        assert batch.kl is not None
        good = batch.good.to(batch.logps.dtype)
        lead = (batch.logps - batch.ref_logps - batch.kl) * (2 * good - 1)
        weight = config.good_weight * good + config.bad_weight * (1 - good)
        return LossOutput((weight * (1 - (config.beta * lead).sigmoid())).mean())

    return loss
