"""The KL estimators, against exact enumeration of a categorical."""

import math

import pytest
import torch

from ocrm_ray.algorithm.policy_loss import kl_terms

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


def expected_gradient(estimator: str) -> torch.Tensor:
    """Mean over the policy of the gradient of a sampled token's term, with respect to the policy's logits."""
    logits = POLICY.log().requires_grad_()
    terms = kl_terms(torch.log_softmax(logits, dim=0), ANCHOR.log(), estimator)
    (POLICY * terms).sum().backward()
    return logits.grad


def test_in_the_loss_k1_has_no_gradient_on_average_and_k2_has_that_of_the_kl():
    logits = POLICY.log().requires_grad_()
    log_policy = torch.log_softmax(logits, dim=0)
    (log_policy.exp() * (log_policy - ANCHOR.log())).sum().backward()
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(expected_gradient("k2"), logits.grad)
