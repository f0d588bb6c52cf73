"""What each strategy makes of measured pairs, against closed forms in float64; and what each asks for."""

import numpy as np
import pytest

from ocrm_ray.config import Correction
from ocrm_ray.strategies import make_strategy

POLICY = np.array([[-9.0, -12.5], [-30.25, -7.5], [-1.0, -2.0], [-18.0, -18.0], [-4.5, -6.0]], dtype=np.float32)
BEHAVIOUR = np.array([[-10.0, -11.0], [-28.0, -9.75], [-1.5, -1.75], [-18.0, -18.0], [-6.0, -5.0]], dtype=np.float32)


def weights(strategy: str, measured=POLICY, behaviour=BEHAVIOUR, seed=0, **settings):
    correction = Correction.model_validate({"strategy": strategy, "weights": settings})
    return make_strategy(correction).log_weights(measured, behaviour, seed).exp().numpy()


def ratios(policy=POLICY, behaviour=BEHAVIOUR):
    """pi / sft of each response [N, 2]."""
    return np.exp(policy.astype(np.float64) - behaviour.astype(np.float64))


def test_ocrm_weighs_by_the_pairs_density_ratio_over_its_mean():
    expected = ratios().prod(axis=1)
    np.testing.assert_allclose(weights("ocrm", normalise=False), expected, rtol=1e-12)
    np.testing.assert_allclose(weights("ocrm"), expected / expected.mean(), rtol=1e-12)


def test_ocrm_with_alpha_and_m_is_the_relative_ratio_to_that_power():
    relative = ratios() / (0.25 * ratios() + 0.75)
    found = weights("ocrm", alpha=0.25, m=0.5, normalise=False)
    np.testing.assert_allclose(found, relative.prod(axis=1) ** 0.5, rtol=1e-12)


def test_ocrm_clips_before_it_normalises():
    clipped = np.minimum(ratios().prod(axis=1), 1.25)
    assert (clipped == 1.25).any()
    np.testing.assert_allclose(weights("ocrm", clip=1.25), clipped / clipped.mean(), rtol=1e-12)


def test_ocrm_with_m_0_weighs_all_pairs_alike():
    np.testing.assert_array_equal(weights("ocrm", m=0.0), np.ones(5))


def test_ocrm_as_released_is_the_published_float32_formula():
    low = np.array([[-100.0, -20.0], [-5.0, -130.0]], dtype=np.float32)
    high = low + np.array([[30.0, -1.0], [2.0, 25.0]], dtype=np.float32)
    p, q = np.exp(high), np.exp(low)
    expected = np.exp(0.01 * (high - np.log(np.float32(0.1) * p + np.float32(0.9) * q + np.float32(1e-36))).sum(axis=1))
    found = weights("ocrm", high, low, formula="as_released", alpha=0.1, m=0.01, normalise=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    exact = weights("ocrm", high, low, alpha=0.1, m=0.01, normalise=False)
    assert np.abs(found / exact - 1).max() > 0.1


@pytest.mark.parametrize("target", [0.3, 0.9])
def test_the_target_ess_is_met_by_a_power_of_the_ratio(target):
    rng = np.random.default_rng(3)
    policy = rng.normal(-20, 3, (400, 2)).astype(np.float32)
    behaviour = rng.normal(-20, 3, (400, 2)).astype(np.float32)
    plain = (policy.astype(np.float64) - behaviour).sum(axis=1)
    found = weights("ocrm", policy, behaviour, target_ess=target)
    assert found.sum() ** 2 / (found**2).sum() / 400 == pytest.approx(target, rel=1e-6)
    power, intercept = np.polyfit(plain, np.log(found), 1)
    assert 0 < power < 1
    np.testing.assert_allclose(np.log(found), power * plain + intercept, atol=1e-8)


def test_shuffled_deals_ocrms_weights_to_other_pairs_by_the_seed():
    rng = np.random.default_rng(4)
    policy, behaviour = (rng.normal(-20, 1, (50, 2)).astype(np.float32) for _ in range(2))
    own = weights("ocrm", policy, behaviour, clip=3.0)
    first, again, other = (weights("shuffled", policy, behaviour, seed, clip=3.0) for seed in (7, 7, 8))
    np.testing.assert_array_equal(np.sort(first), np.sort(own))
    np.testing.assert_array_equal(first, again)
    assert (first != own).mean() > 0.8
    assert (first != other).mean() > 0.8


def test_wpo_bt_weighs_by_the_product_capped_at_1_then_over_the_mean():
    alignments = np.array([[0.5, 0.25], [-0.5, 0.25], [-1.0, -2.0], [0.75, -0.75]], dtype=np.float32)
    capped = np.array([1.0, np.exp(-0.25), np.exp(-3.0), 1.0])
    np.testing.assert_allclose(weights("wpo_bt", alignments, None, normalise=False), capped, rtol=1e-12)
    found = weights("wpo_bt", alignments, None)
    np.testing.assert_allclose(found, capped / capped.mean(), rtol=1e-12)
    assert found.mean() == pytest.approx(1.0, abs=1e-12)


def test_ratios_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not all finite"):
        weights("ocrm", np.full((2, 2), np.nan, dtype=np.float32), BEHAVIOUR[:2])


NEEDS = {
    # refits, measure, needs_ratios, rollouts
    "none": (False, None, False, None),
    "refit": (True, None, False, None),
    "ocrm": (True, "logprobs", True, None),
    "shuffled": (True, "logprobs", True, None),
    "wpo_bt": (True, "alignments", False, None),
    "metarm": (True, None, False, "groups"),
    "rlp_uml": (True, None, False, "groups"),
    "rlp_spg": (True, None, False, "synthetic"),
    "relabel": (True, None, False, "gold"),
}


@pytest.mark.parametrize("name", NEEDS)
def test_a_strategy_declares_what_it_needs_and_the_configuration_agrees(name):
    correction = Correction.model_validate({"strategy": name})
    strategy = make_strategy(correction)
    assert (strategy.refits, strategy.measure, strategy.needs_ratios, strategy.rollouts) == NEEDS[name]
    assert (strategy.log_weights is not None) == (strategy.measure is not None) == correction.scores_pairs


def test_every_strategy_of_the_configuration_is_declared():
    assert set(Correction.model_fields["strategy"].annotation.__args__) == set(NEEDS)
