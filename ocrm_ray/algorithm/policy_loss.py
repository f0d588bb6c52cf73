"""The clipped losses of policy and critic (PPO, arXiv 1707.06347), as means over the unmasked tokens.

A batch with nothing unmasked has loss 0 and gradient 0. For stale rollouts the clip stands around the weights before
the update, and a truncated importance weight leads from the sampler to them (arXiv 2110.00641, 1802.01561).
"""

from typing import Literal

import torch
from torch import Tensor


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """(loss, clip_share), scalars, from [B, T] each: mean of max(-A * ratio, -A * clip(ratio, 1 -/+ clip_range)).

    ``clip_share`` is the share of tokens whose gradient the clip cuts off.
    """
    assert logprobs.shape == old_logprobs.shape == advantages.shape == mask.shape
    # Masked before the exponential: whatever padding holds must not turn into a NaN gradient.
    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = _token_mean(torch.maximum(unclipped, clipped), mask)
    return loss, _token_mean((clipped > unclipped).to(loss.dtype), mask)


def truncated_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Weight [B, T] of each token's loss: min(old / sampler's probability, ``cap``); 1 where ``mask`` is False."""
    assert old_logprobs.shape == sampler_logprobs.shape == mask.shape
    return (old_logprobs - sampler_logprobs).detach().masked_fill(~mask, 0.0).exp().clamp(max=cap)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float) -> Tensor:
    """Half the mean of the larger squared error, of ``values`` or of them held within clip_range of ``old_values``.

    All [B, T]; a scalar.
    """
    assert values.shape == old_values.shape == returns.shape == mask.shape
    held = old_values + (values - old_values).clamp(-clip_range, clip_range)
    error = (values - returns).masked_fill(~mask, 0.0)
    held_error = (held - returns).masked_fill(~mask, 0.0)
    return _token_mean(torch.maximum(error.square(), held_error.square()), mask) / 2


def kl_terms(logprobs: Tensor, anchor_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """A term for each token, of the shape of ``logprobs``; with d = logprobs - anchor_logprobs:

    k1 = d (unbiased, any sign), k2 = d^2 / 2 (biased), k3 = exp(-d) - 1 + d (unbiased, never negative).
    Schulman, "Approximating KL divergence" (2020). As a term of the loss the gradient of k1 has mean 0.
    """
    assert logprobs.shape == anchor_logprobs.shape
    difference = logprobs - anchor_logprobs
    match estimator:
        case "k1":
            return difference
        case "k2":
            return difference.square() / 2
        case "k3":
            return torch.expm1(-difference) + difference


def _token_mean(terms: Tensor, mask: Tensor) -> Tensor:
    return terms.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)
