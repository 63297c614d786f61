"""The models of RAHF: one base with adapters for the policy, its start (the reference), and the contrast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import peft
from torch import Tensor

from alignkit import ConfigError, Run
from alignkit.models import (
    Member,
    Roles,
    Sequences,
    assemble,
    copy_adapter,
    decoder_layers,
    layer_outputs,
    without_dropout,
)

Job = tuple[str, Sequences]  # a role, and what it reads


class RAHFRoles(Roles):
    """Roles whose forward runs several jobs, so that DDP sees one forward for each backward pass."""

    def forward(self, jobs: Mapping[str, Job], layers: Sequence[int] = ()) -> dict[str, Tensor]:  # type: ignore[override]
        """For each job the log-probability of each answer [B], or with ``layers`` the hidden states [L, N, d].

        Hidden states are those at the answers' N tokens, one answer after the other, without padding.
        """
        outputs = {}
        for name, (role, sequences) in jobs.items():
            if layers:
                with self.using(role) as model:
                    states = layer_outputs(model, layers, **sequences.inputs)
                outputs[name] = states.flatten(1, 2)[:, sequences.before + 1]
            else:
                outputs[name] = super().forward(sequences, (role,))[role].logps.sum(1)
        return outputs


def load(run: Run, contrast: Sequence[str]) -> RAHFRoles:
    """Policy and reference from the policy's run, and an adapter for each role of ``contrast``.

    The adapters of the contrast are on the reference's model, so they read and write what the reference does. With a
    tuner of adapters, that is the policy's base, and they start as copies of the policy's adapter. With another tuner,
    such as ``full``, the reference is a model of its own, and they are LoRA adapters with the defaults of ``lora``.
    """
    members: dict[str, Member] = assemble(run, value=None, temperature=1.0).members
    model, first = members["reference"].model, f"role_{contrast[0]}"
    if members["policy"].adapter is None:
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        model, first = peft.get_peft_model(model, lora), "default"
        members["reference"] = Member(model)
    for role, adapter in zip(contrast, [first, *(f"role_{role}" for role in contrast[1:])], strict=True):
        if adapter != "default":
            copy_adapter(model, "default", adapter, trained=True)
        members[role] = Member(model, adapter)
    without_dropout(model)
    return RAHFRoles(members, say=run.say)


def train_up_to(roles: Roles, last: int) -> None:
    """Freeze the weights of the policy outside of its first ``last`` layers: the fit does not depend on them.

    Raises:
        ConfigError: no weight is left to train.
    """
    layers = decoder_layers(roles.members["policy"].model)[:last]
    first = {id(parameter) for parameter in layers.parameters()}
    for _, parameter in list(roles.trained("policy")):
        parameter.requires_grad_(id(parameter) in first)
    if not list(roles.trained("policy")):
        raise ConfigError(f"the tuner trains no weight of the layers 1 to {last}: set rahf.layers to higher ones")
