"""A shared prompt gives the scores and gradients of separate forwards, or is not used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.data.encoding import Branches
from alignkit.models import answer_scores, collate_separate, collate_tree, pack_trees, prompt_trees, with_answer_scores

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gemma"]
GROUPS = [
    Branches([5, 6, 7, 8], [[9, 10], [11, 12, 13, 14, 0], [15, 0]]),
    Branches([20, 21], [[9, 10, 0]]),
    Branches([30], [[1, 2, 3, 4, 5, 6, 0], [7, 0]]),
]


def reward_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype)
    return with_answer_scores(model.eval())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shared_prompt_gives_the_scores_of_separate_forwards(
    tiny_model: Callable[..., Path], architecture: str
) -> None:
    model = reward_model(tiny_model(architecture))
    one_by_one = torch.cat(
        [answer_scores(model, collate_separate([Branches(g.prompt, [a])], 0)) for g in GROUPS for a in g.answers]
    )

    assert prompt_trees.supports_tree(model.config, 16)
    torch.testing.assert_close(answer_scores(model, collate_separate(GROUPS, 0)), one_by_one)
    torch.testing.assert_close(answer_scores(model, collate_tree(GROUPS, 0, torch.float32)), one_by_one)


def test_a_shared_prompt_gives_the_gradients_of_separate_forwards(tiny_model: Callable[..., Path]) -> None:
    def gradient(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        model = reward_model(tiny_model())
        (answer_scores(model, inputs) * torch.arange(6.0)).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.testing.assert_close(
        gradient(collate_tree(GROUPS, 0, torch.float32)),
        gradient(collate_separate(GROUPS, 0)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_short_groups_share_a_row() -> None:
    groups = [Branches([1] * n, [[2], [3]]) for n in (1, 8, 2, 3)]  # 3, 10, 4 and 5 tokens

    assert pack_trees(groups) == [(2, 0), (0, 0), (1, 5), (1, 0)]
    assert collate_tree(groups, 0, torch.float32)["input_ids"].shape == (3, 10)


def test_windows_alibi_and_other_attentions_do_without_a_shared_prompt() -> None:
    from types import SimpleNamespace as Config

    assert prompt_trees.supports_tree(Config(_attn_implementation="sdpa"), 100)
    assert not prompt_trees.supports_tree(Config(_attn_implementation="flash_attention_2"), 100)
    assert not prompt_trees.supports_tree(Config(_attn_implementation="sdpa", alibi=True), 100)
    window = {"_attn_implementation": "sdpa", "sliding_window": 64}
    assert not prompt_trees.supports_tree(Config(**window), 100)
    assert prompt_trees.supports_tree(Config(**window), 64)
    assert prompt_trees.supports_tree(Config(**window, layer_types=["full_attention"]), 100)
    assert not prompt_trees.supports_tree(Config(_attn_implementation="sdpa", layer_types=["linear_attention"]), 10)


def test_the_saving_is_that_of_tokens_for_long_prompts() -> None:
    from types import SimpleNamespace as Config

    config = Config(hidden_size=4096, num_hidden_layers=32, intermediate_size=11008)
    group = Branches([0] * 100, [[0] * 20] * 9)

    assert prompt_trees.saving([group], config) == pytest.approx(9 * 120 / 280, rel=0.02)
