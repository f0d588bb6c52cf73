"""WPO's weights: by hand, against plain probabilities, and what they are for known distributions."""

import math

import pytest
import torch

from ocrm_ray.algorithm.logprobs import log_collision
from ocrm_ray.algorithm.wpo import pair_log_weights, response_log_weights


def log_weights_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of a batch [B, T, V] without padding."""
    logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    collisions = log_collision(logits.flatten(0, 1), 1.0).reshape(tokens.shape)
    return response_log_weights(logprobs, collisions, torch.ones_like(tokens, dtype=torch.bool))


def test_response_weight_by_hand():
    probabilities = torch.tensor([[[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]])
    weight = log_weights_of(probabilities.log(), torch.tensor([[0, 1]])).exp().item()
    assert weight == pytest.approx(math.sqrt((0.5 / 0.375) * (0.1 / 0.66)), rel=1e-5)


def test_response_weights_equal_probabilities_multiplied_in_float64():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4, 9, 30, generator=generator)
    tokens = torch.randint(30, (4, 9), generator=generator)
    probabilities = logits.double().softmax(-1)
    ratio = probabilities.gather(-1, tokens[..., None])[..., 0] / probabilities.square().sum(-1)
    torch.testing.assert_close(log_weights_of(logits, tokens).double(), ratio.prod(-1).log() / 9, rtol=1e-5, atol=1e-5)


def test_response_that_is_certain_weighs_one_and_so_does_any_under_the_uniform_distribution():
    one_hot = torch.tensor([[0.0, -math.inf, -math.inf]] * 5)
    logits = torch.stack([one_hot, torch.zeros(5, 3)])
    weights = log_weights_of(logits, torch.tensor([[0] * 5, [0, 1, 2, 1, 0]])).exp()
    torch.testing.assert_close(weights, torch.ones(2))


def test_mean_log_weight_of_the_policys_own_tokens_is_collision_less_shannon_entropy():
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
    distribution = logits.double().softmax(0)
    of_each_token = log_weights_of(logits.expand(4, 1, 4), torch.arange(4)[:, None]).double()
    shannon = -(distribution * distribution.log()).sum()
    renyi = -distribution.square().sum().log()
    torch.testing.assert_close((distribution * of_each_token).sum(), renyi - shannon, rtol=1e-5, atol=1e-6)
    assert renyi < shannon


def test_response_weight_is_a_mean_over_its_own_tokens_whatever_padding_holds():
    logprobs = torch.tensor([[-1.0, -3.0, math.nan], [-2.0, -2.0, -2.0]])
    collisions = torch.tensor([[-0.5, -0.5, -math.inf], [-1.0, -0.5, -0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    assert response_log_weights(logprobs, collisions, mask).tolist() == [-1.5, -1.5]


def test_no_gradient_flows_through_a_response_weight():
    logprobs = torch.full((2, 3), -1.0, requires_grad=True)
    assert not response_log_weights(logprobs, torch.zeros(2, 3), torch.ones(2, 3).bool()).requires_grad


@pytest.mark.parametrize(("cap", "expected"), [(True, [1.0, 0.25]), (False, [1.5, 0.25])])
def test_cap_bounds_the_product_and_not_each_responses_weight(cap: bool, expected: list[float]):
    responses = torch.tensor([[3.0, 0.5], [2.0, 0.125]]).log()
    torch.testing.assert_close(pair_log_weights(responses, cap).exp(), torch.tensor(expected))
