"""Learning from preference pairs without a reward model: DPO (arXiv 2305.18290), or with weights WPO (2406.11827)."""

from torch import Tensor
from torch.nn.functional import softplus


def implicit_margins(policy: Tensor, anchor: Tensor, beta: float) -> Tensor:
    """Implicit reward of the chosen less that of the rejected, [N]: beta * log(policy / anchor) of each.

    From log-probs [N, 2] of (chosen, rejected), summed over the response.
    """
    assert policy.shape == anchor.shape == (len(policy), 2), f"{tuple(policy.shape)} against {tuple(anchor.shape)}"
    rewards = beta * (policy - anchor)
    return rewards[:, 0] - rewards[:, 1]


def direct_preference_losses(margins: Tensor, label_smoothing: float, weights: Tensor | None = None) -> Tensor:
    """Loss of each pair [N], whose mean is the objective: w * -log sigmoid(``implicit_margins``).

    ``label_smoothing``: the assumed share of swapped labels. ``weights`` [N], None: all 1; no gradient reaches them.
    """
    losses = (1 - label_smoothing) * softplus(-margins) + label_smoothing * softplus(margins)
    if weights is not None:
        assert weights.shape == losses.shape, f"weights {tuple(weights.shape)} for {tuple(losses.shape)} pairs"
        losses = weights.detach().to(losses.dtype) * losses
    return losses
