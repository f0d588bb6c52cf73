"""Statistics of samples against textbook values, second implementations in plain Python, and what must not matter."""

import itertools
import math
import statistics

import numpy as np
import pytest

from ocrm_ray.sample_statistics import (
    PairOrder,
    distinct_share,
    kl_estimates,
    mean_spread,
    spearman,
    wilson_interval,
    win_rate,
)


def draws(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_win_rate_counts_a_tie_half() -> None:
    assert win_rate(np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 2.0, 4.0, 0.0])) == pytest.approx(2 / 4)


@pytest.mark.parametrize(
    ("successes", "num", "low", "high"),
    # Newcombe (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_has_wilsons_textbook_values(successes: int, num: int, low: float, high: float) -> None:
    assert wilson_interval(successes / num, num) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("share", [0.0, 0.005, 0.5, 0.83, 1.0])
def test_at_the_intervals_ends_the_score_test_is_just_rejected(share: float) -> None:
    quantile = statistics.NormalDist().inv_cdf(0.975)
    for end in wilson_interval(share, 100):
        if 1e-12 < end < 1 - 1e-12:
            assert abs(share - end) / math.sqrt(end * (1 - end) / 100) == pytest.approx(quantile, rel=1e-9)
        else:
            assert end == pytest.approx(share, abs=1e-12)


def test_spearman_by_hand_with_ties() -> None:
    # ranks 1, 2.5, 2.5, 4 and 2, 1, 3.5, 3.5; centred -1.5, 0, 0, 1.5 and -0.5, -1.5, 1, 1
    assert spearman([1, 5, 5, 9], [4, 2, 7, 7]) == pytest.approx(2.25 / math.sqrt(4.5 * 4.5))


def test_spearman_without_ties_is_the_formula_of_squared_rank_differences() -> None:
    x, y = draws(0, 2, 41)
    ranks = [{value: rank for rank, value in enumerate(sorted(side))} for side in (x, y)]
    squares = sum((ranks[0][a] - ranks[1][b]) ** 2 for a, b in zip(x, y, strict=True))
    assert spearman(x, y) == pytest.approx(1 - 6 * squares / (41 * (41**2 - 1)), rel=1e-12)


def test_spearman_with_ties_is_the_correlation_of_counted_ranks() -> None:
    sides = np.random.default_rng(1).integers(0, 6, (2, 60)).tolist()
    ranks = [[sum(b < a for b in side) + (side.count(a) + 1) / 2 for a in side] for side in sides]
    assert spearman(*sides) == pytest.approx(statistics.correlation(*ranks), rel=1e-12)


def test_spearman_sees_only_the_order() -> None:
    x, y = draws(2, 2, 50)
    found = spearman(x, y)
    assert found is not None
    assert spearman(np.exp(x), y**3) == pytest.approx(found, rel=1e-12)
    assert spearman(-x, y) == pytest.approx(-found, rel=1e-12)
    assert spearman(x, np.exp(x)) == pytest.approx(1.0)


@pytest.mark.parametrize(("x", "y"), [([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [4, 4, 4]), ([1], [2]), ([], [])])
def test_without_variation_there_is_no_correlation(x: list[float], y: list[float]) -> None:
    assert spearman(x, y) is None


def test_kl_by_hand() -> None:
    # l = log 2, -log 4: k3 = 1/2 - 1 + log 2 and 4 - 1 - log 4
    policy, reference = np.log([0.5, 0.125]), np.log([0.25, 0.5])
    k1, k3 = kl_estimates(policy.astype(np.float32), reference.astype(np.float32))
    assert k1 == pytest.approx(-math.log(2), rel=1e-6)
    assert k3 == pytest.approx(2.5 - math.log(2), rel=1e-6)


def test_k3_is_summed_over_tokens_not_taken_of_the_sum() -> None:
    k1, k3 = kl_estimates(np.array([1.0, -1.0], np.float32), np.zeros(2, np.float32))
    assert (k1, k3) == (0.0, pytest.approx(math.exp(-1) + math.e - 2))


def test_k3_is_never_negative_and_both_are_zero_between_equals() -> None:
    policy, reference = draws(3, 2, 100, 12).astype(np.float32)
    assert min(kl_estimates(*rows)[1] for rows in zip(policy, reference, strict=True)) > 0
    assert kl_estimates(policy[0], policy[0]) == (0.0, 0.0)
    assert kl_estimates(np.zeros(0, np.float32), np.zeros(0, np.float32)) == (0.0, 0.0)


def test_both_estimates_have_the_divergence_as_their_mean() -> None:
    p, q = (np.exp(row) / np.exp(row).sum() for row in draws(4, 2, 5))
    terms = [kl_estimates(np.log(p[[i]]).astype(np.float32), np.log(q[[i]]).astype(np.float32)) for i in range(5)]
    assert p @ np.array(terms) == pytest.approx([np.sum(p * np.log(p / q))] * 2, rel=1e-5)


def test_distinct_n_by_hand() -> None:
    responses = [(1, 2, 1, 2), (2, 1), (3,), ()]
    assert distinct_share(responses, 1) == pytest.approx(3 / 7)
    assert distinct_share(responses, 2) == pytest.approx(2 / 4)  # 12, 21, 12 and 21: none across responses
    assert distinct_share(responses, 5) is None
    assert distinct_share([], 1) is None


def test_the_spread_is_between_a_quarter_and_a_half() -> None:
    assert mean_spread([(3.0, 3.0)]) == 0.25
    assert mean_spread([(0.0, 1e3)]) == pytest.approx(0.5)
    pairs = draws(5, 20, 2)
    expected = statistics.fmean(2 / 4 / (1 + math.exp(-abs(a - b))) for a, b in pairs)
    assert mean_spread(pairs) == pytest.approx(expected, rel=1e-12)
    assert mean_spread([(b, a) for a, b in pairs]) == pytest.approx(expected, rel=1e-12)
    assert mean_spread([]) is None


def test_pair_accuracy_leaves_gold_ties_out_and_counts_proxy_ties_half() -> None:
    gold = [(1.0, 2.0), (2.0, 1.0), (1.0, 1.0), (3.0, 1.0)]
    proxy = [(0.1, 0.3), (0.1, 0.3), (9.0, 0.0), (0.5, 0.5)]
    order = PairOrder(gold, proxy)
    assert order.accuracy() == pytest.approx((1 + 0 + 0.5) / 3)
    losses = [math.log1p(math.exp(-0.2)), math.log1p(math.exp(0.2)), math.log(2)]
    assert order.loss() == pytest.approx(statistics.fmean(losses), rel=1e-6)


def test_without_a_decided_pair_there_is_nothing_to_say_of_the_order() -> None:
    for order in (PairOrder([(1.0, 1.0)], [(0.0, 1.0)]), PairOrder([], [])):
        assert (order.accuracy(), order.loss()) == (None, None)
        assert order.by_gap() == ([None] * 3, [0] * 3)


def test_accuracy_by_gap_by_hand() -> None:
    gold = [(0, 1), (0, -2), (3, 0), (0, 4), (5, 0), (0, -6)]
    proxy = [(0, 1), (0, 1), (1, 1), (0, 9), (1, 0), (4, 0)]
    assert PairOrder(gold, proxy).by_gap() == ([0.5, 0.75, 1.0], [2, 2, 2])


def test_equal_gaps_share_a_bin_and_a_bin_may_be_empty() -> None:
    gold = [(0, gap) for gap in (1, 1, 1, 1, 2)]
    assert PairOrder(gold, gold).by_gap() == ([1.0, None, 1.0], [4, 0, 1])


def test_the_thirds_together_are_all_pairs_whatever_their_order() -> None:
    gold, proxy = np.round(draws(6, 101, 2), 1), draws(7, 101, 2)
    accuracy, counts = PairOrder(gold, proxy).by_gap()
    parts = [share * count for share, count in zip(accuracy, counts, strict=True) if share is not None]
    assert sum(counts) == np.sum(gold[:, 0] != gold[:, 1]) > 0
    assert sum(parts) / sum(counts) == pytest.approx(PairOrder(gold, proxy).accuracy(), rel=1e-12)
    swapped = gold[::-1, ::-1], proxy[::-1, ::-1]
    assert PairOrder(*swapped).by_gap() == (pytest.approx(accuracy), counts)
    gaps = sorted(abs(a - b) for a, b in gold if a != b)
    bounds = list(itertools.accumulate(counts))
    assert gaps[bounds[0] - 1] < gaps[bounds[0]] <= gaps[bounds[1] - 1] < gaps[bounds[1]]
