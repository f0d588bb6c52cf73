"""Importance weights: the published numbers, the exact ones, and what must not change them."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ocrm_ray.algorithm.importance import (
    flattened_to_ess,
    log_pair_weights,
    log_relative_ratio,
    released_log_ratio,
    shuffled,
    weight_statistics,
)

PLAIN = {"formula": "exact", "alpha": 0.0, "m": 1.0, "target_ess": None, "clip": None, "normalise": False}
RELEASED = {"formula": "as_released", "alpha": 0.1, "m": 0.001, "target_ess": None, "clip": None, "normalise": False}

# (log pi, log sft, published formula, exact relative log-ratio) at alpha = 0.1
PUBLISHED_TABLE = [
    (-20.0, -25.0, 2.24, 2.24),
    (-60.0, -50.0, -9.90, -9.90),
    (-90.0, -85.0, -7.21, -4.90),
    (-130.0, -95.0, -47.11, -34.90),
    (-95.0, -130.0, -12.11, 2.30),
    (-150.0, -150.0, -67.11, 0.00),
]


def float64_ratio(log_p: float, log_q: float, alpha: float) -> float:
    """Independent of torch: shift by the larger exponent, then a plain logarithm."""
    largest = max(log_p, log_q)
    return log_p - largest - math.log(alpha * math.exp(log_p - largest) + (1 - alpha) * math.exp(log_q - largest))


def sums(seed: int, num_pairs: int = 200, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of long responses, about -400 each, under policy and behaviour model."""
    generator = torch.Generator().manual_seed(seed)
    behaviour = -400 + 40 * torch.randn(num_pairs, 2, generator=generator)
    return behaviour + scale * torch.randn(num_pairs, 2, generator=generator), behaviour


@pytest.mark.parametrize(("log_p", "log_q", "released", "exact"), PUBLISHED_TABLE)
def test_published_formula_gives_the_published_codes_numbers(log_p, log_q, released, exact):
    result = released_log_ratio(torch.tensor([log_p]), torch.tensor([log_q]), 0.1)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(released, abs=0.01)


@pytest.mark.parametrize(("log_p", "log_q", "released", "exact"), PUBLISHED_TABLE)
def test_exact_formula_gives_the_true_relative_ratio(log_p, log_q, released, exact):
    result = log_relative_ratio(torch.tensor([log_p]), torch.tensor([log_q]), 0.1)
    assert result.item() == pytest.approx(exact, abs=0.01)
    assert result.item() == pytest.approx(float64_ratio(log_p, log_q, 0.1), abs=1e-12)


def test_published_formula_in_closed_form_far_below_its_floor():
    log_p = torch.tensor([-150.0, -400.0])
    result = released_log_ratio(log_p, torch.tensor([-300.0, -110.0]), 0.1)
    torch.testing.assert_close(result, log_p + 36 * math.log(10), rtol=0, atol=1e-4)


def test_alpha_zero_is_the_plain_ratio_in_both_formulas():
    policy, behaviour = torch.tensor([-400.0, -90.5]), torch.tensor([-410.0, -85.0])
    assert log_relative_ratio(policy, behaviour, 0.0).tolist() == [10.0, -5.5]
    assert released_log_ratio(policy, behaviour, 0.0).tolist() == [10.0, -5.5]


@given(
    log_p=st.floats(-1000, 0),
    log_q=st.floats(-1000, 0),
    alpha=st.floats(0.001, 0.999),
)
@settings(max_examples=100, deadline=None)
def test_relative_ratio_equals_the_reference_and_never_exceeds_its_bound(log_p, log_q, alpha):
    policy, behaviour = torch.tensor([log_p, log_q]).double(), torch.tensor([log_q, log_p]).double()
    result = log_relative_ratio(policy, behaviour, alpha).tolist()
    assert result[0] == pytest.approx(float64_ratio(*policy.tolist(), alpha), abs=1e-9)
    assert max(result) <= math.log(1 / alpha) + 1e-12


@pytest.mark.parametrize("alpha", [-0.1, 1.0, 1.5])
def test_alpha_outside_its_range_is_refused(alpha: float):
    with pytest.raises(ValueError, match="alpha must be at least 0 and below 1"):
        log_relative_ratio(torch.zeros(1), torch.zeros(1), alpha)


def test_pair_weight_is_the_product_of_both_responses_ratios():
    policy = torch.tensor([[math.log(0.2), math.log(0.5)], [math.log(0.1), math.log(0.1)]]).double()
    behaviour = torch.tensor([[math.log(0.1), math.log(0.25)], [math.log(0.2), math.log(0.4)]]).double()
    result = log_pair_weights(policy, behaviour, **PLAIN)
    torch.testing.assert_close(result.exp(), torch.tensor([4.0, 0.125]).double())


