"""The clipped losses by hand, and where their gradients stop; the KL estimators, against exact enumeration."""

import math

import pytest
import torch

from ocrm_ray.algorithm.policy_loss import clipped_policy_loss, clipped_value_loss, kl_terms, truncated_weights

RATIOS = torch.tensor([[0.5, 1.0, 1.5, 0.5, 1.0, 1.5]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[2.0, 2.0, 2.0, -2.0, -2.0, -2.0]], dtype=torch.float64)
ALL = torch.ones(1, 6, dtype=torch.bool)


def test_policy_loss_by_hand():
    loss, clip_share = clipped_policy_loss(RATIOS.log(), torch.zeros_like(RATIOS), ADVANTAGES, ALL, 0.2)
    assert loss.item() == pytest.approx((-1.0 - 2.0 - 2.4 + 1.6 + 2.0 + 3.0) / 6)
    assert clip_share.item() == pytest.approx(2 / 6)


def test_policy_gradient_stops_only_where_the_step_would_go_further_out():
    logprobs = RATIOS.log().requires_grad_()
    clipped_policy_loss(logprobs, torch.zeros_like(RATIOS), ADVANTAGES, ALL, 0.2)[0].backward()
    expected = -ADVANTAGES * RATIOS / 6
    expected[0, 2] = expected[0, 3] = 0.0  # ratio 1.5 with a gain, ratio 0.5 with a loss
    torch.testing.assert_close(logprobs.grad, expected)


def test_on_policy_gradient_is_that_of_reinforce():
    generator = torch.Generator().manual_seed(0)
    logprobs, advantages = torch.randn(2, 3, 5, generator=generator)
    mask = torch.rand(3, 5, generator=generator) < 0.6
    logprobs.requires_grad_()
    loss, clip_share = clipped_policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -advantages * mask / mask.sum())
    assert clip_share == 0


def test_policy_loss_is_a_mean_over_tokens_not_over_sequences():
    advantages = torch.tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    loss, _ = clipped_policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), advantages, mask, 0.2)
    assert loss.item() == pytest.approx(-2.0)


def test_what_padding_holds_reaches_neither_policy_loss_nor_gradient():
    mask = torch.tensor([[True, False, False]])
    logprobs = torch.tensor([[-1.0, 500.0, -1.0]], requires_grad=True)
    old_logprobs = torch.tensor([[-1.0, -500.0, math.nan]])
    loss, clip_share = clipped_policy_loss(logprobs, old_logprobs, torch.tensor([[3.0, 1.0, math.nan]]), mask, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-3.0)
    assert clip_share == 0
    assert logprobs.grad.tolist() == [[-3.0, 0.0, 0.0]]


def test_a_batch_with_nothing_unmasked_has_loss_and_gradient_zero():
    logprobs = torch.zeros(1, 2, requires_grad=True)
    mask = torch.zeros(1, 2, dtype=torch.bool)
    loss, clip_share = clipped_policy_loss(logprobs, torch.ones(1, 2), torch.ones(1, 2), mask, 0.2)
    (loss + clipped_value_loss(logprobs, torch.ones(1, 2), torch.ones(1, 2), mask, 0.2)).backward()
    assert (loss.item(), clip_share.item()) == (0.0, 0.0)
    assert logprobs.grad.tolist() == [[0.0, 0.0]]


