"""Correction strategies: each declares what it needs and turns it into weights for the pair loss.

The coordinator supplies the needs and does not know which strategy it runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch

from ocrm_ray.algorithm.importance import WeightRule, log_pair_weights
from ocrm_ray.config import Correction, Weights
from ocrm_ray.records import FloatArray


@dataclass(frozen=True)
class Strategy:
    """What one correction does to the reward model.

    ``refits``: a new one is trained; if not, the correction only moves what the switches say. ``log_weights``: [N] from
    the pairs' summed log-probs [N, 2] under the policy's snapshot and under who wrote them; None: all are 1.
    """

    refits: bool
    log_weights: Callable[[FloatArray, FloatArray], torch.Tensor] | None = None

    @property
    def needs_ratios(self) -> bool:
        """Whether the pairs are scored under the policy's snapshot first."""
        return self.log_weights is not None


def make_strategy(correction: Correction) -> Strategy:
    """The strategy that the configuration names."""
    match correction.strategy:
        case "none":  # a null correction, promoted on the same schedule as the others
            return Strategy(refits=False)
        case "refit":  # the same pairs again: the control for what refitting alone does
            return Strategy(refits=True)
        case "ocrm":  # pairs count by how likely the present policy is to write them (arXiv 2507.15507)
            return Strategy(refits=True, log_weights=_importance(correction.weights))


def _importance(settings: Weights) -> Callable[[FloatArray, FloatArray], torch.Tensor]:
    rule = cast(WeightRule, settings.model_dump())
    return lambda policy, behaviour: log_pair_weights(torch.from_numpy(policy), torch.from_numpy(behaviour), **rule)
