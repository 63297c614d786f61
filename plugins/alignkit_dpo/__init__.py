"""DPO: trains a policy on ranked answers without a reward model, in place of InstructGPT's last two stages."""

from typing import Any

from alignkit import Loss, NoConfig, PreferenceLogps, Ranking, Run, Stage, hookimpl
from alignkit.models import describe_reference
from alignkit_dpo import config, losses


def build(run: Run) -> Any:
    """Build the trainer. Imports torch."""
    from alignkit_dpo.trainer import build

    return build(run)


@hookimpl
def alignkit_stage() -> list[Stage]:
    return [
        Stage(
            name="dpo",
            summary="direct preference optimization on the pairs of rankings, in place of rm and ppo",
            config=config.DPOConfig,
            build=build,
            shards=True,
            less_memory=config.less_memory,
            in_memory=describe_reference,
            rows=(Ranking,),
            batch=PreferenceLogps,
            loss="sigmoid",
            data="bundled:rankings",
            data_of="rm",
            needs={"policy": "sft"},
            watch=("accuracy", "margin", "kl"),
            train={
                "learning_rate": 2e-6,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
                "num_train_epochs": 1,
                "per_device_train_batch_size": 8,
                "per_device_eval_batch_size": 8,
                "eval_strategy": "steps",
                "eval_steps": 0.5,
                "eval_on_start": True,
                "save_steps": 0.5,
                "logging_steps": 0.05,
            },
            refuses={
                "neftune_noise_alpha": "DPO compares exact log-probabilities with those of the reference",
                "train_sampling_strategy=group_by_length": "a pair has two answers, and so no length of its own",
                "train_sampling_strategy=batch_rebalance": "a pair has two answers, and so no length of its own",
            },
        )
    ]


LOSSES: tuple[tuple[str, str, type, Any], ...] = (
    ("sigmoid", "DPO: log-odds of the better answer under the implicit reward", config.BetaConfig, losses.sigmoid),
    ("ipo", "IPO: squared distance of the log-ratio difference from 1 / (2 beta)", config.BetaConfig, losses.ipo),
    ("hinge", "hinge loss (SLiC): zero once the better answer leads by 1 / beta", config.BetaConfig, losses.hinge),
    ("robust", "DPO that allows for a share of wrong labels", config.RobustConfig, losses.robust),
    ("sigmoid_norm", "DPO on log-ratios per token", config.BetaConfig, losses.sigmoid_norm),
    ("exo_pair", "EXO: reverse KL to the preferences", config.ExoConfig, losses.exo_pair),
    ("nca_pair", "NCA: noise contrastive alignment", config.BetaConfig, losses.nca_pair),
    ("bco_pair", "BCO: a classifier of good and bad answers", config.BetaConfig, losses.bco_pair),
    ("sppo_hard", "SPPO: self-play with hard preferences", config.BetaConfig, losses.sppo_hard),
    ("aot", "AOT: optimal transport between the pairs' log-ratios", config.AotConfig, losses.aot),
    ("aot_unpaired", "AOT between chosen and rejected answers", config.AotConfig, losses.aot_unpaired),
    ("apo_zero", "APO: raises the better answers and lowers the worse ones", config.BetaConfig, losses.apo_zero),
    ("apo_down", "APO for better answers that are worse than the policy's own", config.BetaConfig, losses.apo_down),
    ("discopop", "DiscoPOP: a mixture of logistic and exponential loss", config.DiscopopConfig, losses.discopop),
)
COMPARES = ("aot", "aot_unpaired", "sft")  # they sort the log-ratios of a microbatch, or divide by its tokens
WITHOUT_REFERENCE: tuple[tuple[str, str, type, Any], ...] = (
    ("sft", "log-likelihood of the better answers only", NoConfig, losses.sft),
    ("simpo", "SimPO: mean log-probability per token as the reward, no reference", config.SimpoConfig, losses.simpo),
    ("orpo", "ORPO: likelihood of the better answer, and its odds against the worse", config.OrpoConfig, losses.orpo),
    ("cpo", "CPO: DPO without a reference, and the likelihood of the better answer", config.CpoConfig, losses.cpo),
)


@hookimpl
def alignkit_loss() -> list[Loss]:
    def declared(name: str, summary: str, config: type, formula: Any, needs_reference: bool) -> Loss:
        return Loss(
            name=name,
            summary=summary,
            batch=PreferenceLogps,
            config=config,
            build=losses.mean(formula),
            needs_reference=needs_reference,
            compares_rows=name in COMPARES,
        )

    return [
        *(declared(*row, needs_reference=True) for row in LOSSES),
        *(declared(*row, needs_reference=False) for row in WITHOUT_REFERENCE),
    ]
