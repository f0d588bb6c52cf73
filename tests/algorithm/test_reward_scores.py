"""Re-centring scores on a calibration set."""

import math

import pytest
import torch

from ocrm_ray.algorithm.reward_scores import calibration, recentre

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
