"""The policy, scoring and reward pools and the evaluator over Ray actors; every call is bounded by a deadline.

Nothing here imports torch, vllm or deepspeed: actors are given by path and built in processes of their own.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeAlias, TypeVar

import numpy as np

from actors.ray_pool import RayPool, together
from actors.remote_actor import RemoteActor
from actors.shared_group import Share
from ocrm_ray.checked_files import Entry
from ocrm_ray.config import Deadlines
from ocrm_ray.errors import ActorDiedError, DeadlineError, RunError
from ocrm_ray.pools import Cluster, Evaluator, PolicyPool
from ocrm_ray.records import Calibration, FloatArray, IntArray, PolicyWeights, RefitReport, RefitRequest, Sequence

PAIR_CHUNK = 512
"""Training pairs of one ``pair_logprobs`` message: what one deadline covers."""

Message: TypeAlias = tuple[str, tuple[Any, ...]]
"""A method and its arguments."""

Item = TypeVar("Item")
Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")


def asks(
    method: Callable[Concatenate[Any, Parameters], Coroutine[Any, Any, Answer]],
) -> Callable[Concatenate[RayPool, Parameters], Coroutine[Any, Any, Answer]]:
    """``method`` of a pool whose actors all do it under the same name; the answer is the first one's."""

    async def ask(pool: RayPool, /, *arguments: Parameters.args, **named: Parameters.kwargs) -> Answer:
        assert not named, f"{method.__name__}: arguments go to actors by position"
        deadline_s = pool.deadlines.request_s
        answers = await pool.ask_all(pool.actors, method.__name__, *arguments, deadline_s=deadline_s)
        first: Answer = answers[0]
        return first

    return ask


def in_turn(
    method: Callable[Concatenate[Any, Parameters], Coroutine[Any, Any, Answer]],
) -> Callable[Concatenate["RayPolicyPool", Parameters], Coroutine[Any, Any, Answer]]:
    """As ``asks``, one call after another: else two ranks could take two calls in different orders, and wait for each
    other for ever."""
    ask = asks(method)

    async def ask_in_turn(pool: "RayPolicyPool", /, *arguments: Parameters.args, **named: Parameters.kwargs) -> Answer:
        async with pool.turn if len(pool.actors) > 1 else contextlib.nullcontext():
            return await ask(pool, *arguments, **named)

    return ask_in_turn


