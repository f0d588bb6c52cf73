"""Group baselines, GAE, whitening and shaped rewards."""

import math

import pytest
import torch

from ocrm_ray.algorithm.advantages import gae, grpo_advantages, rloo_advantages, shaped_rewards, whiten

GROUP_ESTIMATORS = [rloo_advantages, grpo_advantages]


def rewards_of(seed: int, num_groups: int = 5, group_size: int = 4) -> torch.Tensor:
    return torch.randn(num_groups, group_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prefix_mask(lengths: list[int], num_tokens: int) -> torch.Tensor:
    return torch.arange(num_tokens) < torch.tensor(lengths).unsqueeze(1)


def test_rloo_by_hand():
    result = rloo_advantages(torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(result, torch.tensor([[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]))


def test_grpo_by_hand():
    result = grpo_advantages(torch.tensor([[1.0, 3.0], [0.0, 4.0]], dtype=torch.float64))
    expected = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=0)


def test_grpo_of_equal_rewards_is_zero_in_spite_of_rounding():
    rewards = torch.full((1, 7), 4.3)
    assert (rewards - rewards.sum() / 7).abs().max() > 0
    assert grpo_advantages(rewards).abs().max() < 0.01


def test_grpo_does_not_depend_on_the_scale_of_a_groups_rewards():
    rewards = rewards_of(0)
    scaled = rewards * torch.tensor([[1.0], [10.0], [3.0], [100.0], [2.0]], dtype=torch.float64)
    torch.testing.assert_close(grpo_advantages(scaled), grpo_advantages(rewards), rtol=1e-3, atol=0)


def test_rloo_scales_with_the_rewards():
    rewards = rewards_of(1)
    torch.testing.assert_close(rloo_advantages(3 * rewards), 3 * rloo_advantages(rewards))


def test_rloo_is_the_centred_reward_times_k_over_k_minus_one():
    rewards = rewards_of(2)
    torch.testing.assert_close(rloo_advantages(rewards), (rewards - rewards.mean(dim=1, keepdim=True)) * 4 / 3)


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
def test_group_advantages_ignore_a_shift_of_a_groups_rewards_and_sum_to_zero(estimator):
    rewards = rewards_of(3)
    shift = torch.arange(5).double().unsqueeze(1)
    torch.testing.assert_close(estimator(rewards + shift), estimator(rewards))
    torch.testing.assert_close(estimator(rewards).sum(dim=1), torch.zeros(5).double())


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
def test_group_advantages_follow_a_permutation_of_the_samples(estimator):
    rewards = rewards_of(4)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(estimator(rewards[:, order]), estimator(rewards)[:, order])


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
def test_masked_samples_get_nothing_and_the_rest_is_as_if_they_were_not_there(estimator):
    rewards = rewards_of(5)
    valid = torch.tensor([[True, False, True, True]]).expand(5, 4)
    result = estimator(rewards.masked_fill(~valid, math.nan), valid=valid)
    assert result[:, 1].tolist() == [0.0] * 5
    torch.testing.assert_close(result[:, [0, 2, 3]], estimator(rewards[:, [0, 2, 3]]))


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
@pytest.mark.parametrize("num_valid", [0, 1])
def test_a_group_without_two_valid_samples_gets_zero(estimator, num_valid: int):
    valid = (torch.arange(3) < num_valid).unsqueeze(0)
    assert estimator(torch.tensor([[5.0, 7.0, 9.0]]), valid=valid).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
def test_a_group_of_one_gets_zero(estimator):
    assert estimator(torch.tensor([[5.0]])).tolist() == [[0.0]]


def direct_gae(rewards, values, length, gamma, gae_lambda) -> list[float]:
    """The definition: sum over l of (gamma * lambda)^l * delta_{t+l}, in O(T^2)."""
    after = [*values[1:length], 0.0]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(length)]
    return [
        sum((gamma * gae_lambda) ** (u - t) * deltas[u] for u in range(t, length)) if t < length else 0.0
        for t in range(len(rewards))
    ]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
def test_gae_equals_the_direct_sum(gamma: float, gae_lambda: float):
    generator = torch.Generator().manual_seed(6)
    rewards, values = torch.randn(2, 4, 9, generator=generator, dtype=torch.float64)
    lengths = [9, 5, 1, 0]
    advantages, returns = gae(rewards, values, prefix_mask(lengths, 9), gamma, gae_lambda)
    for row, length in enumerate(lengths):
        expected = direct_gae(rewards[row].tolist(), values[row].tolist(), length, gamma, gae_lambda)
        assert advantages[row].tolist() == pytest.approx(expected, abs=1e-12)
        assert (returns - advantages)[row, :length].tolist() == pytest.approx(values[row, :length].tolist())
        assert returns[row, length:].abs().sum() == 0


def test_gae_with_lambda_one_returns_the_discounted_reward_to_go():
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    _, returns = gae(rewards, torch.tensor([[9.0, -3.0, 5.0]]), torch.ones(1, 3).bool(), 0.5, 1.0)
    torch.testing.assert_close(returns, torch.tensor([[3.0, 4.0, 4.0]]))


def test_gae_ignores_what_padding_holds():
    rewards, values, mask = torch.ones(1, 4), torch.ones(1, 4), prefix_mask([2], 4)
    clean = gae(rewards, values, mask, 0.9, 0.95)
    dirty = gae(rewards.masked_fill(~mask, math.nan), values.masked_fill(~mask, math.inf), mask, 0.9, 0.95)
    torch.testing.assert_close(dirty, clean)


def test_whitened_values_have_mean_zero_and_variance_one_over_the_mask():
    values = 5 + 3 * rewards_of(7, 6, 10)
    mask = prefix_mask([10, 7, 4, 1, 0, 9], 10)
    result = whiten(values.masked_fill(~mask, math.nan), mask)
    assert result[mask].mean().item() == pytest.approx(0.0, abs=1e-12)
    assert result[mask].var(correction=0).item() == pytest.approx(1.0, rel=1e-6)
    assert result[~mask].abs().sum() == 0


def test_whitening_keeps_order_and_undoes_shift_and_scale():
    values, mask = rewards_of(8), torch.ones(5, 4).bool()
    torch.testing.assert_close(whiten(7 * values - 2, mask), whiten(values, mask), rtol=1e-6, atol=1e-9)


def test_whitening_one_token_or_none_gives_zero():
    values = torch.tensor([[3.0, 4.0]])
    assert whiten(values, prefix_mask([1], 2)).tolist() == [[0.0, 0.0]]
    assert whiten(values, prefix_mask([0], 2)).tolist() == [[0.0, 0.0]]


def test_shaped_rewards_by_hand():
    scores = torch.tensor([10.0, 20.0, 30.0])
    kl = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, math.nan], [math.nan, math.inf, 0.0]])
    result = shaped_rewards(scores, kl, prefix_mask([3, 2, 0], 3), 0.5)
    torch.testing.assert_close(result, torch.tensor([[-0.5, -1.0, 8.5], [-0.5, 19.0, 0.0], [0.0, 0.0, 0.0]]))


def test_shaped_rewards_sum_to_score_less_weighted_kl():
    kl, mask = rewards_of(9, 4, 6), prefix_mask([6, 3, 1, 5], 6)
    scores = torch.tensor([1.0, -2.0, 3.0, 0.5]).double()
    expected = scores - 0.2 * (kl * mask).sum(dim=1)
    torch.testing.assert_close(shaped_rewards(scores, kl, mask, 0.2).sum(dim=1), expected)
