"""The file of trained weights in a checkpoint of a stage with several roles, and the policy in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from alignkit.models.peft_internals import belongs_to
from alignkit.runs.resume import TRAINED_WEIGHTS

POLICY = "models.0."  # the policy is the first role


def read(checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by group and name.

    The group ``""`` has the trained parameters of :class:`alignkit.models.Roles`. Other groups, such as averages of
    these, are those of ``RolesTrainer.checkpoint_tensors``.
    """
    groups: dict[str, dict[str, Tensor]] = {"": {}}
    for key, tensor in load_file(checkpoint / TRAINED_WEIGHTS).items():
        group, _, name = key.rpartition("/")
        groups.setdefault(group, {})[name] = tensor
    return groups


@torch.no_grad()
def load_policy(model: Any, adapter: str | None, checkpoint: Path) -> None:
    """Set the weights of a policy to those in a checkpoint of its run.

    Args:
        model: the policy of the finished run, as :func:`alignkit.models.open_run` opens it.
        adapter: the name of the policy's adapter in a PEFT model.
        checkpoint: the folder of the checkpoint.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in read(checkpoint)[""].items():
        if name.startswith(POLICY) and (adapter is None or belongs_to("default", name)):
            own = name.removeprefix(POLICY)
            if adapter is not None:
                own = f".{own}.".replace(".default.", f".{adapter}.").strip(".")
            parameters[own].copy_(tensor)