def split_evenly(items: Seq[Item], num_parts: int) -> list[list[Item]]:
    """``items`` in order, as at most ``num_parts`` runs whose lengths differ by one at most; none is empty."""
    bounds = [len(items) * part // num_parts for part in range(num_parts + 1)]
    return [list(items[start:stop]) for start, stop in itertools.pairwise(bounds) if stop > start]


async def score_spread(pool: "StagingPool", sequences: Seq[Sequence], by: str | tuple[str, ...]) -> list[Any]:
    """``score(share, by)`` of each of the servers on its share of ``sequences``; idle ones are not asked."""
    actors, deadline_s = pool.servers, pool.deadlines.request_s
    shares = zip(actors, split_evenly(sequences, len(actors)), strict=False)
    calls = (pool.ask(actor, "score", share, by, deadline_s=deadline_s) for actor, share in shares)
    return list(await asyncio.gather(*calls))


class RayPolicyPool(RayPool):
    """``PolicyPool`` over ``PolicyActor``s: data-parallel ranks, which take every call together."""

    name = "policy"
    has_farewell = True
    before_release: Callable[[PolicyWeights], Awaitable[None]] | None = None
    """Told whose place is about to be written again."""

    update = in_turn(PolicyPool.update)
    learn_pairs = in_turn(PolicyPool.learn_pairs)
    export_weights = in_turn(PolicyPool.export_weights)
    logprobs = in_turn(PolicyPool.logprobs)
    stage = in_turn(PolicyPool.stage)
    commit = in_turn(PolicyPool.commit)
    capture = in_turn(PolicyPool.capture)
    saved_snapshot = in_turn(PolicyPool.saved_snapshot)
    _save_together = in_turn(PolicyPool.save)

    def __init__(self, actors: Seq[RemoteActor], share: Share, deadlines: Deadlines) -> None:
        super().__init__(actors, share, deadlines)
        self.turn = asyncio.Lock()

    async def write_checkpoint(self, folder: Path, snapshot: PolicyWeights | None) -> dict[str, Entry]:
        told = "write_checkpoint", folder, snapshot
        answers = await self.ask_all(self.actors, *told, deadline_s=self.deadlines.request_s)
        return {name: entry for written in answers for name, entry in written.items()}

    async def save(self, name: str, weights: PolicyWeights | None = None) -> None:
        if weights is None:
            await self._save_together(name)
        else:  # exported ones are no matter of the ranks, and need not wait for their turn
            await self.ask(self.actors[0], "save", name, weights, deadline_s=self.deadlines.request_s)

    async def release_weights(self, weights: PolicyWeights) -> None:
        if self.before_release is not None:
            await self.before_release(weights)
        await self.ask_all(self.actors, "release_weights", weights, deadline_s=self.deadlines.request_s)

    async def send_weights(self, weights: PolicyWeights) -> None:
        if weights.nccl is not None:
            await self.actors[0].call("send_weights", weights, deadline_s=self.deadlines.publish_s)


class StagingPool(RayPool):
    """A pool whose ``servers``, all actors but the last or its ranks, hold a live network and a staged one."""

    def __init__(self, actors: Seq[RemoteActor], share: Share, deadlines: Deadlines) -> None:
        super().__init__(actors, share, deadlines)
        num_servers = len(self.actors) - self.actors[-1].num_ranks
        self.servers, self.background = self.actors[:num_servers], self.actors[num_servers:]
        self._live: tuple[Message, ...] = ()
        self._staged: tuple[Message, ...] = ()
        self._captured: tuple[Message, ...] = ()

    async def catch_up(self, actor: RemoteActor) -> None:
        told = (*self._captured, *self._live, *self._staged) if actor in self.servers else ()
        for method, arguments in told:
            await actor.call(method, *arguments, deadline_s=self.deadlines.request_s)

    async def discard(self) -> None:
        self._staged = ()

    async def commit(self, promotion_id: str, version: int) -> None:
        if self._staged and self._staged[0][1][0] == promotion_id:
            self._live, self._staged = (*self._staged, ("commit", (promotion_id, version))), ()
        await self._tell("commit", promotion_id, version)

    async def _stage(self, method: str, promotion_id: str, *arguments: Any) -> Any:
        self._staged = ((method, (promotion_id, *arguments)),)
        return (await self._tell(method, promotion_id, *arguments))[0]

    async def _give_up(self, actor: RemoteActor, num_replaced: int, error: RunError) -> NoReturn:
        """Replace who died, or hangs and would keep the next request waiting too; an error, since its work is lost."""
        await self.replace(actor, num_replaced, ActorDiedError(str(error)))
        kind = DeadlineError if isinstance(error, DeadlineError) else RunError
        raise kind(f"{error}; another process has taken its place") from error

    async def _tell(self, method: str, *arguments: Any) -> list[Any]:
        return await self.ask_all(self.servers, method, *arguments, deadline_s=self.deadlines.request_s)


class RayScoringPool(StagingPool):
    """``ScoringPool`` over ``ScoringActor``s: a batch is spread over all but the last, which scores pairs."""

    name = "scoring"

    async def capture(self) -> None:
        self._captured = (*self._live, ("capture", ()))
        await self.ask(self.actors[0], "capture", deadline_s=self.deadlines.request_s)

    async def write_anchor(self, folder: Path, anchor_version: int) -> None:
        await self.ask(self.actors[0], "write_anchor", folder, anchor_version, deadline_s=self.deadlines.request_s)
        self._captured = ()

    async def stage_anchor(self, promotion_id: str, weights: PolicyWeights) -> None:
        await self._stage("stage_anchor", promotion_id, weights)

    async def score(self, sequences: Seq[Sequence], models: Seq[str] = ("live", "sft")) -> list[list[FloatArray]]:
        shares = await score_spread(self, sequences, tuple(models))
        return [[row for share in shares for row in share[number]] for number in range(len(models))]

    async def pair_logprobs(self, weights: PolicyWeights | None, indices: IntArray) -> FloatArray:
        return await self._in_background("pair_logprobs", weights, indices)

    async def pair_alignments(self, weights: PolicyWeights, indices: IntArray) -> FloatArray:
        return await self._in_background("pair_alignments", weights, indices)

    async def _in_background(self, method: str, weights: PolicyWeights | None, indices: IntArray) -> FloatArray:
        """Chunk after chunk on the background actor, so that scoring for the policy is never behind it."""
        (background,), deadline_s = self.background, self.deadlines.request_s
        if weights is not None:
            await self.ask(background, "load_snapshot", weights, deadline_s=deadline_s)
        parts = (indices[start : start + PAIR_CHUNK] for start in range(0, len(indices), PAIR_CHUNK))
        try:
            chunks = [await self.ask(background, method, weights, part, deadline_s=deadline_s) for part in parts]
        except DeadlineError as error:
            await self._give_up(background, background.num_replaced, error)
        return np.concatenate([np.zeros((0, 2), dtype=np.float32), *chunks])


class RayRewardPool(StagingPool):
    """``RewardPool`` over ``RewardServer``s and, the last actors, the ranks of one ``RewardRefitter``.

    Every server calibrates a staged model on the same set: the first one's answer is that of all.
    """

    name = "reward"

    async def refit(self, request: RefitRequest) -> RefitReport:
        """RunError where the refitter dies, DeadlineError where it passes its deadline; another one is then there.

        So it is where one of several ranks fails and others wait for it in what they do together.
        """
        first, deadline_s = self.background[0], self.deadlines.refit_s
        num_replaced = first.num_replaced
        calls = [
            asyncio.ensure_future(refitter.call("refit", request, deadline_s=deadline_s))
            for refitter in self.background
        ]
        try:
            reports: list[RefitReport] = await together(calls)
        except (ActorDiedError, DeadlineError) as error:
            await self._give_up(first, num_replaced, error)
        except Exception as error:
            if not all(call.done() for call in calls):
                with contextlib.suppress(ActorDiedError):  # the cause is what is to be known
                    await self.replace(first, num_replaced, ActorDiedError(str(error)))
            raise
        return reports[0]

    async def stage(self, promotion_id: str, refit: RefitReport) -> Calibration:
        calibration: Calibration = await self._stage("stage", promotion_id, refit)
        return calibration

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
