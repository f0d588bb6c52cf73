"""Two responses to a prompt as views of one task: keep of hidden states what both tell (RLP-UML, arXiv 2403.19279).

The multi-view information bottleneck (arXiv 2002.07017): the views' representations share information, estimated by
the Jensen-Shannon bound of a critic (arXiv 1808.06670), and their distributions agree.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

SMALLEST_SIGMA = 1e-6
SMALLEST_COEFFICIENT = 1e-3


class Gaussian(NamedTuple):
    """m diagonal normal distributions over d dimensions: means and standard deviations [m, d]."""

    mu: Tensor
    sigma: Tensor


def symmetric_divergence(first: Gaussian, second: Gaussian) -> Tensor:
    """The mean of KL(first, second) and KL(second, first), in nats, [m]."""
    distance = (first.mu - second.mu).square()
    forward = (first.sigma.square() + distance) / second.sigma.square()
    backward = (second.sigma.square() + distance) / first.sigma.square()
    return ((forward + backward) / 4 - 0.5).sum(dim=-1)


def shared_information(critic: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    """The critic's Jensen-Shannon estimate, a scalar, of what draws ``first`` and ``second`` [m, d] share.

    ``critic``: ([m, d], [m, d]) -> [m]. Unrelated to a row is the previous row's ``second``, so m is at least 2.
    """
    assert first.shape == second.shape
    assert len(first) > 1, "one pair of views leaves none that is unrelated"
    together, apart = critic(first, second), critic(first, second.roll(1, dims=0))
    return -softplus(-together).mean() - softplus(apart).mean()


def grown_coefficient(progress: float) -> float:
    """Of the divergence, at a share ``progress`` of the training: from 0.001 exponentially to 1 at half of it."""
    return float(SMALLEST_COEFFICIENT ** max(0.0, 1 - 2 * progress))


def multiview_loss(
    first: Gaussian, second: Gaussian, noise: Tensor, critic: Callable[[Tensor, Tensor], Tensor], coefficient: float
) -> Tensor:
    """``coefficient`` * mean symmetric divergence less shared information, a scalar; ``noise`` [2, m, d]: normal draws.

    The coefficient ends at 1; there from the start, views that differ at all can shrink to the same for every input.
    """
    draws = (view.mu + view.sigma * drawn for view, drawn in zip((first, second), noise, strict=True))
    return coefficient * symmetric_divergence(first, second).mean() - shared_information(critic, *draws)


class MultiView(nn.Module):
    """What the loss needs beside the reward model, and is thrown away after training: three networks of three layers.

    ``forward``: hidden states [m, hidden_size] of two views and noise [2, m, latent_size] -> the loss, float32.
    """

    def __init__(self, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.mu = _three_layers(hidden_size, hidden_size, latent_size)
        self.sigma = _three_layers(hidden_size, hidden_size, latent_size)
        self.critic = _three_layers(2 * latent_size, hidden_size, 1)

    def forward(self, first: Tensor, second: Tensor, noise: Tensor, coefficient: float) -> Tensor:
        return multiview_loss(self._view(first.float()), self._view(second.float()), noise, self._scores, coefficient)

    def _view(self, hidden: Tensor) -> Gaussian:
        return Gaussian(self.mu(hidden), softplus(self.sigma(hidden)) + SMALLEST_SIGMA)

    def _scores(self, first: Tensor, second: Tensor) -> Tensor:
        scores: Tensor = self.critic(torch.cat([first, second], dim=-1))
        return scores[:, 0]


def _three_layers(num_inputs: int, width: int, num_outputs: int) -> nn.Sequential:
    layers = [nn.Linear(num_inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, num_outputs))
