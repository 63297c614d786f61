"""Decides whether a stage computes a prompt once for all its answers (see :mod:`alignkit.models.prompt_trees`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.data.encoding import Branches
from alignkit.errors import ConfigError
from alignkit.models import prompt_trees
from alignkit.protocols import Run

WORTHWHILE = 1.05  # times fewer operations


def decide_shared_prompt(
    run: Run,
    model: Any,
    groups: Sequence[Branches],
    forward: Callable[[Branches, bool], Tensor],
    device: torch.device,
    *,
    supported: bool = True,
) -> bool:
    """Whether to share prompts: as the stage's ``shared_prompt`` says; if it is null, where that is exact and faster.

    Args:
        groups: the training data.
        forward: returns what the stage computes of the answers of a group, as one tensor; with ``True``, by a tree.
        supported: whether the stage can use a tree with this model at all.

    Raises:
        ConfigError: the setting is true, and the model does not compute the same with a shared prompt.
    """
    setting = f"{run.config.stage.component.name}.shared_prompt"
    wanted: bool | None = run.config.stage.config.shared_prompt
    if wanted is False:
        return False
    longest = max(len(group.prompt) + max(map(len, group.answers)) for group in groups)
    exact = supported and prompt_trees.supports_tree(model.config, longest)
    exact = exact and agrees(model, min(groups, key=prompt_trees.tree_size), forward, device, run.dtype)
    if wanted and not exact:
        raise ConfigError(
            f"{setting}=true: with {run.config.model}, the results would differ from those of separate forward passes. "
            f"Set {setting} to false or null"
        )
    saving = prompt_trees.saving(groups, model.config)
    if not exact or (wanted is None and saving <= WORTHWHILE):
        return False
    run.say(
        f"shared prompt: each prompt is computed once for all its answers, which saves {1 - 1 / saving:.0%} of the work"
    )
    return True


def agrees(
    model: Any,
    group: Branches,
    forward: Callable[[Branches, bool], Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    """Whether the model computes a group the same with a shared prompt as without, up to rounding."""
    training, exact = model.training, dtype is torch.float32
    model.to(device).eval()
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=not exact):
        separate, shared = forward(group, False).float(), forward(group, True).float()
    model.train(training)
    rounding = 1e-3 if exact else 0.1
    return bool((separate - shared).abs().max() <= rounding * (1 + separate.abs().max()))
