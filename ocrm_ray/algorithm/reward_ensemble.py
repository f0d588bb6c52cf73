"""One reward from several reward models: what they do not agree on counts less (arXiv 2310.02743)."""

from typing import Literal

from torch import Tensor


def aggregate(
    scores: Tensor, rule: Literal["mean", "worst", "mean_minus_variance"], coefficient: float = 0.0
) -> Tensor:
    """[N] from K members' ``scores`` [K, N] on one scale.

    ``worst``: the smallest. ``mean_minus_variance``: less ``coefficient`` times the unbiased variance between members;
    ValueError if there is but one.
    """
    match rule:
        case "mean":
            return scores.mean(dim=0)
        case "worst":
            return scores.amin(dim=0)
        case "mean_minus_variance":
            if len(scores) < 2:
                raise ValueError("a variance between members needs at least two of them")
            return scores.mean(dim=0) - coefficient * scores.var(dim=0, correction=1)
