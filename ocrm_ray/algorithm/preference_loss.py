"""The loss of a reward model on preference pairs."""

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
