"""Estimators of KL(policy || anchor) from the log-probs of tokens that the policy sampled."""

from typing import Literal

import torch
from torch import Tensor


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
