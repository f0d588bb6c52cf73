"""The multi-view loss: torch's own distributions, cases whose information is known, gradients by finite differences."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from ocrm_ray.algorithm.multiview import (
    Gaussian,
    MultiView,
    grown_coefficient,
    multiview_loss,
    shared_information,
    symmetric_divergence,
)


def views(seed: int = 0) -> tuple[Gaussian, Gaussian]:
    generator = torch.Generator().manual_seed(seed)
    mu, raw = torch.randn(2, 2, 5, 3, generator=generator).double()
    return tuple(Gaussian(m, s) for m, s in zip(mu, raw.exp(), strict=True))


def dot(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first * second).sum(-1)


def test_divergence_by_hand():
    first = Gaussian(torch.tensor([[0.0]]), torch.tensor([[1.0]]))
    second = Gaussian(torch.tensor([[1.0]]), torch.tensor([[2.0]]))
    forward = math.log(2) + (1 + 1) / 8 - 0.5
    backward = -math.log(2) + (4 + 1) / 2 - 0.5
    assert symmetric_divergence(first, second).item() == pytest.approx((forward + backward) / 2)


def test_divergence_is_the_mean_of_both_kls_of_torchs_distributions():
    first, second = views()
    distributions = [Independent(Normal(*view), 1) for view in (first, second)]
    expected = (kl_divergence(*distributions) + kl_divergence(*reversed(distributions))) / 2
    torch.testing.assert_close(symmetric_divergence(first, second), expected)


def test_divergence_is_symmetric_and_zero_of_equals_alone():
    first, second = views()
    torch.testing.assert_close(symmetric_divergence(first, second), symmetric_divergence(second, first))
    torch.testing.assert_close(symmetric_divergence(first, first), torch.zeros(5).double())
    assert (symmetric_divergence(first, second) > 0.01).all()


def test_information_by_hand():
    first, second = torch.tensor([[1.0], [-2.0], [0.5]]), torch.tensor([[3.0], [0.5], [-2.0]])
    found = shared_information(dot, first, second).item()
    together = -sum(math.log1p(math.exp(-score)) for score in (3, -1, -1)) / 3
    apart = -sum(math.log1p(math.exp(score)) for score in (1 * -2, -2 * 3, 0.5 * 0.5)) / 3
    assert found == pytest.approx(together + apart)


def test_information_of_a_critic_that_tells_nothing_apart_is_two_log_half():
    draws = torch.randn(2, 50, 3)
    found = shared_information(lambda first, second: torch.zeros(len(first)), *draws)
    assert found.item() == pytest.approx(-2 * math.log(2))


def grid_information(joint: torch.Tensor, critic: torch.Tensor) -> torch.Tensor:
    """The estimate's exact expectation, for two variables with the finite ``joint`` distribution."""
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return (joint * torch.nn.functional.logsigmoid(critic) + apart * torch.nn.functional.logsigmoid(-critic)).sum()


def test_no_critic_finds_information_in_independent_views():
    """Every combination of two independent three-way views once, ordered so that rolling pairs all values alike."""
    first = torch.arange(3).repeat_interleave(3)[:, None].double()
    second = torch.arange(3).repeat(3)[:, None].double()
    critics = torch.randn(200, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    for table in [*critics, torch.zeros(3, 3).double()]:
        found = shared_information(lambda a, b, table=table: table[a[:, 0].long(), b[:, 0].long()], first, second)
        assert found <= -2 * math.log(2) + 1e-12
        uniform = torch.full((3, 3), 1 / 9).double()
        torch.testing.assert_close(found, grid_information(uniform, table))


def test_best_critic_of_views_that_always_agree_reaches_the_jensen_shannon_divergence():
    """Of n equally likely values: the log density ratio is log n on the diagonal and -infinity beside it."""
    values = torch.arange(4)[:, None].double()
    ratio = torch.where(torch.eye(4).bool(), math.log(4), -1e9).double()
    exact = grid_information(torch.eye(4).double() / 4, ratio)
    middle = 5 / 32, 1 / 32  # (1/4 + 1/16) / 2 on the diagonal, 1/32 beside it
    from_joint = math.log(0.25 / middle[0])
    from_marginals = 4 / 16 * math.log((1 / 16) / middle[0]) + 12 / 16 * math.log((1 / 16) / middle[1])
    assert exact.item() == pytest.approx(from_joint + from_marginals - 2 * math.log(2))
    found = shared_information(lambda a, b: ratio[a[:, 0].long(), b[:, 0].long()], values, values)
    assert found.item() == pytest.approx(-math.log(1.25))  # rolling by one never meets the diagonal


def test_a_single_pair_of_views_is_refused():
    with pytest.raises(AssertionError, match="none that is unrelated"):
        shared_information(dot, torch.ones(1, 2), torch.ones(1, 2))


def test_loss_is_divergence_less_information_of_reparametrised_draws():
    first, second = views()
    noise = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1)).double()
    draws = first.mu + first.sigma * noise[0], second.mu + second.sigma * noise[1]
    expected = 0.3 * symmetric_divergence(first, second).mean() - shared_information(dot, *draws)
    torch.testing.assert_close(multiview_loss(first, second, noise, dot, 0.3), expected)


