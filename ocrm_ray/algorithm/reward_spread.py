"""How far apart a reward model holds the responses to a prompt, and the step that raises it (MetaRM, arXiv 2405.00438).

No labels enter the spread: raising it stretches whatever ranking the reward model has.
"""

from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-8
"""Added to the root of a second moment, as Adam does."""


def reward_spread(scores: Tensor) -> Tensor:
    """J, a scalar, of ``scores`` [m, k]: the mean over prompts of 2 / k^2 * the sum over pairs of sigmoid(|r_i - r_j|).

    Between (k - 1) / (2 * k), where all agree, and (k - 1) / k. Pairs of equal scores have no gradient.
    """
    num_prompts, k = scores.shape
    first, second = torch.triu_indices(k, k, offset=1, device=scores.device)
    pairs = torch.sigmoid((scores[:, first] - scores[:, second]).abs())
    return 2 / k**2 * pairs.sum() / num_prompts


def ascent_step(
    gradients: list[Tensor],
    kind: Literal["sgd", "normalised", "preconditioned"],
    eta: float,
    second_moments: list[Tensor] | None = None,
) -> list[Tensor]:
    """What to add to each tensor of weights to climb along its gradient; keeps no state.

    ``sgd``: eta * g. ``normalised``: eta * g over the norm of all tensors together, a zero gradient's step is zero.
    ``preconditioned``: eta * g / (sqrt(v) + EPSILON) with Adam's second moments v, without the bias of the first steps;
    where v is 0, or there are none, g^2 stands in for v: the step of Adam's first update, eta in the gradient's sign.
    """
    match kind:
        case "sgd":
            return [eta * gradient for gradient in gradients]
        case "normalised":
            norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]).norm()
            return [(g.double() / norm * eta).to(g.dtype) if norm > 0 else torch.zeros_like(g) for g in gradients]
        case "preconditioned":
            moments = second_moments or [torch.zeros_like(gradient) for gradient in gradients]
            pairs = zip(gradients, moments, strict=True)
            return [eta * g / (torch.where(v > 0, v.sqrt(), g.abs()) + EPSILON) for g, v in pairs]
