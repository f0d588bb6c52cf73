"""Statistics of scored samples, None of nothing: shares, rank correlation, order of pairs, KL, diversity."""

from collections import Counter
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch

from ocrm_ray.algorithm.policy_loss import kl_terms
from ocrm_ray.algorithm.reward_scores import bradley_terry_loss
from ocrm_ray.algorithm.reward_spread import reward_spread
from ocrm_ray.records import FloatArray

Values = npt.NDArray[np.float64]

NORMAL_975 = 1.959963984540054
"""Quantile of the standard normal: two-sided 95 %."""
NUM_GAP_BINS = 3


def win_rate(ours: Values, theirs: Values) -> float:
    """Share of the prompts [N] on which ``ours`` is above ``theirs``; a tie counts half."""
    assert ours.shape == theirs.shape
    return float((1 + np.sign(ours - theirs)).mean() / 2)


def wilson_interval(share: float, num: int) -> tuple[float, float]:
    """95 % interval of a share of ``num`` draws (Wilson, 1927); a little wide where ties counted half."""
    z2 = NORMAL_975**2
    centre = (share + z2 / (2 * num)) / (1 + z2 / num)
    margin = NORMAL_975 / (1 + z2 / num) * np.sqrt(share * (1 - share) / num + z2 / (4 * num**2))
    return float(max(centre - margin, 0.0)), float(min(centre + margin, 1.0))


def spearman(x: npt.ArrayLike, y: npt.ArrayLike) -> float | None:
    """Pearson's correlation of the ranks, ties at their mean rank; None where either side does not vary."""
    left, right = (_centred_ranks(np.asarray(values, np.float64)) for values in (x, y))
    scale = np.sqrt((left @ left) * (right @ right))
    return float(left @ right / scale) if scale > 0 else None


def kl_estimates(logprobs: FloatArray, reference: FloatArray) -> tuple[float, float]:
    """Of one response sampled with ``logprobs`` [T]: its k1 and k3 terms against ``reference`` [T], summed, in nats."""
    tokens = torch.tensor(logprobs, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)
    return float(kl_terms(*tokens, "k1").sum()), float(kl_terms(*tokens, "k3").sum())


def distinct_share(responses: Seq[Seq[int]], n: int) -> float | None:
    """Distinct n-grams of token ids as a share of all (distinct-n; Li et al., 2016)."""
    grams = Counter(tuple(ids[i : i + n]) for ids in responses for i in range(len(ids) - n + 1))
    return len(grams) / grams.total() if grams else None


def mean_spread(pairs: npt.ArrayLike) -> float | None:
    """MetaRM's J of pairs [N, 2] of scores, in [0.25, 0.5): small where the reward model sees little difference."""
    scores = torch.as_tensor(np.reshape(np.asarray(pairs, np.float64), (-1, 2)))
    return float(reward_spread(scores)) if len(scores) else None


class PairOrder:
    """Pairs [N, 2] scored by gold and by proxy: how well proxy orders them as gold does. Gold ties are left out."""

    def __init__(self, gold: npt.ArrayLike, proxy: npt.ArrayLike) -> None:
        gaps, margins = _differences(gold), _differences(proxy)
        decided = gaps != 0
        self.gaps: Values = np.abs(gaps[decided])
        """Sizes of gold's differences [pairs left]."""
        self.margins: Values = (np.sign(gaps) * margins)[decided]
        """By how much proxy prefers what gold prefers."""

    def accuracy(self) -> float | None:
        """Share that proxy orders as gold does, a proxy tie counting half."""
        return _accuracy(self.margins)

    def loss(self) -> float | None:
        """Bradley-Terry loss of proxy with gold's preferences as labels, mean in nats."""
        margins = torch.as_tensor(self.margins)
        return float(bradley_terry_loss(margins, torch.zeros_like(margins))) if len(margins) else None

    def by_gap(self) -> tuple[list[float | None], list[int]]:
        """Accuracy and number of pairs in each third by the size of gold's difference, the smallest first.

        Equal differences share a bin, so that thirds of discrete gold may be uneven, or empty (None).
        """
        if not len(self.gaps):
            return [None] * NUM_GAP_BINS, [0] * NUM_GAP_BINS
        edges = np.quantile(self.gaps, np.arange(1, NUM_GAP_BINS) / NUM_GAP_BINS, method="inverted_cdf")
        bins = np.searchsorted(edges, self.gaps)
        margins = [self.margins[bins == index] for index in range(NUM_GAP_BINS)]
        return [_accuracy(each) for each in margins], [len(each) for each in margins]


def _accuracy(margins: Values) -> float | None:
    return win_rate(margins, np.zeros_like(margins)) if len(margins) else None


def _differences(pairs: npt.ArrayLike) -> Values:
    return np.diff(np.reshape(np.asarray(pairs, np.float64), (-1, 2)))[:, 0]


def _centred_ranks(values: Values) -> Values:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse] - (len(values) + 1) / 2
