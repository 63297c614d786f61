"""PPO's formulas by hand: GAE, rewards per token, losses."""

from __future__ import annotations

import math

import pytest
import torch
from ppo_runs import ONES, policy_batch

from alignkit.online import kl
from alignkit_ppo import gae, losses


def test_gae_by_hand() -> None:
    values, rewards = torch.tensor([[0.5, 0.4, 0.3]]), torch.tensor([[-0.1, 0.0, 1.0]])
    advantages, returns = gae.gae(rewards, values, ONES, gamma=1.0, lam=0.95)

    torch.testing.assert_close(advantages, torch.tensor([[0.33675, 0.565, 0.7]]))
    torch.testing.assert_close(returns, torch.tensor([[0.83675, 0.965, 1.0]]))


def test_advantages_are_discounted_and_end_with_the_answer_by_hand() -> None:
    """A = [-.24 + .855 * .4685, -.13 + .855 * .7, .7] with gamma .9 and lambda .95; a token of padding has none."""
    rewards, values = torch.tensor([[5.0, -0.1, 0.0, 1.0]]), torch.tensor([[2.0, 0.5, 0.4, 0.3]])
    advantages, _ = gae.gae(rewards, values, torch.tensor([[False, True, True, True]]), gamma=0.9, lam=0.95)

    torch.testing.assert_close(advantages, torch.tensor([[0.0, 0.1605675, 0.4685, 0.7]]))


def test_gae_does_not_see_padding() -> None:
    values = torch.tensor([[0.5, 0.4, 0.3, 9.0, 9.0]])
    rewards = torch.tensor([[-0.1, 0.0, 1.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False, False]])
    advantages, returns = gae.gae(rewards, values, mask, 1.0, 0.95)

    torch.testing.assert_close(advantages, torch.tensor([[0.33675, 0.565, 0.7, 0, 0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.83675, 0.965, 1.0, 0, 0]]))


def test_the_score_stands_at_the_last_token_of_the_answer() -> None:
    logps, reference = torch.tensor([[-1.0, -2, -3]] * 2), torch.tensor([[-1.5, -2, -2]] * 2)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    penalty = kl.kl_penalty(logps, reference, mask, kl_coef=0.1)
    rewards = gae.token_rewards(torch.tensor([2.0, 5.0]), penalty, mask)

    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0, 2.1], [-0.05, 5, 0]]))


def test_ppo_clip_by_hand() -> None:
    batch = policy_batch([1.5, 0.5, 1.1], [1.0, -1.0, 2.0], [0.1, 0.5, -0.1], [1.0, 0.0, 0.0])
    policy = (-1.2 + 0.8 - 2.2) / 3  # the first two are clipped
    value = (0.9**2 + 0.5**2 + 0.1**2) / 2 / 3  # the second would be 0.2 clipped, and the larger counts
    found = losses.ppo_clip(losses.ClipConfig(entropy_coef=0.01))(batch)

    assert found.loss.item() == pytest.approx(policy + 0.1 * value - 0.01 * 2, abs=1e-6)
    assert found.metrics["clip_fraction"] == pytest.approx(2 / 3)
    assert found.metrics["ratio"] == pytest.approx(3.1 / 3)
    assert found.metrics["approx_kl"] == pytest.approx(sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.1)) / 3)


def test_the_value_is_clipped_at_both_ends() -> None:
    """A step of 0.5 towards the return counts as one of 0.2, in both directions; its error is 0.8 and not 0.5."""
    batch = policy_batch([1.0, 1.0], [0.0, 0.0], [0.5, -0.5], [1.0, -1.0])

    assert losses.ppo_clip(losses.ClipConfig())(batch).metrics["value_loss"] == pytest.approx(0.8**2 / 2)


def test_dual_clip_bounds_bad_tokens_that_became_likely() -> None:
    """Of a ratio of 10 at an advantage of -1. Other tokens keep their loss, also one of a ratio of 0.1."""
    batch = policy_batch([10.0], [-1.0], [0.0], [0.0])
    good, unlikely = (policy_batch([ratio], [1.0], [0.0], [0.0]) for ratio in (10.0, 0.1))

    for each, clipped, bounded in ((batch, 10, 3), (good, -1.2, -1.2), (unlikely, -0.1, -0.1)):
        assert losses.ppo_clip(losses.ClipConfig())(each).loss.item() == pytest.approx(clipped)
        assert losses.ppo_dual_clip(losses.DualClipConfig())(each).loss.item() == pytest.approx(bounded)
