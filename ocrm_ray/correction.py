"""One correction: score the pairs under a snapshot, weight them, refit the reward model, prepare it, make it live."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ocrm_ray.algorithm.importance import weight_statistics
from ocrm_ray.config import RunConfig
from ocrm_ray.errors import ActorDiedError, UserError
from ocrm_ray.guards import RejectedError, RunGuards
from ocrm_ray.on_policy import OnPolicyResponses
from ocrm_ray.pools import Pools
from ocrm_ray.records import FloatArray, IntArray, Material, PolicyWeights, RefitReport, RefitRequest
from ocrm_ray.rollout_buffer import RolloutBuffer
from ocrm_ray.rollout_scoring import RolloutScorer, ScoreVersions
from ocrm_ray.sample_statistics import spearman
from ocrm_ray.strategies import make_strategy

NUM_ATTEMPTS = 2
LASTING = (UserError, ActorDiedError, AssertionError, AttributeError, LookupError, NameError, TypeError)
"""Mistakes of the user's or in the code, which would be made again, and the death of a process, which stays dead."""


@dataclass(frozen=True, slots=True)
class PairData:
    """The N training pairs. ``behaviour_logprobs`` [N, 2]: summed log-probs under who wrote them; None where the
    strategy needs no ratios. ``response_tokens`` [N]: of both responses together. ``first_accuracy``: the first reward
    model's on held-out pairs; None: not known."""

    num_training: int
    behaviour_logprobs: FloatArray | None
    response_tokens: IntArray
    first_accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A prepared correction: everything is loaded and scored, only the switch is missing."""

    promotion_id: str
    snapshot_version: int
    num_finished_before: int
    versions: ScoreVersions
    refit_s: float
    ess_fraction: float | None


@dataclass(eq=False)
class Corrector:
    """Runs corrections, one at a time: ``prepare`` beside rollouts and training, ``commit`` between two steps.

    ``emit(event, **fields)`` receives what becomes of each.
    """

    config: RunConfig
    pools: Pools
    scorer: RolloutScorer
    buffer: RolloutBuffer
    pairs: PairData
    emit: Callable[..., None]

    def __post_init__(self) -> None:
        self.settings = self.config.correction
        self.strategy = make_strategy(self.settings)
        self.on_policy = OnPolicyResponses(self.config, self.pools.evaluator, self.strategy, self.emit)
        self.guards = RunGuards(self.config.guards, self.emit)
        self._is_near = asyncio.Event()

    def near(self) -> None:
        """The next boundary of updates may promote: the candidate may score the queue."""
        self._is_near.set()

    async def prepare(self, snapshot: PolicyWeights) -> Candidate | None:
        """Refit for the policy ``snapshot`` and stage the result in every pool; nothing live changes.

        What fails is tried once more; None where that fails too and the old reward model is kept.
        """
        for attempt in range(1, NUM_ATTEMPTS + 1):
            told = {"snapshot_version": snapshot.version, "attempt": attempt}
            self.emit("correction_started", **told, strategy=self.settings.strategy)
            try:
                material = await self.on_policy.material(snapshot.version)
                return await self._prepare(snapshot, material, f"snapshot-{snapshot.version}-{attempt}")
            except Exception as error:
                action = self.settings.on_failure if attempt == NUM_ATTEMPTS else "retry"
                action = "stop" if isinstance(error, LASTING) else action
                action = "keep_old" if isinstance(error, RejectedError) else action
                self.emit("correction_failed", **told, error=f"{type(error).__name__}: {error}", action=action)
                if action == "stop":
                    raise
            await self.scorer.discard()
            await asyncio.gather(self.pools.scoring.discard(), self.pools.reward.discard())
            if action == "keep_old":
                break
        return None

    async def _prepare(self, snapshot: PolicyWeights, material: Material, promotion_id: str) -> Candidate:
        started, num_finished = time.monotonic(), self.buffer.num_finished
        indices = self._draw_pairs(snapshot.version)
        weights, ess_fraction = await self._weights(snapshot, indices)
        request = RefitRequest(self.scorer.live.reward_version + 1, indices, weights, self.config.seed, *material)
        refit = await self._refit(request, snapshot.version) if self.strategy.refits else None
        versions = await self._stage(promotion_id, snapshot, refit)
        seconds = time.monotonic() - started
        return Candidate(promotion_id, snapshot.version, num_finished, versions, seconds, ess_fraction)

    async def commit(self, candidate: Candidate | None, step: int, lag_steps: int) -> None:
        """Switch reward model, calibration, anchor and critic together, or nothing (None). Call between two updates."""
        self._is_near.clear()
        if candidate is None:
            return
        promotion_id, versions = candidate.promotion_id, candidate.versions
        await asyncio.gather(
            self.pools.reward.commit(promotion_id, versions.reward_version),
            self.pools.scoring.commit(promotion_id, versions.anchor_version),
            self.pools.policy.commit(promotion_id, versions.reward_version, versions.anchor_version),
        )
        self.scorer.commit()
        self.emit(
            "promoted",
            promotion_id=promotion_id,
            reward_version=versions.reward_version,
            anchor_version=versions.anchor_version,
            snapshot_version=candidate.snapshot_version,
            policy_version=step,
            ess_fraction=candidate.ess_fraction,
            refit_s=candidate.refit_s,
            lag_steps=lag_steps,
            num_rollouts_finished=self.buffer.num_finished - candidate.num_finished_before,
        )

    def _draw_pairs(self, snapshot_version: int) -> IntArray:
        """Which training pairs this refit uses, drawn anew for each."""
        num_all = self.pairs.num_training
        num_used = min(self.settings.num_pairs or num_all, num_all)
        generator = np.random.default_rng([self.config.seed, snapshot_version])
        return np.sort(generator.permutation(num_all)[:num_used]).astype(np.int64)

    async def _weights(self, snapshot: PolicyWeights, indices: IntArray) -> tuple[FloatArray | None, float | None]:
        if self.strategy.log_weights is None:
            return None, None
        behaviour = self.pairs.behaviour_logprobs
        match self.strategy.measure:
            case "alignments":
                measured = await self.pools.scoring.pair_alignments(snapshot, indices)
            case _:
                measured = await self.pools.scoring.pair_logprobs(snapshot, indices)
        old = None if behaviour is None else behaviour[indices]
        log_weights = self.strategy.log_weights(measured, old, self.config.seed + snapshot.version)
        statistics = weight_statistics(log_weights)
        correlation = spearman(log_weights.numpy(), self.pairs.response_tokens[indices])
        told = {"snapshot_version": snapshot.version, "num_pairs": len(indices), "length_correlation": correlation}
        self.emit("ratios_scored", **told, **statistics)
        self.guards.check_weights(snapshot.version, statistics["ess_fraction"])
        return log_weights.exp().float().numpy(), statistics["ess_fraction"]

    async def _refit(self, request: RefitRequest, snapshot_version: int) -> RefitReport:
        refit = await self.pools.reward.refit(request)
        self.emit(
            "refit_finished",
            snapshot_version=snapshot_version,
            reward_version=refit.reward_version,
            loss=refit.loss,
            heldout_accuracy=refit.heldout_accuracy,
            refit_s=refit.seconds,
            **refit.figures,
        )
        self.guards.check_refit(snapshot_version, refit, self.pairs.first_accuracy)
        return refit

    async def _stage(self, promotion_id: str, snapshot: PolicyWeights, refit: RefitReport | None) -> ScoreVersions:
        live, moves = self.scorer.live, self.settings.kl_reference == "moving"
        versions = ScoreVersions(
            reward_version=refit.reward_version if refit else live.reward_version,
            anchor_version=snapshot.version if moves else live.anchor_version,
            reward_slot=promotion_id if refit else live.reward_slot,
            anchor_slot=promotion_id if moves else live.anchor_slot,
        )
        await self.pools.policy.stage(promotion_id, refit)
        if moves:
            await self.pools.scoring.stage_anchor(promotion_id, snapshot)
        if refit is not None:
            calibration = await self.pools.reward.stage(promotion_id, refit)
            self.emit("calibrated", reward_version=refit.reward_version, mean=calibration.mean, std=calibration.std)
        await self._is_near.wait()  # sooner, every rollout would be scored twice for nothing
        await self.scorer.stage(versions, self.buffer.ready())
        return versions
