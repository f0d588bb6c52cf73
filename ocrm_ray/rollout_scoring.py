"""Scores of rollouts under the live reward model and anchor, and ahead of time under those that come next."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ocrm_ray.pools import RewardPool, ScoringPool
from ocrm_ray.records import Rollout, Scores


@dataclass(frozen=True, slots=True)
class ScoreVersions:
    """The pair that rollouts are scored with, and the slots of the pools that hold it."""

    reward_version: int
    anchor_version: int
    reward_slot: str = "live"
    anchor_slot: str = "live"

    @property
    def pair(self) -> tuple[int, int]:
        return self.reward_version, self.anchor_version

    def scored(self, scores: tuple[Scores, ...]) -> bool:
        """Whether these are scores of this pair."""
        return bool(scores) and all((score.reward_version, score.anchor_version) == self.pair for score in scores)


class RolloutScorer:
    """Scores rollouts, so that a promotion finds the queue scored already and stalls nobody.

    ``score`` for new rollouts; ``stage(versions, queue)`` scores the queue under a candidate too; ``commit`` makes
    the candidate live; ``refresh`` brings a batch to the live pair, from what was staged where that is there.
    """

    def __init__(self, scoring: ScoringPool, reward: RewardPool, reward_version: int, anchor_version: int) -> None:
        self.live = ScoreVersions(reward_version, anchor_version)
        self.num_rescored_late = 0
        self._scoring = scoring
        self._reward = reward
        self._staged: ScoreVersions | None = None
        self._staged_scores: dict[str, list[tuple[Scores, ...]]] = {}
        self._in_flight: set[asyncio.Future[None]] = set()

    async def score(self, rollouts: Mapping[str, Rollout]) -> dict[str, Rollout]:
        """Scored under the live pair, and under a staged candidate where there is one."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._in_flight.add(ended)
        live, staged = self.live, self._staged
        scores, changes = await asyncio.gather(
            self._scores(rollouts, live), self._changes(rollouts, live, staged or live)
        )
        scored = {key: rollout.with_scores(scores[key]) for key, rollout in rollouts.items()}
        if staged is not None:
            self._keep(scored, changes)
        await self._score_staged(scored)
        self._in_flight.remove(ended)
        ended.set_result(None)
        return scored

    async def stage(self, versions: ScoreVersions, queue: Mapping[str, Rollout]) -> None:
        """Score the queue under a candidate, and every rollout scored from now on.

        Returns when nothing is on its way that was scored under the live pair alone.
        """
        assert self._staged is None, "one candidate at a time"
        self._staged = versions
        await self._score_staged(queue)
        if self._in_flight:
            await asyncio.wait(set(self._in_flight))

    def commit(self) -> None:
        """The staged pair is live."""
        assert self._staged is not None
        self.live = ScoreVersions(self._staged.reward_version, self._staged.anchor_version)
        self._staged = None

    async def refresh(self, batch: Mapping[str, Rollout]) -> list[Rollout]:
        """The batch with scores of the live pair; what was neither scored nor staged under it is scored now."""
        fresh = {key: self._current(key, rollout) for key, rollout in batch.items()}
        missing = {key: batch[key] for key, rollout in fresh.items() if rollout is None}
        if missing:
            self.num_rescored_late += len(missing)
            scores = await self._scores(missing, self.live)
            fresh |= {key: rollout.with_scores(scores[key]) for key, rollout in missing.items()}
        for key in batch:
            self._staged_scores.pop(key, None)
        return [rollout for rollout in fresh.values() if rollout is not None]

    def _current(self, key: str, rollout: Rollout) -> Rollout | None:
        assert rollout.scores is not None
        for scores in (rollout.scores, *self._staged_scores.get(key, [])):
            if self.live.scored(scores):
                return rollout.with_scores(scores)
        return None

    async def _score_staged(self, rollouts: Mapping[str, Rollout]) -> None:
        """Score rollouts that have live scores under the staged candidate, if there is one, where that is not done."""
        staged = self._staged
        if staged is None:
            return
        current = {key: self._current(key, rollout) for key, rollout in rollouts.items()}
        missing = {
            key: rollout
            for key, rollout in current.items()
            if rollout is not None and not any(map(staged.scored, self._staged_scores.get(key, [])))
        }
        self._keep(missing, await self._changes(missing, self.live, staged))

    def _keep(self, scored: Mapping[str, Rollout], changes: Mapping[str, list[dict[str, Any]]]) -> None:
        for key, rollout in scored.items():
            pairs = zip(rollout.scores or (), changes[key], strict=True)
            scores = tuple(replace(score, **change) for score, change in pairs)
            self._staged_scores.setdefault(key, []).append(scores)

    async def _changes(
        self, rollouts: Mapping[str, Rollout], live: ScoreVersions, candidate: ScoreVersions
    ) -> dict[str, list[dict[str, Any]]]:
        """For each sample the fields of its live scores that the candidate changes; nothing else is computed."""
        sequences = [sequence for rollout in rollouts.values() for sequence in rollout.sequences]
        changes: list[dict[str, Any]] = [{} for _ in sequences]

        async def rewards() -> None:
            for change, reward in zip(changes, await self._reward.score(sequences, candidate.reward_slot), strict=True):
                change |= {"reward": float(reward), "reward_version": candidate.reward_version}

        async def anchors() -> None:
            (rows,) = await self._scoring.score(sequences, (candidate.anchor_slot,))
            for change, row in zip(changes, rows, strict=True):
                change |= {"anchor_logprobs": row, "anchor_version": candidate.anchor_version}

        is_other = (candidate.reward_version != live.reward_version, candidate.anchor_version != live.anchor_version)
        if sequences:
            await asyncio.gather(*(part() for part, other in zip((rewards, anchors), is_other, strict=True) if other))
        rest = iter(changes)
        return {key: [next(rest) for _ in rollout.samples] for key, rollout in rollouts.items()}

    async def _scores(self, rollouts: Mapping[str, Rollout], versions: ScoreVersions) -> dict[str, tuple[Scores, ...]]:
        sequences = [sequence for rollout in rollouts.values() for sequence in rollout.sequences]
        (anchor, sft), rewards = await asyncio.gather(
            self._scoring.score(sequences, (versions.anchor_slot, "sft")),
            self._reward.score(sequences, versions.reward_slot),
        )
        scores = (
            Scores(float(reward), versions.reward_version, anchor_logprobs, versions.anchor_version, sft_logprobs)
            for reward, anchor_logprobs, sft_logprobs in zip(rewards, anchor, sft, strict=True)
        )
        return {key: tuple(next(scores) for _ in rollout.samples) for key, rollout in rollouts.items()}
