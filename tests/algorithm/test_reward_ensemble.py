"""Aggregation of several reward models' scores."""

import statistics

import pytest
import torch

from ocrm_ray.algorithm.reward_ensemble import aggregate

SCORES = torch.tensor([[1.0, -2.0, 0.5], [3.0, -2.0, 0.0], [5.0, -2.0, 1.0]])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("mean", [3.0, -2.0, 0.5]),
        ("worst", [1.0, -2.0, 0.0]),
        ("mean_minus_variance", [3.0 - 0.5 * 4.0, -2.0, 0.5 - 0.5 * 0.25]),
    ],
)
def test_aggregates_by_hand(rule: str, expected: list[float]):
    assert aggregate(SCORES, rule, 0.5).tolist() == expected


def test_variance_is_the_standard_librarys_unbiased_one():
    scores = torch.randn(5, 20, generator=torch.Generator().manual_seed(0)).double()
    expected = [statistics.mean(column) - 0.1 * statistics.variance(column) for column in scores.T.tolist()]
    assert aggregate(scores, "mean_minus_variance", 0.1).tolist() == pytest.approx(expected)


def test_worst_is_at_most_the_mean_and_both_are_the_score_where_members_agree():
    scores = torch.randn(4, 100, generator=torch.Generator().manual_seed(1))
    assert (aggregate(scores, "worst") < aggregate(scores, "mean")).all()
    agreeing = scores[:1].expand(4, 100)
    for rule in ("mean", "worst", "mean_minus_variance"):
        torch.testing.assert_close(aggregate(agreeing, rule, 0.5), scores[0])


@pytest.mark.parametrize("rule", ["mean", "worst", "mean_minus_variance"])
def test_aggregate_does_not_depend_on_the_order_of_members_and_moves_with_a_common_shift(rule: str):
    scores = torch.randn(4, 100, generator=torch.Generator().manual_seed(2)).double()
    expected = aggregate(scores, rule, 0.5)
    torch.testing.assert_close(aggregate(scores.flip(0), rule, 0.5), expected)
    torch.testing.assert_close(aggregate(scores + 3, rule, 0.5), expected + 3)


def test_coefficient_zero_is_the_mean():
    torch.testing.assert_close(aggregate(SCORES, "mean_minus_variance", 0.0), aggregate(SCORES, "mean"))


def test_variance_of_a_single_member_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        aggregate(SCORES[:1], "mean_minus_variance", 0.5)
