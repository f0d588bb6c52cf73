"""What a few seeds can say: Student's interval of a mean, and a paired bootstrap of a difference."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000
BOOTSTRAP_SEED = 0
Interval = tuple[float, float]


def mean_interval(values: Sequence[float]) -> Interval | None:
    """95 % interval of the mean of normal values: mean ± t s / sqrt(n), n - 1 degrees of freedom; None below two."""
    if len(values) < 2:
        return None
    half = student_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def student_quantile(df: int) -> float:
    """t within whose ± Student's distribution of ``df`` whole degrees of freedom has 95 % of its mass."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _mass_within(middle, df) < CONFIDENCE else (low, middle)
    return math.sqrt(df) * math.tan(low)


def _mass_within(angle: float, df: int) -> float:
    """P(abs(T) < sqrt(df) tan(angle)), the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    is_odd = df % 2
    term = total = 0.0 if df == 1 else math.cos(angle) if is_odd else 1.0
    for k in range(2 + is_odd, df, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    mass = math.sin(angle) * total
    return 2 / math.pi * (angle + mass) if is_odd else mass


def paired_bootstrap(differences: Sequence[float]) -> tuple[Interval, float]:
    """(95 % percentile interval of the mean, share of resamples whose mean is above 0) of differences by seed.

    The resamples are drawn with a fixed seed. The interval cannot leave the range of the differences: of a few it is
    too narrow.
    """
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    means = rng.choice(np.asarray(differences), (NUM_RESAMPLES, len(differences))).mean(axis=1)
    low, high = np.quantile(means, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return (float(low), float(high)), float((means > 0).mean())
