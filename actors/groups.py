"""The policy, scoring and reward pools and the evaluator over Ray actors; every call is bounded by a deadline.

Nothing here imports torch, vllm or deepspeed: actors are given by path and built in processes of their own.
"""

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from collections.abc import Sequence as Seq
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from actors.ray_pool import RayPool
from actors.remote_actor import call_all
from ocrm_ray.pools import Cluster, Evaluator, PolicyPool, RewardPool, ScoringPool
from ocrm_ray.records import FloatArray, IntArray, PolicyWeights, Sequence

PAIR_CHUNK = 512
"""Training pairs of one ``pair_logprobs`` message: what one deadline covers."""
ALL, FIRST, ALL_BUT_LAST, LAST = slice(None), slice(1), slice(-1), slice(-1, None)

Item = TypeVar("Item")
Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")


def asks(
    method: Callable[Concatenate[Any, Parameters], Coroutine[Any, Any, Answer]],
    actors: slice = ALL,
    deadline: str = "request_s",
) -> Callable[Concatenate[RayPool, Parameters], Coroutine[Any, Any, Answer]]:
    """``method`` of a pool whose ``actors`` all do it under the same name; the answer is the first one's."""

    async def ask(pool: RayPool, /, *arguments: Parameters.args, **named: Parameters.kwargs) -> Answer:
        assert not named, f"{method.__name__}: arguments go to actors by position"
        deadline_s = getattr(pool.deadlines, deadline)
        answers = await call_all(pool.actors[actors], method.__name__, *arguments, deadline_s=deadline_s)
        first: Answer = answers[0]
        return first

    return ask


def split_evenly(items: Seq[Item], num_parts: int) -> list[list[Item]]:
    """``items`` in order, as at most ``num_parts`` runs whose lengths differ by one at most; none is empty."""
    bounds = [len(items) * part // num_parts for part in range(num_parts + 1)]
    return [list(items[start:stop]) for start, stop in itertools.pairwise(bounds) if stop > start]


async def score_spread(pool: RayPool, sequences: Seq[Sequence], by: str | tuple[str, ...]) -> list[Any]:
    """``score(share, by)`` of each actor but the last on its share of ``sequences``; idle actors are not asked."""
    actors, deadline_s = pool.actors[ALL_BUT_LAST], pool.deadlines.request_s
    shares = zip(actors, split_evenly(sequences, len(actors)), strict=False)
    calls = (actor.call("score", share, by, deadline_s=deadline_s) for actor, share in shares)
    return list(await asyncio.gather(*calls))


class RayPolicyPool(RayPool):
    """``PolicyPool`` over ``PolicyActor``s: data-parallel ranks, which take every call together."""

    name = "policy"
    farewell = "close"

    update = asks(PolicyPool.update)
    learn_pairs = asks(PolicyPool.learn_pairs)
    export_weights = asks(PolicyPool.export_weights)
    release_weights = asks(PolicyPool.release_weights)
    logprobs = asks(PolicyPool.logprobs)
    stage = asks(PolicyPool.stage)
    commit = asks(PolicyPool.commit)
    capture = asks(PolicyPool.capture)
    write_checkpoint = asks(PolicyPool.write_checkpoint)
    saved_snapshot = asks(PolicyPool.saved_snapshot)
    save = asks(PolicyPool.save)

    async def send_weights(self, weights: PolicyWeights) -> None:
        if weights.nccl is not None:
            await self.actors[0].call("send_weights", weights, deadline_s=self.deadlines.publish_s)


class RayScoringPool(RayPool):
    """``ScoringPool`` over ``ScoringActor``s: a batch is spread over all but the last, which scores pairs."""

    name = "scoring"

    stage_anchor = asks(ScoringPool.stage_anchor, ALL_BUT_LAST)
    commit = asks(ScoringPool.commit, ALL_BUT_LAST)
    capture = asks(ScoringPool.capture, FIRST)
    write_anchor = asks(ScoringPool.write_anchor, FIRST)

    async def score(self, sequences: Seq[Sequence], models: Seq[str] = ("live", "sft")) -> list[list[FloatArray]]:
        shares = await score_spread(self, sequences, tuple(models))
        return [[row for share in shares for row in share[number]] for number in range(len(models))]

    async def pair_logprobs(self, weights: PolicyWeights | None, indices: IntArray) -> FloatArray:
        return await self._in_background("pair_logprobs", weights, indices)

    async def pair_alignments(self, weights: PolicyWeights, indices: IntArray) -> FloatArray:
        return await self._in_background("pair_alignments", weights, indices)

    async def _in_background(self, method: str, weights: PolicyWeights | None, indices: IntArray) -> FloatArray:
        """Chunk after chunk on the background actor, so that scoring for the policy is never behind it."""
        background, deadline_s = self.actors[-1], self.deadlines.request_s
        if weights is not None:
            await background.call("load_snapshot", weights, deadline_s=deadline_s)
        chunks = [
            await background.call(method, weights, chunk, deadline_s=deadline_s)
            for chunk in (indices[start : start + PAIR_CHUNK] for start in range(0, len(indices), PAIR_CHUNK))
        ]
        return np.concatenate([np.zeros((0, 2), dtype=np.float32), *chunks])


class RayRewardPool(RayPool):
    """``RewardPool`` over ``RewardServer``s and, the last actor, one ``RewardRefitter``.

    Every server calibrates a staged model on the same set: the first one's answer is that of all.
    """

    name = "reward"

    refit = asks(RewardPool.refit, LAST, "refit_s")
    stage = asks(RewardPool.stage, ALL_BUT_LAST)
    commit = asks(RewardPool.commit, ALL_BUT_LAST)

    async def score(self, sequences: Seq[Sequence], slot: str = "live") -> FloatArray:
        shares = await score_spread(self, sequences, slot)
        return np.concatenate([np.zeros(0, dtype=np.float32), *shares])


class RayEvaluator(RayPool):
    """``Evaluator`` over one ``EvaluationActor``, which also labels pairs with gold."""

    name = "evaluation"

    evaluate = asks(Evaluator.evaluate)
    gold_of = asks(Evaluator.gold_of)
    clusters = asks(Evaluator.clusters)
    gold = asks(Cluster.gold)
