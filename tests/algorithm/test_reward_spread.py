"""MetaRM's spread and the step that raises it: by hand, ranges, gradients, and that a step does raise it."""

import math
from itertools import combinations

import pytest
import torch

from ocrm_ray.algorithm.reward_spread import EPSILON, ascent_step, reward_spread


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def scores(seed: int = 0, k: int = 5) -> torch.Tensor:
    return torch.randn(7, k, generator=torch.Generator().manual_seed(seed)).double()


def test_spread_by_hand():
    found = reward_spread(torch.tensor([[0.0, 2.0, -1.0], [1.0, 1.0, 1.0]]))
    of_first = 2 / 9 * (sigmoid(2) + sigmoid(1) + sigmoid(3))
    assert found.item() == pytest.approx((of_first + 1 / 3) / 2)


def test_spread_equals_a_loop_over_all_pairs():
    rows = scores().tolist()
    expected = [2 / 25 * sum(sigmoid(abs(a - b)) for a, b in combinations(row, 2)) for row in rows]
    assert reward_spread(scores()).item() == pytest.approx(sum(expected) / 7, rel=1e-12)


@pytest.mark.parametrize("k", [2, 5, 8])
def test_spread_lies_between_that_of_agreement_and_that_of_rewards_infinitely_far_apart(k: int):
    lowest, highest = (k - 1) / (2 * k), (k - 1) / k
    assert reward_spread(torch.full((3, k), 0.7)).item() == pytest.approx(lowest)
    assert reward_spread(1000 * torch.arange(k).expand(3, k).double()).item() == pytest.approx(highest)
    assert lowest < reward_spread(scores(k=k)).item() < highest


def test_spread_ignores_a_shift_of_each_prompt_and_the_order_of_its_responses_and_their_sign():
    expected = reward_spread(scores())
    shifted = -scores()[:, torch.randperm(5)] + torch.arange(7)[:, None]
    torch.testing.assert_close(reward_spread(shifted), expected)


def test_gradient_of_the_spread_equals_finite_differences():
    assert torch.autograd.gradcheck(reward_spread, scores().requires_grad_())


def test_gradient_stretches_the_ranking_that_is_there():
    ranked = torch.tensor([[3.0, 1.0, 0.0]], requires_grad=True)
    reward_spread(ranked).backward()
    slope = [sigmoid(gap) * sigmoid(-gap) for gap in (1, 2, 3)]
    expected = [slope[1] + slope[2], slope[0] - slope[1], -slope[2] - slope[0]]
    torch.testing.assert_close(ranked.grad, 2 / 9 * torch.tensor([expected]))


def test_equal_scores_have_no_gradient():
    equal = torch.full((2, 4), 0.3, requires_grad=True)
    reward_spread(equal).backward()
    assert (equal.grad == 0).all()


def test_single_response_has_no_spread_and_no_gradient():
    alone = torch.randn(6, 1, requires_grad=True)
    spread = reward_spread(alone)
    spread.backward()
    assert spread.item() == 0
    assert (alone.grad == 0).all()


GRADIENTS = [torch.tensor([[3.0, 0.0]]), torch.tensor([-4.0])]
MOMENTS = [torch.tensor([[4.0, 1.0]]), torch.tensor([0.25])]


def test_sgd_step_by_hand():
    step = ascent_step(GRADIENTS, "sgd", 0.1)
    torch.testing.assert_close(step, [torch.tensor([[0.3, 0.0]]), torch.tensor([-0.4])])


def test_normalised_step_has_length_eta_over_all_tensors_together():
    step = ascent_step(GRADIENTS, "normalised", 0.1)
    torch.testing.assert_close(step, [torch.tensor([[0.06, 0.0]]), torch.tensor([-0.08])])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_normalised_step_does_not_depend_on_the_gradients_size(scale: float):
    step = ascent_step([scale * gradient for gradient in GRADIENTS], "normalised", 0.1)
    torch.testing.assert_close(step, ascent_step(GRADIENTS, "normalised", 0.1))


def test_preconditioned_step_by_hand():
    step = ascent_step(GRADIENTS, "preconditioned", 0.1, MOMENTS)
    torch.testing.assert_close(step, [torch.tensor([[0.15, 0.0]]), torch.tensor([-0.8])])


@pytest.mark.parametrize("moments", [None, [torch.zeros(1, 2), torch.zeros(1)]], ids=["none", "zero"])
def test_without_second_moments_the_preconditioned_step_is_sign_sized(moments):
    step = ascent_step(GRADIENTS, "preconditioned", 0.1, moments)
    torch.testing.assert_close(step, [torch.tensor([[0.1, 0.0]]), torch.tensor([-0.1])])


def test_preconditioned_steps_are_the_ones_that_adam_without_momentum_takes():
    weights = torch.nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(1)).double())
    optimizer = torch.optim.Adam([weights], lr=0.01, betas=(0.0, 0.9), eps=EPSILON, maximize=True)
    for seed in range(3):
        before = weights.detach().clone()
        weights.grad = torch.randn(50, generator=torch.Generator().manual_seed(seed)).double()
        optimizer.step()
        state = optimizer.state[weights]
        moments = None if seed == 0 else [state["exp_avg_sq"] / (1 - 0.9 ** float(state["step"]))]
        (step,) = ascent_step([weights.grad], "preconditioned", 0.01, moments)
        torch.testing.assert_close(step, weights.detach() - before)


@pytest.mark.parametrize("kind", ["sgd", "normalised", "preconditioned"])
def test_eta_zero_and_a_zero_gradient_give_exactly_no_step(kind):
    for step in (ascent_step(GRADIENTS, kind, 0.0, MOMENTS), ascent_step([torch.zeros(3)], kind, 0.1)):
        assert all((tensor == 0).all() for tensor in step)


@pytest.mark.parametrize("kind", ["sgd", "normalised", "preconditioned"])
def test_a_small_step_raises_the_spread_of_a_network(kind):
    torch.manual_seed(2)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    features = torch.randn(6, 5, 4).double()
    parameters = list(network.parameters())
    spread = reward_spread(network(features)[..., 0])
    gradients = [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(parameters, torch.autograd.grad(spread, parameters, allow_unused=True), strict=True)
    ]
    step = ascent_step(gradients, kind, 1e-4)
    with torch.no_grad():
        for parameter, change in zip(parameters, step, strict=True):
            parameter += change
        risen = reward_spread(network(features)[..., 0]) - spread
    expected = sum(float((g * change).sum()) for g, change in zip(gradients, step, strict=True))
    assert risen.item() > 0
    assert risen.item() == pytest.approx(expected, rel=0.02)


def test_descent_with_the_gradient_at_the_raised_weights_adds_half_of_the_meta_gradient_to_first_order():
    """Of a quadratic loss: gradient at theta + eta * g is the plain one plus eta * H g, exactly."""
    hessian = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    theta = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    spread = reward_spread(torch.stack([theta, 2 * theta.flip(0)]))
    (gradient,) = torch.autograd.grad(spread, theta)
    (step,) = ascent_step([gradient], "sgd", 0.1)
    moved = (theta + step).detach().requires_grad_()
    (moved @ hessian @ moved / 2).backward()
    torch.testing.assert_close(moved.grad, hessian @ theta.detach() + 0.1 * hessian @ gradient)
