"""The policy, scoring and reward pools and the evaluator over Ray actors; every call is bounded by a deadline.

Nothing here imports torch, vllm or deepspeed: actors are given by path and built in processes of their own.
"""

import asyncio
import itertools
from collections.abc import Sequence as Seq
from typing import Any, TypeVar

import numpy as np

from actors.ray_pool import RayPool
from actors.remote_actor import RemoteActor, call_all
from ocrm_ray.records import (
    Calibration,
    EvaluationReport,
    FloatArray,
    IntArray,
    PolicyWeights,
    RefitReport,
    RefitRequest,
    Rollout,
    Sample,
    Sequence,
    UpdateReport,
)

PAIR_CHUNK = 512
"""Training pairs of one ``pair_logprobs`` message: what one deadline covers."""

Item = TypeVar("Item")


def split_evenly(items: Seq[Item], num_parts: int) -> list[list[Item]]:
    """``items`` in order, as at most ``num_parts`` runs whose lengths differ by one at most; none is empty."""
    bounds = [len(items) * part // num_parts for part in range(num_parts + 1)]
    return [list(items[start:stop]) for start, stop in itertools.pairwise(bounds) if stop > start]


async def score_spread(
    actors: Seq[RemoteActor], sequences: Seq[Sequence], by: str | tuple[str, ...], *, deadline_s: float
) -> list[Any]:
    """``score(share, by)`` of each actor on its share of ``sequences``; idle actors are not asked."""
    shares = split_evenly(sequences, len(actors))
    calls = (
        actor.call("score", share, by, deadline_s=deadline_s) for actor, share in zip(actors, shares, strict=False)
    )
    return list(await asyncio.gather(*calls))


class RayPolicyPool(RayPool):
    """``PolicyPool`` over ``PolicyActor``s: data-parallel ranks, which take every call together."""

    name = "policy"
    farewell = "close"

    async def update(self, rollouts: Seq[Rollout]) -> UpdateReport:
        report: UpdateReport = await self._on_every_rank("update", list(rollouts))
        return report

    async def export_weights(self) -> PolicyWeights:
        weights: PolicyWeights = await self._on_every_rank("export_weights")
        return weights

    async def send_weights(self, weights: PolicyWeights) -> None:
        if weights.nccl is not None:
            await self.actors[0].call("send_weights", weights, deadline_s=self.deadlines.publish_s)

    async def release_weights(self, weights: PolicyWeights) -> None:
        await self._on_every_rank("release_weights", weights)

    async def logprobs(self, sequences: Seq[Sequence]) -> list[FloatArray]:
        rows: list[FloatArray] = await self._on_every_rank("logprobs", list(sequences))
        return rows

    async def stage(self, promotion_id: str, refit: RefitReport | None) -> None:
        await self._on_every_rank("stage", promotion_id, refit)

    async def commit(self, promotion_id: str, reward_version: int, anchor_version: int) -> None:
        await self._on_every_rank("commit", promotion_id, reward_version, anchor_version)

    async def save(self, name: str, weights: PolicyWeights | None = None) -> None:
        await self._on_every_rank("save", name, weights)

    async def _on_every_rank(self, method: str, *arguments: object) -> Any:
        """The first rank's answer, once all have answered."""
        return (await call_all(self.actors, method, *arguments, deadline_s=self.deadlines.request_s))[0]


class RayScoringPool(RayPool):
    """``ScoringPool`` over ``ScoringActor``s: a batch is spread over all but the last, which scores pairs."""

    name = "scoring"
    farewell = "close"

    @property
    def _scorers(self) -> Seq[RemoteActor]:
        return self.actors[:-1]

    @property
    def _background(self) -> RemoteActor:
        return self.actors[-1]

    async def score(self, sequences: Seq[Sequence], models: Seq[str] = ("live", "sft")) -> list[list[FloatArray]]:
        shares = await score_spread(self._scorers, sequences, tuple(models), deadline_s=self.deadlines.request_s)
        return [[row for share in shares for row in share[number]] for number in range(len(models))]

    async def pair_logprobs(self, weights: PolicyWeights | None, indices: IntArray) -> FloatArray:
        """Chunk after chunk on the background actor, so that scoring for the policy is never behind it."""
        deadline_s = self.deadlines.request_s
        if weights is not None:
            await self._background.call("load_snapshot", weights, deadline_s=deadline_s)
        chunks = [
            await self._background.call("pair_logprobs", weights, chunk, deadline_s=deadline_s)
            for chunk in (indices[start : start + PAIR_CHUNK] for start in range(0, len(indices), PAIR_CHUNK))
        ]
        return np.concatenate([np.zeros((0, 2), dtype=np.float32), *chunks])

    async def stage_anchor(self, promotion_id: str, weights: PolicyWeights) -> None:
        await call_all(self._scorers, "stage_anchor", promotion_id, weights, deadline_s=self.deadlines.request_s)

    async def commit(self, promotion_id: str, anchor_version: int) -> None:
        await call_all(self._scorers, "commit", promotion_id, anchor_version, deadline_s=self.deadlines.request_s)


class RayRewardPool(RayPool):
    """``RewardPool`` over ``RewardServer``s and, the last actor, one ``RewardRefitter``."""

    name = "reward"

    @property
    def _servers(self) -> Seq[RemoteActor]:
        return self.actors[:-1]

    async def score(self, sequences: Seq[Sequence], slot: str = "live") -> FloatArray:
        shares = await score_spread(self._servers, sequences, slot, deadline_s=self.deadlines.request_s)
        return np.concatenate([np.zeros(0, dtype=np.float32), *shares])

    async def refit(self, request: RefitRequest) -> RefitReport:
        report: RefitReport = await self.actors[-1].call("refit", request, deadline_s=self.deadlines.refit_s)
        return report

    async def stage(self, promotion_id: str, refit: RefitReport) -> Calibration:
        """Every server calibrates the same model on the same set: the first one's answer is that of all."""
        calibrations: list[Calibration] = await call_all(
            self._servers, "stage", promotion_id, refit, deadline_s=self.deadlines.request_s
        )
        return calibrations[0]

    async def commit(self, promotion_id: str, reward_version: int) -> None:
        await call_all(self._servers, "commit", promotion_id, reward_version, deadline_s=self.deadlines.request_s)


class RayEvaluator(RayPool):
    """``Evaluator`` over one ``EvaluationActor``, which also labels pairs with gold."""

    name = "evaluation"

    async def evaluate(
        self, step: int, samples: Seq[tuple[Sample, ...]], proxy: Seq[FloatArray], sft_logprobs: Seq[Seq[FloatArray]]
    ) -> tuple[EvaluationReport, list[dict[str, object]]]:
        answer: tuple[EvaluationReport, list[dict[str, object]]] = await self.actors[0].call(
            "evaluate", step, list(samples), list(proxy), list(sft_logprobs), deadline_s=self.deadlines.request_s
        )
        return answer

    async def gold(self, prompts: Seq[str], responses: Seq[str], references: Seq[str | None]) -> list[float]:
        """Gold scores [N] of responses, to label pairs with."""
        scores: list[float] = await self.actors[0].call(
            "gold", list(prompts), list(responses), list(references), deadline_s=self.deadlines.request_s
        )
        return scores