def test_relative_pair_weight_by_hand():
    policy, behaviour = torch.tensor([[math.log(0.2), math.log(0.5)]]).double(), torch.log(torch.tensor([[0.1, 0.25]]))
    result = log_pair_weights(policy, behaviour.double(), **{**PLAIN, "alpha": 0.5})
    assert result.exp().item() == pytest.approx((2 / 1.5) ** 2, rel=1e-6)


def test_exponent_takes_the_power_of_the_weight():
    policy, behaviour = sums(seed=0)
    full = log_pair_weights(policy, behaviour, **PLAIN)
    flattened = log_pair_weights(policy, behaviour, **{**PLAIN, "m": 0.25})
    torch.testing.assert_close(flattened.exp(), full.exp() ** 0.25)


def test_exponent_zero_weights_every_pair_alike():
    result = log_pair_weights(*sums(seed=0), **{**PLAIN, "m": 0.0, "normalise": True})
    torch.testing.assert_close(result.exp(), torch.ones(200).double())


@pytest.mark.parametrize("clip", [None, 0.5, 2.0])
@pytest.mark.parametrize("normalise", [False, True])
def test_weights_equal_those_computed_without_log_space(clip: float | None, normalise: bool):
    policy, behaviour = sums(seed=1, scale=0.7)
    expected = (policy.double() - behaviour.double()).sum(dim=1).exp()
    expected = expected if clip is None else expected.clamp(max=clip)
    expected = expected / expected.mean() if normalise else expected
    result = log_pair_weights(policy, behaviour, **{**PLAIN, "clip": clip, "normalise": normalise})
    torch.testing.assert_close(result.exp(), expected)
    torch.testing.assert_close(result, expected.log())


def test_clip_applies_to_the_weight_before_normalisation():
    policy, behaviour = torch.log(torch.tensor([[8.0, 1.0], [1.0, 1.0]])).double(), torch.zeros(2, 2).double()
    result = log_pair_weights(policy, behaviour, **{**PLAIN, "clip": 3.0, "normalise": True})
    torch.testing.assert_close(result.exp(), torch.tensor([1.5, 0.5]).double())


def test_sums_of_minus_400_stay_finite_and_equal_the_float64_reference():
    policy, behaviour = sums(seed=2, scale=60.0)
    result = log_pair_weights(policy, behaviour, **{**PLAIN, "alpha": 0.1, "normalise": True})
    ratios = [
        sum(float64_ratio(p, q, 0.1) for p, q in zip(ps, qs, strict=True))
        for ps, qs in zip(policy.tolist(), behaviour.tolist(), strict=True)
    ]
    weights = [Fraction(math.exp(ratio)) for ratio in ratios]
    expected = [float(weight * len(weights) / sum(weights)) for weight in weights]
    assert result.exp().isfinite().all()
    assert result.exp().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("shift", [-700.0, 700.0])
