"""Correction strategies: each declares what it needs and how a refit uses it.

The coordinator supplies the needs, off the critical path, and does not know which strategy it runs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from ocrm_ray.algorithm.importance import WeightRule, log_pair_weights, shuffled
from ocrm_ray.algorithm.wpo import pair_log_weights
from ocrm_ray.config import Correction, Weights
from ocrm_ray.records import FloatArray

PairMeasure: TypeAlias = Literal["logprobs", "alignments"]
LogWeights: TypeAlias = Callable[[FloatArray, FloatArray | None, int], Tensor]


@dataclass(frozen=True)
class Strategy:
    """What one correction does to the reward model.

    ``refits``: a new one is trained; if not, the correction only moves what the switches say.
    ``measure``: of each response [N, 2] of the pairs under the policy's snapshot, for ``log_weights``.
    ``log_weights``: [N] from that, from the pairs' log-probs under who wrote them (where ``needs_ratios``) and a seed.
    ``rollouts``: what the latest rollouts give a refit: ``groups`` of responses without labels, ``synthetic`` pairs,
    or pairs with ``gold`` labels.
    """

    refits: bool = True
    measure: PairMeasure | None = None
    log_weights: LogWeights | None = None
    rollouts: Literal["groups", "synthetic", "gold"] | None = None

    @property
    def needs_ratios(self) -> bool:
        """Whether the pairs' log-probs under who wrote them are needed, once, before the loop."""
        return self.measure == "logprobs"


def make_strategy(correction: Correction) -> Strategy:
    """The strategy that the configuration names."""
    match correction.strategy:
        case "none":  # a null correction, promoted on the same schedule as the others
            return Strategy(refits=False)
        case "refit":  # the same pairs again: the control for what refitting alone does
            return Strategy()
        case "ocrm":  # pairs count by how likely the present policy is to write them (arXiv 2507.15507)
            return Strategy(measure="logprobs", log_weights=_importance(correction.weights))
        case "shuffled":  # the same weights on other pairs: the control for what uneven weights alone do
            importance = _importance(correction.weights)
            return Strategy(
                measure="logprobs",
                log_weights=lambda policy, behaviour, seed: shuffled(importance(policy, behaviour, seed), seed),
            )
        case "wpo_bt":  # pairs count by how typical of the present policy they are (arXiv 2406.11827)
            return Strategy(measure="alignments", log_weights=_typicality(correction.weights))
        case "metarm" | "rlp_uml":
            return Strategy(rollouts="groups")
        case "rlp_spg":
            return Strategy(rollouts="synthetic")
        case "relabel":
            return Strategy(rollouts="gold")


def _importance(settings: Weights) -> LogWeights:
    rule = cast(WeightRule, settings.model_dump())

    def log_weights(policy: FloatArray, behaviour: FloatArray | None, seed: int) -> Tensor:
        assert behaviour is not None, "ratios need log-probs under who wrote the pairs"
        return log_pair_weights(torch.from_numpy(policy), torch.from_numpy(behaviour), **rule)

    return log_weights


def _typicality(settings: Weights) -> LogWeights:
    def log_weights(alignments: FloatArray, _: FloatArray | None, seed: int) -> Tensor:
        found = pair_log_weights(torch.from_numpy(alignments).double(), cap=True)
        return found - (found.logsumexp(dim=0) - math.log(len(found))) if settings.normalise else found

    return log_weights
