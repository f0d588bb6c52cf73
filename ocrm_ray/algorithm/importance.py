"""Importance weights of preference pairs: how much likelier the policy is to write a pair than its author was.

w = exp(m * (ell(chosen) + ell(rejected))), where ell is a response's (relative) log density ratio between the
policy and the behaviour model (off-policy corrected reward modeling, arXiv 2507.15507). The label's law and the
prompt's cancel, so the weight of a pair is the product over its two responses. m < 1 flattens the weights
(Shimodaira 2000); alpha > 0 bounds the ratio by 1 / alpha (relative density ratio, Yamada et al. 2011).
"""

import math
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor

RELEASED_FLOOR = 1e-36
"""Added inside the published code's logarithm: below log-probs of about -83 it outweighs both densities."""

LOG_SMALLEST, LOG_LARGEST = math.log(torch.finfo(torch.float32).tiny), math.log(torch.finfo(torch.float32).max)
"""Losses are taken in float32: a largest weight outside would train on nothing, or on infinity."""


class WeightRule(TypedDict):
    """How weights follow from log-probs; see ``log_pair_weights``."""

    formula: Literal["exact", "as_released"]
    alpha: float
    m: float
    target_ess: float | None
    clip: float | None
    normalise: bool


def log_relative_ratio(policy: Tensor, behaviour: Tensor, alpha: float) -> Tensor:
    """log(p / (alpha * p + (1 - alpha) * q)) in float64, of sequence log-probs log p and log q of one shape.

    Only log p - log q enters, so no length of response can overflow or cancel. At most log(1 / alpha);
    alpha = 0 gives the plain log p - log q. Raises ValueError unless 0 <= alpha < 1.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must be at least 0 and below 1, got {alpha}")
    log_ratio = policy.double() - behaviour.double()
    if alpha == 0:
        return log_ratio
    log_alpha = torch.full_like(log_ratio, math.log(alpha))
    return -torch.logaddexp(log_alpha, math.log1p(-alpha) - log_ratio)


def released_log_ratio(policy: Tensor, behaviour: Tensor, alpha: float) -> Tensor:
    """The published code's log p - log(alpha * p + (1 - alpha) * q + 1e-36), float32; alpha <= 0: log p - log q.

    Where both log-probs are below about -83 this is log p + 82.9, not a ratio: use it only to reproduce.
    """
    log_p, log_q = policy.float(), behaviour.float()
    if alpha <= 0:
        return log_p - log_q
    return log_p - torch.log(alpha * log_p.exp() + (1 - alpha) * log_q.exp() + RELEASED_FLOOR)


def flattened_to_ess(log_ratios: Tensor, target: float) -> float:
    """The largest m in [0, 1] for which the weights exp(m * ``log_ratios`` [N]) have an ESS fraction of ``target``.

    The fraction falls from 1 as m grows: bisected in float64 down to neighbouring numbers, to the one that reaches
    ``target``; 1 where m = 1 does. Raises ValueError unless 0 < target <= 1.
    """
    if not 0 < target <= 1:
        raise ValueError(f"the target must be above 0 and at most 1, got {target}")
    log_ratios = log_ratios.double()
    if _ess_fraction(log_ratios) >= target:
        return 1.0
    reaches, misses = 0.0, 1.0
    while reaches < (middle := (reaches + misses) / 2) < misses:
        if _ess_fraction(middle * log_ratios) >= target:
            reaches = middle
        else:
            misses = middle
    return reaches


@torch.no_grad()
def log_pair_weights(policy: Tensor, behaviour: Tensor, **rule: Unpack[WeightRule]) -> Tensor:
    """Log-weights [N] of N pairs from summed log-probs [N, 2] of (chosen, rejected) under policy and behaviour model.

    ``formula`` and ``alpha`` give the log-ratio of a response, ``m`` the exponent; ``target_ess`` lowers it to the
    largest whose weights' effective sample size is that share of N (None: not). Then ``clip`` bounds the weight from
    above (None: not), and ``normalise`` divides by the mean weight of these N. All in log space and float64: a weight
    may underflow, its logarithm not. Raises ValueError where a log-prob is not finite, or the largest weight, left
    unnormalised, is 0 or infinite in float32.
    """
    shapes = f"policy {tuple(policy.shape)}, behaviour {tuple(behaviour.shape)}"
    assert policy.shape == behaviour.shape == (len(policy), 2), f"one row (chosen, rejected) a pair: {shapes}"
    if len(policy) == 0:
        raise ValueError("there are no pairs to weight")
    if not (policy.isfinite().all() and behaviour.isfinite().all()):
        raise ValueError("the pairs' log-probs are not all finite")
    log_ratio = released_log_ratio if rule["formula"] == "as_released" else log_relative_ratio
    log_weights = (rule["m"] * log_ratio(policy, behaviour, rule["alpha"]).sum(dim=1)).double()
    if rule["target_ess"] is not None:
        log_weights = flattened_to_ess(log_weights, rule["target_ess"]) * log_weights
    if rule["clip"] is not None:
        log_weights = log_weights.clamp(max=math.log(rule["clip"]))
    if rule["normalise"]:
        log_weights = log_weights - (torch.logsumexp(log_weights, dim=0) - math.log(len(log_weights)))
    largest = float(log_weights.max())
    if not LOG_SMALLEST <= largest <= LOG_LARGEST:
        raise ValueError(f"the largest weight is exp({largest:.0f}), out of float32's range: normalise the weights")
    return log_weights


def shuffled(log_weights: Tensor, seed: int) -> Tensor:
    """The placebo: the same log-weights [N], dealt to the pairs anew by ``seed``."""
    order = torch.randperm(len(log_weights), generator=torch.Generator().manual_seed(seed))
    return log_weights[order.to(log_weights.device)]


def weight_statistics(log_weights: Tensor) -> dict[str, float]:
    """What every refit reports of its weights w [N].

    ``ess_fraction``: the effective sample size (sum w)^2 / sum w^2 (Kish) as a share of N, 1 where all are equal;
    ``max_weight``; ``max_weight_share``, of their sum; ``log_weight_std``, a population standard deviation.
    """
    return {
        "ess_fraction": _ess_fraction(log_weights),
        "max_weight": float(log_weights.max().exp()),
        "max_weight_share": float(1 / _against_largest(log_weights).sum()),
        "log_weight_std": float(log_weights.std(correction=0)),
    }


def _ess_fraction(log_weights: Tensor) -> float:
    weights = _against_largest(log_weights)
    return float(weights.sum().square() / weights.square().sum()) / len(weights)


def _against_largest(log_weights: Tensor) -> Tensor:
    """Weights over the largest of them, in float64: neither they nor their squares can all underflow."""
    log_weights = log_weights.double()
    return (log_weights - log_weights.max()).exp()
