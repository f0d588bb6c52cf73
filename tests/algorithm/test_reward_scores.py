"""The (weighted) Bradley-Terry loss of scores, and re-centring them on a calibration set."""

import math

import pytest
import torch

from ocrm_ray.algorithm.reward_scores import bradley_terry_loss, calibration, recentre

SCORES = 4 + 3 * torch.randn(200, generator=torch.Generator().manual_seed(0))


def test_mean_and_population_spread_by_hand():
    assert calibration(torch.tensor([1.0, 3.0])) == (2.0, 1.0)


def test_a_single_score_has_spread_zero():
    assert calibration(torch.tensor([5.0])) == (5.0, 0.0)


def test_recentring_gives_mean_zero_and_leaves_the_spread():
    result = recentre(SCORES, *calibration(SCORES), scale=False)
    assert result.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert result.std(correction=0).item() == pytest.approx(SCORES.std(correction=0).item(), rel=1e-6)
    assert result.std(correction=0).item() == pytest.approx(3.0, rel=0.2)


def test_scaling_gives_unit_spread_as_well():
    result = recentre(SCORES, *calibration(SCORES), scale=True)
    assert result.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert result.std(correction=0).item() == pytest.approx(1.0, rel=1e-6)


def test_recentred_scores_do_not_depend_on_the_models_offset():
    shifted = SCORES + 16
    torch.testing.assert_close(
        recentre(shifted, *calibration(shifted), scale=False),
        recentre(SCORES, *calibration(SCORES), scale=False),
        rtol=0,
        atol=1e-5,
    )


def test_other_scores_are_moved_by_the_calibration_sets_statistics():
    assert recentre(torch.tensor([7.0]), 1.0, 2.0, scale=False).item() == 6.0
    assert recentre(torch.tensor([7.0]), 1.0, 2.0, scale=True).item() == 3.0


def test_scaling_by_no_spread_is_refused():
    with pytest.raises(ValueError, match="spread of 0"):
        recentre(SCORES, *calibration(torch.full((5,), 0.3)), scale=True)


@pytest.mark.parametrize("scores", [[], [1.0, math.nan], [math.inf]])
def test_no_scores_or_scores_that_are_not_finite_are_refused(scores: list[float]):
    with pytest.raises(ValueError, match="at least one score"):
        calibration(torch.tensor(scores))


def scores(seed: int, num_pairs: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = 3 * torch.randn(2, num_pairs, generator=generator)
    return chosen.requires_grad_(), rejected.requires_grad_()


def test_unweighted_loss_by_hand():
    loss = bradley_terry_loss(torch.tensor([0.0, math.log(3)]), torch.tensor([0.0, 0.0]))
    assert loss.item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)


def test_weighted_loss_by_hand_is_a_mean_over_pairs_not_over_weights():
    loss = bradley_terry_loss(torch.tensor([0.0, math.log(3)]), torch.zeros(2), torch.tensor([3.0, 0.5]))
    assert loss.item() == pytest.approx((3 * math.log(2) + 0.5 * math.log(4 / 3)) / 2)


def test_weighted_loss_equals_the_float64_reference():
    chosen, rejected = scores(0)
    weights = torch.rand(16, generator=torch.Generator().manual_seed(1))
    margins = (chosen.double() - rejected.double()).detach()
    expected = (weights.double() * torch.log1p(torch.exp(-margins))).mean()
    assert bradley_terry_loss(chosen, rejected, weights).item() == pytest.approx(expected.item(), rel=1e-6)


def test_uniform_weights_equal_no_weights_in_loss_and_gradient():
    gradients, losses = [], []
    for weights in (None, torch.ones(16).double()):
        chosen, rejected = scores(2)
        loss = bradley_terry_loss(chosen, rejected, weights)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.stack([chosen.grad, rejected.grad]))
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(gradients[0], gradients[1])


def test_gradient_is_the_weight_times_sigmoid_of_the_negative_margin():
    chosen, rejected = scores(3)
    weights = torch.linspace(0, 2, 16)
    bradley_terry_loss(chosen, rejected, weights).backward()
    expected = -weights * torch.sigmoid(rejected - chosen).detach() / 16
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)


def test_a_pair_of_weight_zero_has_no_influence():
    chosen, rejected = scores(4, num_pairs=2)
    bradley_terry_loss(chosen, rejected, torch.tensor([1.0, 0.0])).backward()
    assert chosen.grad[1] == 0
    assert chosen.grad[0] != 0


def test_no_gradient_flows_through_the_weights():
    chosen, rejected = scores(5)
    weights = torch.ones(16, requires_grad=True)
    bradley_terry_loss(chosen, rejected, weights).backward()
    assert weights.grad is None
    assert chosen.grad.abs().sum() > 0


def test_extreme_margins_stay_finite():
    chosen, rejected = torch.tensor([1e4, -1e4], requires_grad=True), torch.tensor([-1e4, 1e4])
    loss = bradley_terry_loss(chosen, rejected)
    loss.backward()
    assert loss.item() == 1e4
    assert chosen.grad.tolist() == [0.0, -0.5]


def test_only_the_margin_counts():
    chosen, rejected = (tensor.detach() for tensor in scores(6))
    torch.testing.assert_close(bradley_terry_loss(chosen + 7, rejected + 7), bradley_terry_loss(chosen, rejected))


def test_scores_of_shapes_that_would_broadcast_are_refused():
    with pytest.raises(AssertionError):
        bradley_terry_loss(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(AssertionError):
        bradley_terry_loss(torch.zeros(3), torch.zeros(3), torch.ones(1))
