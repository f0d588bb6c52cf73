"""A reward model's scores: their loss on preference pairs, and re-centring on a frozen calibration set.

A shift is invisible to RLOO and GRPO; scale is what changes the meaning of the KL coefficient, hence a choice.
"""

from torch import Tensor
from torch.nn.functional import softplus


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over pairs of w * -log sigmoid(chosen - rejected), for scores [N]; ``weights`` [N], None: all 1.

    The weights are data: no gradient reaches them, and the mean is over N, not over their sum (arXiv 2507.15507;
    the unweighted form is Bradley and Terry 1952).
    """
    assert chosen.shape == rejected.shape, f"{tuple(chosen.shape)} against {tuple(rejected.shape)}"
    losses = softplus(rejected - chosen)
    if weights is not None:
        assert weights.shape == losses.shape, f"weights {tuple(weights.shape)} for {tuple(losses.shape)} pairs"
        losses = weights.detach().to(losses.dtype) * losses
    return losses.mean()


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
