"""Scores of rollouts under the live reward model and anchor, and ahead of time under those that come next."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ocrm_ray.pools import RewardPool, ScoringPool
from ocrm_ray.records import Rollout, Scores

Part: TypeAlias = tuple[str, int]
"""Of a rollout's scores: its rewards or its anchor log-probs of one version, or its SFT log-probs."""
REWARD, ANCHOR, SFT = "reward", "anchor", "sft"


@dataclass(frozen=True, slots=True)
class ScoreVersions:
    """The pair that rollouts are scored with, and the slots of the pools that hold it."""

    reward_version: int
    anchor_version: int
    reward_slot: str = "live"
    anchor_slot: str = "live"

    @property
    def slots(self) -> dict[Part, str]:
        """The parts of scores under this pair, and who computes them."""
        reward, anchor = (REWARD, self.reward_version), (ANCHOR, self.anchor_version)
        return {reward: self.reward_slot, anchor: self.anchor_slot, (SFT, 0): SFT}


@dataclass(eq=False)
class RolloutScorer:
    """Scores rollouts, so that a promotion finds the queue scored already and stalls nobody.

    ``score`` for new rollouts; ``stage(versions, queue)`` scores the queue under a candidate too; ``commit`` makes
    the candidate live; ``refresh`` brings a batch to the live pair. Each part of a rollout's scores is computed once
    and kept until the rollout is trained on, so that a candidate costs only what it changes.
    """

    scoring: ScoringPool
    reward: RewardPool
    live: ScoreVersions
    num_rescored_late: int = 0

    def __post_init__(self) -> None:
        self._staged: ScoreVersions | None = None
        self._known: dict[str, dict[Part, list[Any]]] = {}
        self._in_flight: set[asyncio.Future[None]] = set()
        self._discarded: set[str] = set()

    async def score(self, rollouts: Mapping[str, Rollout]) -> dict[str, Rollout]:
        """Scored under the live pair, and under a staged candidate where there is one."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._in_flight.add(ended)
        self._known |= {key: {} for key in rollouts}
        live = self.live
        await self._compute(rollouts, self._staged.slots | live.slots if self._staged else live.slots)
        if self._staged:  # as it may be only by now
            await self._compute(rollouts, self._staged.slots)
        self._in_flight.remove(ended)
        ended.set_result(None)
        return {key: self._scored(key, rollout, live) for key, rollout in rollouts.items()}

    async def stage(self, versions: ScoreVersions, queue: Mapping[str, Rollout]) -> None:
        """Score the queue under a candidate, and every rollout scored from now on.

        Returns when nothing is on its way that was scored under the live pair alone.
        """
        assert self._staged is None, "one candidate at a time"
        self._staged = versions
        await self._compute(queue, versions.slots)
        if self._in_flight:
            await asyncio.wait(set(self._in_flight))

    def commit(self) -> None:
        """The staged pair is live."""
        assert self._staged is not None
        self.live = ScoreVersions(self._staged.reward_version, self._staged.anchor_version)
        self._staged = None

    async def discard(self) -> None:
        """The staged candidate, if there is one, never goes live: its scores, those on their way too, are dropped.

        Returns when nothing on its way asks for them. A later candidate needs other slots.
        """
        if self._staged is None:
            return
        dropped = {part: slot for part, slot in self._staged.slots.items() if part not in self.live.slots}
        self._discarded.update(dropped.values())
        for parts in self._known.values():
            for part in dropped.keys() & parts.keys():
                del parts[part]
        self._staged = None
        if self._in_flight:
            await asyncio.wait(set(self._in_flight))

    async def refresh(self, batch: Mapping[str, Rollout]) -> list[Rollout]:
        """The batch, which is trained on now, with scores of the live pair; what is not known yet is computed."""
        slots = self.live.slots
        late = {key: rollout for key, rollout in batch.items() if not slots.keys() <= self._known[key].keys()}
        self.num_rescored_late += len(late)
        await self._compute(late, slots)
        fresh = [self._scored(key, rollout, self.live) for key, rollout in batch.items()]
        for key in batch:
            del self._known[key]
        return fresh

    def _scored(self, key: str, rollout: Rollout, versions: ScoreVersions) -> Rollout:
        parts = zip(*(self._known[key][part] for part in versions.slots), strict=True)
        reward_version, anchor_version = versions.reward_version, versions.anchor_version
        return rollout.with_scores(
            tuple(Scores(float(reward), reward_version, anchor, anchor_version, sft) for reward, anchor, sft in parts)
        )

    async def _compute(self, rollouts: Mapping[str, Rollout], slots: Mapping[Part, str]) -> None:
        """The parts that are not known of each rollout; log-probs that the same ones need in one message."""
        messages: dict[tuple[Part | None, tuple[str, ...]], list[Part]] = {}
        for part in slots:
            if keys := tuple(key for key in rollouts if part not in self._known[key]):
                messages.setdefault((part if part[0] == REWARD else None, keys), []).append(part)
        asked = [({key: rollouts[key] for key in keys}, parts) for (_, keys), parts in messages.items()]
        await asyncio.gather(*(self._ask(group, {part: slots[part] for part in parts}) for group, parts in asked))

    async def _ask(self, rollouts: Mapping[str, Rollout], slots: Mapping[Part, str]) -> None:
        """One message: a reward, or log-probs under several models."""
        sequences = [sequence for rollout in rollouts.values() for sequence in rollout.sequences]
        answers: list[Any]
        if next(iter(slots))[0] == REWARD:
            answers = [await self.reward.score(sequences, *slots.values())]
        else:
            answers = await self.scoring.score(sequences, tuple(slots.values()))
        for part, answer in zip(slots, answers, strict=True):
            if slots[part] in self._discarded:
                continue
            values = iter(answer)
            for key, rollout in rollouts.items():
                found = [next(values) for _ in rollout.samples]
                if key in self._known:  # else it has been trained on meanwhile
                    self._known[key][part] = found
