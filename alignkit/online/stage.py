"""Declaring an online stage. No torch here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from alignkit.batches import PolicyBatch
from alignkit.components import Stage, halvings
from alignkit.online.config import OnlineConfig, check, refused_train_keys
from alignkit.protocols import Plan, Run
from alignkit.rows import Prompt, Ranking
from alignkit.runs import lineage


def online_stage(
    *,
    name: str,
    summary: str,
    config: type[OnlineConfig],
    build: Callable[[Run], Any],
    loss: str,
    train: dict[str, Any] | None = None,
    less_memory: Callable[[Any], Iterable[Mapping[str, Any]]] | None = None,
    shards: bool = False,
) -> Stage:
    """A stage that samples answers from its policy, scores them with a reward, and trains on them.

    Args:
        name: what users call it, and the name of its table in the config file.
        summary: one line for ``alignkit plugins``.
        config: its settings, a dataclass that derives from :class:`OnlineConfig`.
        build: the run -> its trainer, usually ``build_trainer(run, MyTrainer)``. Import torch inside it.
        loss: the name of its default loss, which takes a :class:`alignkit.PolicyBatch`.
        train: its own defaults for the ``train`` table.
        less_memory: as in :class:`alignkit.Stage`; shorter answers come after them.
        shards: as in :class:`alignkit.Stage`.
    """
    defaults: dict[str, Any] = {
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant_with_warmup",
        "adam_epsilon": 1e-5,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
    }
    return Stage(
        name=name,
        summary=summary,
        config=config,
        check=functools.partial(check, name),
        build=build,
        shards=shards,
        less_memory=lambda config: [
            *(less_memory(config) if less_memory else ()),
            *halvings("response_length", config.response_length, 32),
        ],
        finish=lambda run, trainer: trainer.finish(),
        calibrate=_calibrate,
        extent=_extent,
        in_memory=_in_memory,
        rows=(Prompt, Ranking),
        batch=PolicyBatch,
        loss=loss,
        data="bundled:prompts",
        needs={"policy": "sft"},
        uses={"reward": "reward-model", "rollout": "decode"},
        watch=("score", "kl", "length", "eos_rate"),
        train=defaults | (train or {}),
        resume={"per_device_train_batch_size": "may_change"},  # the number of minibatches decides what a step is
        refuses=refused_train_keys(name),
    )


def _calibrate(plan: Plan, run: Run, trainer: Any) -> Mapping[str, tuple[float, float]]:
    from alignkit.online.calibration import calibrate

    return calibrate(plan, run, trainer)


def _extent(config: OnlineConfig) -> str:
    steps = "1 optimizer step" if config.steps == 1 else f"{config.steps} optimizer steps"
    return f"{config.iterations} iterations of {config.batch_size} answers, {steps} each"


def _in_memory(plan: Plan) -> str:
    """The roles that are adapters of one base, and those that are separate models."""
    tuner, value = plan.config.tuner.component, plan.config.stage.config.value_function
    roles = ["policy", "reference", *(["value"] if value == "adapter" else [])]
    head = "; the value is a head on the policy" if value == "head" else ""
    records = {role: run.manifest for role, run in lineage.rewards_in(plan.parents).items()}
    base = lineage.base_weights(plan.config, plan.parents.get("policy"))
    trunks = lineage.trunks_of_rewards(records, plan.config, base)
    by_trunk: dict[str, list[str]] = {}
    for role, trunk in trunks.items():
        by_trunk.setdefault(trunk, []).append(role)
    roles += by_trunk.pop("policy", [])
    separate = [rewards[0] for rewards in by_trunk.values() if len(rewards) == 1]
    grouped = [f"{', '.join(rewards)} on a base of their own" for rewards in by_trunk.values() if len(rewards) > 1]
    if tuner.adapters:
        models = [f"{', '.join(roles)} on one base", *(f"{role} by itself" for role in separate)]
    else:
        models = [f"{', '.join([*roles, *separate])}: a model each"]
    return ", ".join([*models, *grouped]) + head