def expected_gradient(cap: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a three-way policy, each choice by the sampler's probability: (mean gradient, policy, sampler, advantages)."""
    logits = torch.tensor([0.4, -0.3, 1.1], dtype=torch.float64, requires_grad=True)
    sampler = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    advantages = torch.tensor([[1.0], [-2.0], [0.7]], dtype=torch.float64)
    logprobs, mask = logits.log_softmax(0).unsqueeze(1), torch.ones(3, 1, dtype=torch.bool)
    weights = truncated_weights(logprobs, sampler.log().unsqueeze(1), mask, cap)
    losses = [
        clipped_policy_loss(row, row.detach(), weight, row > -math.inf, 0.2)[0]
        for row, weight in zip(logprobs[:, None], (advantages * weights)[:, None], strict=True)
    ]
    (torch.stack(losses) * sampler).sum().backward()
    return logits.grad, logits.detach().softmax(0), sampler, advantages[:, 0]


def score_function(policy: torch.Tensor, mass: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Minus the sum of mass * advantage * d log policy / d logits."""
    return -(mass * advantages) @ (torch.eye(3, dtype=torch.float64) - policy)


def test_without_truncation_the_gradient_on_anothers_samples_is_that_on_ones_own():
    gradient, policy, _, advantages = expected_gradient(cap=100.0)
    torch.testing.assert_close(gradient, score_function(policy, policy, advantages))


def test_truncation_moves_what_is_learnt_from_to_the_smaller_of_policy_and_capped_sampler():
    gradient, policy, sampler, advantages = expected_gradient(cap=2.0)
    torch.testing.assert_close(gradient, score_function(policy, torch.minimum(policy, 2 * sampler), advantages))
    assert policy[2] > 2 * sampler[2]


def test_importance_weights_by_hand_without_gradient_and_one_on_padding():
    old = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.5]], dtype=torch.float64).log().requires_grad_()
    sampler = torch.tensor([[0.5, 0.4, 0.1, 0.9, math.nan]], dtype=torch.float64).log()
    weights = truncated_weights(old, sampler, torch.tensor([[True, True, True, True, False]]), 2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 1.25, 2.0, 0.5 / 0.9, 1.0]], dtype=torch.float64))
    assert not weights.requires_grad


def test_value_loss_by_hand():
    values = torch.tensor([[0.1, 1.0, -1.0, 0.0]])
    returns = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    loss = clipped_value_loss(values, torch.zeros(1, 4), returns, torch.ones(1, 4).bool(), 0.2)
    # within: 0.9^2; held at 0.2: 0.8^2 beats 0; held at -0.2: the true 2^2 is larger; exact: 0
    assert loss.item() == pytest.approx((0.81 + 0.64 + 4.0 + 0.0) / 4 / 2)


def test_value_gradient_stops_where_the_held_value_has_the_larger_error():
    values = torch.tensor([[0.1, 1.0, -1.0, 0.0]], requires_grad=True)
    returns = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    clipped_value_loss(values, torch.zeros(1, 4), returns, torch.ones(1, 4).bool(), 0.2).backward()
    torch.testing.assert_close(values.grad, torch.tensor([[-0.9, 0.0, -2.0, 0.0]]) / 4)


def test_value_loss_with_a_wide_clip_is_half_the_mean_squared_error():
    generator = torch.Generator().manual_seed(1)
    values, old_values, returns = torch.randn(3, 4, 6, generator=generator)
    mask = torch.rand(4, 6, generator=generator) < 0.5
    expected = (values - returns)[mask].square().mean() / 2
    torch.testing.assert_close(clipped_value_loss(values, old_values, returns, mask, 100.0), expected)


def test_what_padding_holds_reaches_neither_value_loss_nor_gradient():
    values = torch.tensor([[1.0, 7.0, 7.0]], requires_grad=True)
    returns = torch.tensor([[3.0, math.nan, math.nan]])
    old_values = torch.tensor([[1.0, 7.0, math.inf]])
    loss = clipped_value_loss(values, old_values, returns, torch.tensor([[True, False, False]]), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(2.0)
    assert values.grad.tolist() == [[-2.0, 0.0, 0.0]]


POLICY = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
ANCHOR = torch.tensor([0.1, 0.3, 0.2, 0.4], dtype=torch.float64)
EXACT_KL = 0.5 * math.log(5) + 0.2 * math.log(2 / 3) + 0.1 * math.log(0.25)


def test_terms_in_closed_form():
    log_half = torch.tensor([math.log(0.5)], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    assert kl_terms(log_half, zero, "k1").item() == pytest.approx(-math.log(2))
    assert kl_terms(log_half, zero, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_terms(log_half, zero, "k3").item() == pytest.approx(1 - math.log(2))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_expectation_over_the_policy_is_the_exact_kl(estimator: str):
    expectation = (POLICY * kl_terms(POLICY.log(), ANCHOR.log(), estimator)).sum()
    assert expectation.item() == pytest.approx(EXACT_KL, rel=1e-12)


def test_k2_is_biased_but_agrees_to_second_order_near_the_anchor():
    near = ANCHOR + 1e-4 * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    exact = (near * (near / ANCHOR).log()).sum()
    estimate = (near * kl_terms(near.log(), ANCHOR.log(), "k2")).sum()
    assert estimate.item() == pytest.approx(exact.item(), rel=1e-2)
    assert (POLICY * kl_terms(POLICY.log(), ANCHOR.log(), "k2")).sum().item() != pytest.approx(EXACT_KL, rel=0.05)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_squared_and_exponential_terms_are_never_negative(estimator: str):
    generator = torch.Generator().manual_seed(0)
    logprobs, anchor = -10 * torch.rand(2, 20, 50, generator=generator)
    nearly_equal = logprobs + 1e-6 * torch.randn(20, 50, generator=generator)
    assert kl_terms(logprobs, anchor, estimator).min() >= 0
    assert kl_terms(logprobs, nearly_equal, estimator).min() >= -1e-9


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_equal_logprobs_give_zero(estimator: str):
    assert kl_terms(ANCHOR.log(), ANCHOR.log(), estimator).abs().max() == 0


def expected_kl_gradient(estimator: str) -> torch.Tensor:
    """Mean over the policy of the gradient of a sampled token's term, with respect to the policy's logits."""
    logits = POLICY.log().requires_grad_()
    terms = kl_terms(torch.log_softmax(logits, dim=0), ANCHOR.log(), estimator)
    (POLICY * terms).sum().backward()
    return logits.grad


def test_in_the_loss_k1_has_no_gradient_on_average_and_k2_has_that_of_the_kl():
    logits = POLICY.log().requires_grad_()
    log_policy = torch.log_softmax(logits, dim=0)
    (log_policy.exp() * (log_policy - ANCHOR.log())).sum().backward()
    torch.testing.assert_close(expected_kl_gradient("k1"), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(expected_kl_gradient("k2"), logits.grad)