def test_gradient_of_the_loss_equals_finite_differences():
    first, second = views()
    noise = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1)).double()

    def loss(*values: torch.Tensor) -> torch.Tensor:
        return multiview_loss(Gaussian(*values[:2]), Gaussian(*values[2:]), noise, dot, 0.3)

    assert torch.autograd.gradcheck(loss, tuple(value.requires_grad_() for value in (*first, *second)))


def hidden_states(num_rows: int, *, related: bool, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [m, size] of two views, unrelated or with one half in common."""
    first, second = torch.randn(2, num_rows, size)
    half = size // 2
    return first, torch.cat([first[:, :half], second[:, half:]], dim=1) if related else second


def information_after_training(*, related: bool) -> float:
    """At least so much: the loss on new views, negated, is the information less the divergence."""
    torch.manual_seed(3)
    network = MultiView(hidden_size=32, latent_size=2)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(300):
        draws = hidden_states(64, related=related, size=32)
        loss = network(*draws, torch.randn(2, 64, 2), grown_coefficient(step / 300))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return -float(network(*hidden_states(2000, related=related, size=32), torch.randn(2, 2000, 2), 1.0))


def test_trained_module_finds_what_views_share_and_nothing_where_they_share_nothing():
    nothing = -2 * math.log(2)
    assert information_after_training(related=False) < nothing + 0.02
    assert information_after_training(related=True) > nothing + 0.2


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 0.001), (0.25, 0.001**0.5), (0.5, 1.0), (1.0, 1.0)])
def test_coefficient_grows_exponentially_to_one_at_half_of_the_training(progress: float, expected: float):
    assert grown_coefficient(progress) == pytest.approx(expected)


def test_modules_loss_and_gradients_are_those_of_its_networks_put_together_by_hand():
    torch.manual_seed(5)
    network = MultiView(hidden_size=4, latent_size=2)
    noise, hidden, by_hand = torch.randn(2, 8, 2), torch.randn(2, 8, 4, requires_grad=True), []
    loss = network(*hidden, noise, 0.3)
    for state in hidden:
        by_hand.append(Gaussian(network.mu(state), torch.log1p(network.sigma(state).exp()) + 1e-6))
    expected = multiview_loss(*by_hand, noise, lambda a, b: network.critic(torch.cat([a, b], dim=1)).flatten(), 0.3)
    torch.testing.assert_close(loss, expected)
    gradients = (torch.autograd.grad(each, hidden)[0] for each in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_module_gives_gradients_to_every_network_and_to_the_hidden_states():
    torch.manual_seed(4)
    network = MultiView(hidden_size=4, latent_size=2)
    first, second = (hidden.bfloat16().requires_grad_() for hidden in hidden_states(8, related=False))
    loss = network(first, second, torch.randn(2, 8, 2), 1.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())
    assert first.grad.abs().sum() > 0
    assert second.grad.abs().sum() > 0


def test_spread_of_a_view_stays_above_zero_however_certain_its_network_is():
    network = MultiView(hidden_size=4, latent_size=2)
    torch.nn.init.constant_(network.sigma[-1].bias, -1e4)
    loss = network(*hidden_states(8, related=False), torch.randn(2, 8, 2), 1.0)
    assert loss.isfinite()
