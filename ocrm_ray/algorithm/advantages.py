"""Advantages: group baselines without a critic (RLOO, GRPO), and GAE with one; rewards shaped by the KL.

Everywhere what is masked out neither receives an advantage nor enters a statistic.
"""

import torch
from torch import Tensor

STD_FLOOR = 1e-4
"""Added to a group's standard deviation: equal rewards give 0, not rounding errors blown up to 1."""
VARIANCE_FLOOR = 1e-8
"""Added to the variance when whitening, for the same reason."""


def rloo_advantages(rewards: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Reward less the mean of the group's other samples, [G, K] -> [G, K] (RLOO, arXiv 2402.14740).

    ``valid`` [G, K] says which samples count (None: all). The others get 0, and so does a sample alone in its group.
    """
    rewards, valid, num_valid = _valid_group(rewards, valid)
    baseline = (rewards.sum(dim=1, keepdim=True) - rewards) / (num_valid - 1).clamp(min=1)
    return (rewards - baseline).masked_fill(~valid | (num_valid < 2), 0.0)


def grpo_advantages(rewards: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Reward less the group's mean, over its sample standard deviation, [G, K] -> [G, K] (GRPO, arXiv 2402.03300).

    ``valid`` [G, K] says which samples count (None: all). The others get 0, and so does a sample alone in its group.
    """
    rewards, valid, num_valid = _valid_group(rewards, valid)
    mean = rewards.sum(dim=1, keepdim=True) / num_valid.clamp(min=1)
    centred = (rewards - mean).masked_fill(~valid, 0.0)
    std = (centred.square().sum(dim=1, keepdim=True) / (num_valid - 1).clamp(min=1)).sqrt()
    return centred / (std + STD_FLOOR)


def _valid_group(rewards: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards [G, K] with 0 where not valid, the mask [G, K], and the number of valid samples [G, 1]."""
    if valid is None:
        valid = torch.ones_like(rewards, dtype=torch.bool)
    assert rewards.shape == valid.shape, f"rewards {tuple(rewards.shape)}, valid {tuple(valid.shape)}"
    return rewards.masked_fill(~valid, 0.0), valid, valid.sum(dim=1, keepdim=True)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each [B, T], from token rewards and values [B, T] (GAE, arXiv 1506.02438).

    ``mask`` [B, T] is True on a response's tokens, from the left; the state after the last one is worth 0.
    returns = advantages + values. Both are 0 where masked out.
    """
    assert rewards.shape == values.shape == mask.shape
    values = values.masked_fill(~mask, 0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = (rewards + gamma * next_values - values).masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(deltas)
    following = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        following = deltas[:, t] + gamma * gae_lambda * following
        advantages[:, t] = following
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` [B, T] shifted and scaled to mean 0 and variance 1 over ``mask`` [B, T]; 0 where masked out."""
    assert values.shape == mask.shape
    count = mask.sum().clamp(min=1)
    centred = (values - values.masked_fill(~mask, 0.0).sum() / count).masked_fill(~mask, 0.0)
    variance = centred.square().sum() / count
    return centred * torch.rsqrt(variance + VARIANCE_FLOOR)


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """Token rewards [B, T]: -kl_coefficient * kl [B, T], and the response's score [B] on its last unmasked token.

    A row with nothing unmasked gets no score.
    """
    assert kl.shape == mask.shape
    assert scores.shape == mask.shape[:1]
    rewards = (-kl_coefficient * kl).masked_fill(~mask, 0.0)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(dim=1, keepdim=True)
    return torch.where(positions == last, rewards + scores.unsqueeze(1), rewards)
