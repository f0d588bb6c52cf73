"""Correction strategies: each declares what it needs and turns it into weights for the pair loss.

The coordinator supplies the needs and does not know which strategy it runs.
"""

from dataclasses import dataclass
from typing import Protocol, cast

import torch

from ocrm_ray.algorithm.importance import PairWeights, WeightRule, pair_weights
from ocrm_ray.config import Correction, Weights
from ocrm_ray.records import FloatArray


class Strategy(Protocol):
    """What one correction does to the reward model."""

    @property
    def refits(self) -> bool:
        """Whether a new reward model is trained; if not, the correction only moves what the switches say."""
        ...

    @property
    def needs_ratios(self) -> bool:
        """Whether the pairs are scored under the policy's snapshot first."""
        ...

    def weights(self, policy: FloatArray, behaviour: FloatArray) -> PairWeights:
        """Weights [N] from the pairs' summed log-probs [N, 2] under the snapshot and under who wrote them."""
        ...


@dataclass(frozen=True)
class Frozen:
    """``none``: the reward model stays; a null correction, promoted on the same schedule as the others."""

    refits: bool = False
    needs_ratios: bool = False

    def weights(self, policy: FloatArray, behaviour: FloatArray) -> PairWeights:
        raise AssertionError("a strategy without ratios has no weights")


@dataclass(frozen=True)
class UnweightedRefit(Frozen):
    """``refit``: the same pairs again, every weight 1: the control for what refitting alone does."""

    refits: bool = True


@dataclass(frozen=True)
class ImportanceWeighted:
    """``ocrm``: pairs weighted by how likely the present policy is to write them (arXiv 2507.15507)."""

    settings: Weights
    refits: bool = True
    needs_ratios: bool = True

    def weights(self, policy: FloatArray, behaviour: FloatArray) -> PairWeights:
        rule = cast(WeightRule, self.settings.model_dump())
        return pair_weights(torch.from_numpy(policy), torch.from_numpy(behaviour), **rule)


def make_strategy(correction: Correction) -> Strategy:
    """The strategy that the configuration names."""
    match correction.strategy:
        case "none":
            return Frozen()
        case "refit":
            return UnweightedRefit()
        case "ocrm":
            return ImportanceWeighted(correction.weights)
