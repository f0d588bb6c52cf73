"""DPO and its weighted form: by hand, gradients in closed form and by finite differences."""

import math

import pytest
import torch

from ocrm_ray.algorithm.direct_preference import direct_preference_losses, implicit_margins


def pairs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probs [6, 2] under policy and anchor, in float64."""
    generator = torch.Generator().manual_seed(seed)
    anchor = -30 + 5 * torch.randn(6, 2, generator=generator).double()
    return anchor + 4 * torch.randn(6, 2, generator=generator).double(), anchor


def test_margin_and_loss_by_hand():
    margins = implicit_margins(torch.tensor([[-10.0, -20.0]]), torch.tensor([[-12.0, -19.0]]), 0.5)
    assert margins.item() == pytest.approx(0.5 * (2 + 1))
    losses = direct_preference_losses(margins, 0.0)
    assert losses.item() == pytest.approx(math.log1p(math.exp(-1.5)))


def test_loss_of_the_anchor_itself_is_log_two():
    anchor = pairs()[1]
    losses = direct_preference_losses(implicit_margins(anchor, anchor, 0.1), 0.3)
    torch.testing.assert_close(losses, torch.full((6,), math.log(2)).double())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
def test_losses_equal_the_published_expression_of_probabilities(label_smoothing: float):
    policy, anchor = pairs()
    found = direct_preference_losses(implicit_margins(policy, anchor, 0.3), label_smoothing)
    for loss, p, a in zip(found.tolist(), policy.tolist(), anchor.tolist(), strict=True):
        ratio = (math.exp(p[0] - a[0]) / math.exp(p[1] - a[1])) ** 0.3
        right = ratio / (1 + ratio)
        expected = -(1 - label_smoothing) * math.log(right) - label_smoothing * math.log(1 - right)
        assert loss == pytest.approx(expected, rel=1e-9)


def test_gradient_pulls_both_responses_apart_in_closed_form():
    policy, anchor = pairs()
    policy.requires_grad_()
    margins = implicit_margins(policy, anchor, 0.3)
    direct_preference_losses(margins, 0.0).mean().backward()
    pull = 0.3 * torch.sigmoid(-margins.detach()) / 6
    torch.testing.assert_close(policy.grad, torch.stack([-pull, pull], dim=1))


def test_gradient_of_the_smoothed_weighted_loss_equals_finite_differences():
    policy, anchor = pairs()
    weights = torch.rand(6, generator=torch.Generator().manual_seed(1)).double()

    def loss(policy: torch.Tensor) -> torch.Tensor:
        return direct_preference_losses(implicit_margins(policy, anchor, 0.3), 0.1, weights).mean()

    assert torch.autograd.gradcheck(loss, policy.requires_grad_())


def test_smoothed_loss_is_least_where_the_margin_matches_the_share_of_swapped_labels():
    margin = torch.tensor([math.log(0.8 / 0.2)], dtype=torch.float64, requires_grad=True)
    direct_preference_losses(margin, 0.2).backward()
    assert margin.grad.item() == pytest.approx(0, abs=1e-12)


def test_weights_scale_each_pairs_loss_and_get_no_gradient():
    margins = implicit_margins(*pairs(), 0.3)
    weights = torch.tensor([0.0, 0.5, 1.0, 0.25, 2.0, 1.0], requires_grad=True)
    found = direct_preference_losses(margins, 0.1, weights)
    torch.testing.assert_close(found, weights.detach().double() * direct_preference_losses(margins, 0.1))
    assert not found.requires_grad


def test_margins_of_hundreds_give_finite_losses_and_gradients():
    margins = torch.tensor([-500.0, 500.0], requires_grad=True)
    losses = direct_preference_losses(margins, 0.0)
    losses.sum().backward()
    assert losses.tolist() == [500.0, 0.0]
    assert margins.grad.tolist() == [-1.0, 0.0]
