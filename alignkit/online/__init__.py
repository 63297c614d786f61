"""Shared code of stages that train on answers sampled from their own policy.

:func:`online_stage` declares one and :func:`build_trainer` makes its trainer. The stage derives from
:class:`OnlineTrainer` and writes one method, which turns scores into advantages. Importing this package imports no
torch; using its names does, except for ``OnlineConfig`` and ``online_stage``.
"""

from typing import TYPE_CHECKING

from alignkit.lazy import lazy_imports

__all__ = [
    "Advantages",
    "OnlineConfig",
    "OnlineTrainer",
    "RolesTrainer",
    "Rollouts",
    "build_trainer",
    "clipped_surrogate",
    "kl_penalty",
    "online_stage",
    "ratio_metrics",
    "token_mean",
]

if TYPE_CHECKING:
    from alignkit.online.build import build_trainer
    from alignkit.online.config import OnlineConfig
    from alignkit.online.kl import kl_penalty
    from alignkit.online.roles_trainer import RolesTrainer
    from alignkit.online.rollouts import Advantages, Rollouts
    from alignkit.online.stage import online_stage
    from alignkit.online.surrogate import clipped_surrogate, ratio_metrics, token_mean
    from alignkit.online.trainer import OnlineTrainer
else:
    __getattr__, __dir__ = lazy_imports(__name__, __file__)
