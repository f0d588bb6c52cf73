"""Re-centring of a reward model's scores on a frozen calibration set, so that every version has mean 0 there.

A shift is invisible to RLOO and GRPO; scale is what changes the meaning of the KL coefficient, hence a choice.
"""

from torch import Tensor


def calibration(scores: Tensor) -> tuple[float, float]:
    """(mean, population standard deviation) of raw scores [N]; ValueError if there are none or one is not finite."""
    if scores.numel() == 0 or not scores.isfinite().all():
        raise ValueError("calibration needs at least one score, and all of them finite")
    return float(scores.double().mean()), float(scores.double().std(correction=0))


def recentre(scores: Tensor, mean: float, std: float, scale: bool) -> Tensor:
    """``scores`` less ``mean``, and with ``scale`` over ``std``; ValueError if that is 0."""
    if not scale:
        return scores - mean
    if std == 0:
        raise ValueError("cannot scale by a calibration spread of 0: the reward model scores everything alike")
    return (scores - mean) / std
