"""The roles of a stage that samples, loaded from the runs that they come from onto as few base models as possible."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alignkit.models import adapters, logit_form, peft_internals
from alignkit.models.device_and_dtype import cast_frozen_linears
from alignkit.models.logit_form import base_of
from alignkit.models.roles import Member, Roles
from alignkit.protocols import Run
from alignkit.runs import lineage


def assemble(run: Run, *, value: Literal["adapter", "head"] | None, temperature: float) -> Roles:
    """The roles of a stage that samples: policy and reference from the policy's run, value and reward from theirs.

    Under PEFT, every role that was trained on the policy's base in the same form becomes an adapter of that base. Other
    reward models are loaded beside it; those that share a base share it in memory.

    Args:
        run: The run whose models to load.
        value: ``"adapter"`` for a value with weights of its own. It starts from the reward model. Where there is none,
            or under PEFT none on the policy's base, it starts from the policy with a fresh head. ``"head"`` for a
            scalar head on the policy's hidden states, and None for stages without a value function.
        temperature: The sampling temperature, at which log-probabilities are taken.
    """
    policy = adapters.without_dropout(run.model("policy"))
    shared = hasattr(policy, "peft_config")
    if shared:
        adapters.check_base_frozen(policy)
    members = {"policy": Member(policy, "default" if shared else None)}
    if not shared:
        members["reference"] = Member(copy.deepcopy(policy).requires_grad_(False))
    elif "policy" in run.records and run.records["policy"]["weights"] == "adapter":
        adapters.copy_adapter(policy, "default", "role_reference", trained=False)
        members["reference"] = Member(policy, "role_reference")
    else:
        members["reference"] = Member(policy, None)
    width = base_of(policy).get_output_embeddings().weight.shape[1]  # some trunks project their last hidden states
    members |= _rewards(run, policy)
    reward = members.get("reward")  # of several the first, from which the value starts
    if value == "head":
        members["value"] = Member(policy, members["policy"].adapter, _head(width, None, trained=True))
    elif value == "adapter" and not shared:
        start = "reward" if reward else "policy"
        model = adapters.without_dropout(run.model("value", start=start))
        if not reward:
            base_of(model).score = _head(width, None, trained=True)
        members["value"] = Member(model, None, base_of(model).score)
    elif value == "adapter":
        reward_head: Any = reward.head if reward and reward.model is policy else None
        adapters.copy_adapter(policy, "role_reward" if reward_head else "default", "role_value", trained=True)
        trunk = {id(parameter) for parameter in logit_form.trunk_of(policy).parameters()}
        for name, parameter in policy.named_parameters():  # a value has no use for a language model's head
            if peft_internals.belongs_to("role_value", name) and id(parameter) not in trunk:
                parameter.requires_grad_(False)
        weight = reward_head.weight if reward_head else None
        members["value"] = Member(policy, "role_value", _head(width, weight, trained=True))
    adapters.without_dropout(policy)
    roles = Roles(members, temperature, run.say)
    if run.dtype is not torch.float32:
        cast_frozen_linears(roles, run.dtype, keep=list(roles.heads.values()))
    return roles


def _rewards(run: Run, policy: Any) -> dict[str, Member]:
    """The reward roles: adapters of the policy's base or of another reward's base, or models of their own."""
    records, members = lineage.rewards_in(run.records), dict[str, Member]()
    for role, trunk in lineage.trunks_of_rewards(records, run.config, run.base_weights).items():
        if trunk == role:
            model: Any = adapters.open_run(run.parents[role], records[role], run.dtype).requires_grad_(False)
            inner = base_of(model)
            members[role] = Member(model, "default" if model is not inner else None, inner.score)
        else:
            model = policy if trunk == "policy" else members[trunk].model
            weight = adapters.load_adapter(model, run.parents[role], f"role_{role}", trained=False)
            assert weight is not None  # a reward is saved with its head
            members[role] = Member(model, f"role_{role}", _head(weight.shape[1], weight, trained=False))
    return members


def _head(width: int, weight: Tensor | None, trained: bool) -> nn.Linear:
    """A scalar head in fp32: with ``weight`` and no bias, or with a bias and all zeros."""
    head = nn.Linear(width, 1, bias=weight is None)
    with torch.no_grad():
        if weight is None:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        else:
            head.weight.copy_(weight)
    return head.requires_grad_(trained)