def test_weights_beyond_floating_point_are_normalised_without_overflow(shift: float):
    policy, behaviour = sums(seed=3)
    near = log_pair_weights(policy, behaviour, **{**PLAIN, "normalise": True})
    far = log_pair_weights(policy.double() + shift, behaviour, **{**PLAIN, "normalise": True})
    torch.testing.assert_close(far.exp(), near.exp(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("m", [0.001, 0.3, 1.0])
def test_a_constant_on_all_log_weights_changes_nothing_after_normalisation(m: float):
    policy, behaviour = sums(seed=4)
    rule = {**PLAIN, "m": m, "normalise": True}
    shifted = policy.double() + torch.tensor([13.0, -3.0])
    torch.testing.assert_close(
        log_pair_weights(shifted, behaviour, **rule).exp(), log_pair_weights(policy, behaviour, **rule).exp()
    )


@pytest.mark.parametrize("formula", ["exact", "as_released"])
@pytest.mark.parametrize("clip", [None, 1.5])
def test_normalised_weights_have_mean_one(formula: str, clip: float | None):
    result = log_pair_weights(
        *sums(seed=5), **{**PLAIN, "formula": formula, "alpha": 0.1, "m": 0.5, "clip": clip, "normalise": True}
    )
    assert result.exp().mean().item() == pytest.approx(1.0, rel=1e-12)


def test_weights_do_not_depend_on_which_response_is_called_chosen():
    policy, behaviour = sums(seed=6)
    torch.testing.assert_close(
        log_pair_weights(policy, behaviour, **{**PLAIN, "alpha": 0.1}).exp(),
        log_pair_weights(policy.flip(1), behaviour.flip(1), **{**PLAIN, "alpha": 0.1}).exp(),
    )


def test_as_released_weights_equal_the_published_expression_in_float32():
    policy, behaviour = (tensor / 5 for tensor in sums(seed=7))
    ratio = [
        policy[:, side] - torch.log(0.1 * policy[:, side].exp() + 0.9 * behaviour[:, side].exp() + 1e-36)
        for side in (0, 1)
    ]
    expected = torch.exp(0.001 * (ratio[0] + ratio[1]))
    result = log_pair_weights(policy, behaviour, **RELEASED)
    torch.testing.assert_close(result.exp().float(), expected, rtol=2e-7, atol=0)


def test_as_released_weights_are_almost_uniform_and_bounded():
    result = log_pair_weights(*(tensor / 5 for tensor in sums(seed=8)), **RELEASED)
    assert result.exp().max() <= 0.1 ** (-2 * 0.001) + 1e-6
    assert weight_statistics(result)["ess_fraction"] > 0.99


@pytest.mark.parametrize("formula", ["exact", "as_released"])
def test_no_gradient_flows_through_the_weights(formula: str):
    policy = torch.full((3, 2), -20.0, requires_grad=True)
    result = log_pair_weights(policy, policy.detach() - 1, **{**PLAIN, "formula": formula, "normalise": True})
    assert not result.requires_grad


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_logprob_that_is_not_finite_is_refused(bad: float):
    with pytest.raises(ValueError, match="not all finite"):
        log_pair_weights(torch.tensor([[bad, -1.0]]), torch.zeros(1, 2), **PLAIN)


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_unnormalised_weights_that_all_vanish_or_explode_are_refused(shift: float):
    policy = torch.zeros(3, 2)
    policy[:, 0] += shift
    with pytest.raises(ValueError, match="normalise the weights"):
        log_pair_weights(policy, torch.zeros(3, 2), **PLAIN)


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="no pairs"):
        log_pair_weights(torch.zeros(0, 2), torch.zeros(0, 2), **PLAIN)


@pytest.mark.parametrize("scale", [1.0, 1e-200], ids=["", "squares underflow"])
@pytest.mark.parametrize(("weights", "size"), [([3.0, 1.0], 16 / 10), ([0.2] * 7, 7.0), ([0.0, 5.0, 0.0], 1.0)])
def test_effective_sample_size_by_hand(weights: list[float], size: float, scale: float):
    logs = (torch.tensor(weights).double() * scale).log()
    assert weight_statistics(logs)["ess_fraction"] * len(weights) == pytest.approx(size)


@given(st.lists(st.floats(-300, 0), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_ess_fraction_lies_between_one_over_n_and_one(log_ratios: list[float]):
    policy = torch.tensor([[log_ratio, 0.0] for log_ratio in log_ratios])
    result = log_pair_weights(policy, torch.zeros_like(policy), **{**PLAIN, "normalise": True})
    fraction = weight_statistics(result)["ess_fraction"]
    assert 1 / len(log_ratios) - 1e-9 <= fraction <= 1 + 1e-9


def test_ess_fraction_of_log_normal_weights_follows_its_closed_form():
    quantiles = (torch.arange(100_000).double() + 0.5) / 100_000
    log_weights = 0.5 * torch.special.ndtri(quantiles)
    statistics = weight_statistics(log_weights)
    assert statistics["ess_fraction"] == pytest.approx(math.exp(-0.25), rel=1e-3)
    assert statistics["log_weight_std"] == pytest.approx(0.5, rel=1e-3)


def test_weight_statistics_by_hand():
    policy = torch.log(torch.tensor([[3.0, 1.0], [1.0, 1.0]])).double()
    statistics = weight_statistics(log_pair_weights(policy, torch.zeros(2, 2), **{**PLAIN, "normalise": True}))
    assert statistics["ess_fraction"] == pytest.approx(0.8)
    assert statistics["max_weight"] == pytest.approx(1.5)
    assert statistics["max_weight_share"] == pytest.approx(0.75)
    assert statistics["log_weight_std"] == pytest.approx(math.log(3) / 2)


def test_statistics_of_a_single_pair_are_finite():
    statistics = weight_statistics(log_pair_weights(torch.zeros(1, 2), torch.zeros(1, 2), **PLAIN))
    assert statistics == {"ess_fraction": 1.0, "max_weight": 1.0, "max_weight_share": 1.0, "log_weight_std": 0.0}


def test_weighted_mean_over_behaviour_samples_is_the_expectation_under_the_policy():
    """Every pair of a three-word language once, each with the count of its probability under the behaviour model."""
    policy, behaviour, value = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [1.0, -2.0, 5.0]], dtype=torch.float64)
    counts = [round(float(b * c) * 25) for b in behaviour for c in behaviour]
    pairs = [(i, j) for i in range(3) for j in range(3)]
    rows = [pair for pair, count in zip(pairs, counts, strict=True) for _ in range(count)]
    index = torch.tensor(rows)
    result = log_pair_weights(policy.log()[index], behaviour.log()[index], **PLAIN)
    estimate = (result.exp() * value[index[:, 0]] * value[index[:, 1]]).mean()
    assert estimate.item() == pytest.approx(float((policy * value).sum() ** 2), rel=1e-12)


def plain_ess_fraction(log_weights: torch.Tensor) -> float:
    weights = [math.exp(value) for value in log_weights.tolist()]
    return math.fsum(weights) ** 2 / math.fsum(weight**2 for weight in weights) / len(weights)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("target", [0.02, 0.3, 0.9, 0.999])
def test_flattened_exponent_gives_the_target_or_is_one_where_the_full_weight_does(target: float, scale: float):
    log_ratios = scale * torch.randn(300, generator=torch.Generator().manual_seed(9)).double()
    m = flattened_to_ess(log_ratios, target)
    if plain_ess_fraction(log_ratios) >= target:
        assert m == 1.0
    else:
        assert plain_ess_fraction(m * log_ratios) == pytest.approx(target, abs=1e-9)
        assert plain_ess_fraction((m + 1e-6) * log_ratios) < target


def test_flattened_exponent_in_closed_form():
    log_ratios = torch.tensor([5.0, 0.0])  # (1 + w)^2 / (1 + w^2) = 1.6 at w = 3
    assert flattened_to_ess(log_ratios, 0.8) == pytest.approx(math.log(3) / 5, rel=1e-12)


def test_flattened_exponent_of_ratios_in_the_millions_keeps_its_relative_precision():
    assert flattened_to_ess(torch.tensor([5e6, 0.0]), 0.8) == pytest.approx(math.log(3) / 5e6, rel=1e-12)


def test_equal_ratios_keep_the_full_exponent_whatever_the_target():
    assert flattened_to_ess(torch.full((7,), -400.3), 1.0) == 1.0


@pytest.mark.parametrize("target", [0.0, -0.5, 1.5, math.nan])
def test_target_outside_its_range_is_refused(target: float):
    with pytest.raises(ValueError, match="target must be above 0 and at most 1"):
        flattened_to_ess(torch.zeros(2), target)


@pytest.mark.parametrize("m", [1.0, 0.5])
def test_target_ess_lowers_the_exponent_and_never_raises_it(m: float):
    policy, behaviour = sums(seed=10)
    rule = {**PLAIN, "m": m, "normalise": True}
    flattened = log_pair_weights(policy, behaviour, **{**rule, "target_ess": 0.6})
    assert plain_ess_fraction(flattened) == pytest.approx(0.6, abs=1e-9)
    low = plain_ess_fraction(log_pair_weights(policy, behaviour, **rule)) / 2
    torch.testing.assert_close(
        log_pair_weights(policy, behaviour, **{**rule, "target_ess": low}), log_pair_weights(policy, behaviour, **rule)
    )


def test_target_ess_is_sought_on_the_weights_before_the_clip():
    policy, behaviour = torch.tensor([[5.0, 0.0], [0.0, 0.0]]).double(), torch.zeros(2, 2).double()
    result = log_pair_weights(policy, behaviour, **{**PLAIN, "target_ess": 0.8, "clip": 2.0})
    torch.testing.assert_close(result.exp(), torch.tensor([2.0, 1.0]).double())  # 3 and 1 before


def test_shuffling_deals_the_same_weights_to_other_pairs_by_the_seed_alone():
    log_weights = torch.randn(500, generator=torch.Generator().manual_seed(11)).double()
    placebo = shuffled(log_weights, seed=3)
    assert torch.equal(placebo.sort().values, log_weights.sort().values)
    assert weight_statistics(placebo)["ess_fraction"] == pytest.approx(weight_statistics(log_weights)["ess_fraction"])
    assert abs(torch.corrcoef(torch.stack([placebo, log_weights]))[0, 1]) < 0.15
    torch.manual_seed(0)
    assert torch.equal(shuffled(log_weights, seed=3), placebo)
    assert not torch.equal(shuffled(log_weights, seed=4), placebo)


def test_statistics_of_float32_log_weights_are_summed_in_float64():
    log_weights = torch.randn(100_000, generator=torch.Generator().manual_seed(12))
    statistics = weight_statistics(log_weights)
    assert statistics["ess_fraction"] == pytest.approx(plain_ess_fraction(log_weights.double()), rel=1e-9)
