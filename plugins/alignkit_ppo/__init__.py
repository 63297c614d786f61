"""PPO with a KL penalty to the SFT model, the third of InstructGPT's three stages, and its losses."""

from typing import Any

from alignkit import Loss, Plan, PolicyBatch, Prompt, Ranking, Run, Stage, hookimpl
from alignkit.runs import lineage
from alignkit_ppo import losses
from alignkit_ppo.config import REFUSES, PPOConfig, check


def build(run: Run) -> Any:
    """The trainer; imports torch."""
    from alignkit_ppo.trainer import build

    return build(run)


def finish(run: Run, trainer: Any) -> dict[str, Any]:
    """Keep the policy that was asked for; imports torch."""
    from alignkit_ppo.trainer import finish

    return finish(run, trainer)


def extent(config: PPOConfig) -> str:
    """For the plan."""
    steps = config.epochs * config.minibatches
    return f"{config.iterations} iterations of {config.batch_size} answers, {steps} optimizer steps each"


def in_memory(plan: Plan) -> str:
    """For the plan: which roles are adapters of one base, and which are models of their own."""
    tuner, value = plan.config.tuner.component, plan.config.stage.config.value
    roles = ["policy", "reference", *(["value"] if value == "adapter" else [])]
    head = "; the value is a head on the policy" if value == "head" else ""
    records = {role: run.manifest for role, run in lineage.rewards_in(plan.parents).items()}
    base = lineage.base_weights(plan.config, plan.parents.get("policy"))
    trunks = lineage.trunks_of_rewards(records, plan.config, base)
    by_trunk: dict[str, list[str]] = {}
    for role, trunk in trunks.items():
        by_trunk.setdefault(trunk, []).append(role)
    roles += by_trunk.pop("policy", [])
    alone = [on[0] for on in by_trunk.values() if len(on) == 1]
    together = [f"{', '.join(on)} on a base of their own" for on in by_trunk.values() if len(on) > 1]
    if tuner.adapters:
        models = [f"{', '.join(roles)} on one base", *(f"{role} by itself" for role in alone)]
    else:
        models = [f"{', '.join([*roles, *alone])}: a model each"]
    return ", ".join([*models, *together]) + head


@hookimpl
def alignkit_stage() -> list[Stage]:
    return [
        Stage(
            name="ppo",
            summary="PPO against a reward, with a KL penalty to the SFT model",
            config=PPOConfig,
            check=check,
            build=build,
            finish=finish,
            extent=extent,
            in_memory=in_memory,
            rows=(Prompt, Ranking),
            batch=PolicyBatch,
            loss="ppo-clip",
            data="bundled:prompts",
            needs={"policy": "sft"},
            uses={"reward": "reward-model", "rollout": "generate"},
            watch=("score", "kl", "length", "eos_rate"),
            train={
                "learning_rate": 1e-5,
                "lr_scheduler_type": "constant_with_warmup",
                "adam_epsilon": 1e-5,
                "max_grad_norm": 1.0,
                "per_device_train_batch_size": 8,
                "per_device_eval_batch_size": 16,
            },
            resume={"per_device_train_batch_size": "may_change"},  # ppo.minibatches says what a step is of
            refuses=REFUSES,
        )
    ]


@hookimpl
def alignkit_loss() -> list[Loss]:
    return [
        Loss(
            name="ppo-clip",
            summary="clipped surrogate objective and clipped value loss",
            batch=PolicyBatch,
            config=losses.ClipConfig,
            build=losses.ppo_clip,
        ),
        Loss(
            name="ppo-dual-clip",
            summary="ppo-clip with a bounded loss for negative advantages (dual-clip PPO)",
            batch=PolicyBatch,
            config=losses.DualClipConfig,
            build=losses.ppo_dual_clip,
        ),
    ]
