"""The generation pool over Ray: vLLM engines behind one queue, requests of one moment sent together.

A request is bound to an engine only when one has room: a long response then holds up nobody behind it, and what is
urgent overtakes what waits. Those of an engine that dies wait again, for the others and for the one in its place.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

from actors.ray_pool import RayPool
from actors.remote_actor import RemoteActor
from actors.shared_group import Share
from ocrm_ray.config import Deadlines
from ocrm_ray.errors import ActorDiedError, DeadlineError
from ocrm_ray.records import FloatArray, GenerationRequest, PolicyWeights, PublishReport, Sample, Sequence


@dataclass(eq=False, slots=True)
class _Engine:
    """An engine, how much it has been asked for and not answered yet, and the task that fetches its answers.

    ``lost_s``: when its process was found dead, until the one in its place has answered a request.
    """

    actor: RemoteActor
    num_open_samples: int = 0
    collecting: asyncio.Task[None] | None = None
    replacing: asyncio.Task[None] | None = None
    is_up: bool = True
    lost_s: float | None = None


@dataclass(eq=False, slots=True)
class _OpenRequest:
    """A request without an answer, where its ``generate`` waits, and the engine that has it, if one has."""

    request: GenerationRequest
    answer: asyncio.Future[tuple[Sample, ...]]
    engine: _Engine | None = None


class RayGenerationPool(RayPool):
    """``GenerationPool`` over actors with the methods of ``GenerationActor``; lives on one event loop."""

    name = "generation"
    has_farewell = True

    def __init__(self, actors: Seq[RemoteActor], share: Share, deadlines: Deadlines) -> None:
        super().__init__(actors, share, deadlines)
        self._engines = [_Engine(actor) for actor in self.actors]
        self.max_open_samples = sys.maxsize
        """Samples that an engine is asked for at once, unless one request alone has more."""
        self._open: dict[str, _OpenRequest] = {}
        self._is_dispatching = False
        self._submitting: set[asyncio.Task[None]] = set()
        self._live: PolicyWeights | None = None
        """What the engines have, unless it is the SFT model, or its place is being written again."""
        self._has_loaded = self._takes_nccl = False
        self._weights = asyncio.Condition()

    async def generate(self, request: GenerationRequest) -> tuple[Sample, ...]:
        """As the protocol says; requests of one turn of the event loop reach an engine as one message."""
        assert request.request_id not in self._open, f"request {request.request_id} is open already"
        opened = self._open[request.request_id] = _OpenRequest(request, asyncio.get_running_loop().create_future())
        self._dispatch_soon()
        deadline_s = self.deadlines.request_s
        try:
            async with asyncio.timeout(deadline_s) as deadline:
                return await opened.answer
        except TimeoutError as error:
            if not deadline.expired():
                raise
            self._take(request.request_id)
            role = f"actor {opened.engine.actor.role}" if opened.engine else "the queue of pool generation"
            raise DeadlineError(
                f"{role} did not answer generate of {request.request_id} within {deadline_s:g} s"
            ) from error

    async def abort(self, request_id: str) -> None:
        """Drop a request wherever it is; an unknown or finished one is no error."""
        opened = self._take(request_id)
        if opened is None:
            return
        opened.answer.cancel()
        if opened.engine is None:
            return
        if self._submitting:  # never overtake the request itself
            await asyncio.wait(set(self._submitting))
        with contextlib.suppress(ActorDiedError):  # who collects its answers sees that too
            await opened.engine.actor.call("abort", [request_id], deadline_s=self.deadlines.request_s)

    async def load_weights(self, weights: PolicyWeights) -> PublishReport:
        """Every engine at once; the seconds of each part are those of the engine that took longest over it."""
        started = time.monotonic()
        async with self._weights:  # an engine that comes up later takes these
            self._live, self._has_loaded, self._takes_nccl = weights, True, weights.nccl is not None
            self._weights.notify_all()
        reports: list[PublishReport] = await self._of_all_up(
            lambda actor: actor.call("load_weights", weights, deadline_s=self.deadlines.publish_s)
        )
        parts = ("pause_s", "transfer_s", "repack_s")
        longest = {part: max(getattr(report, part) for report in reports) for part in parts}
        return replace(reports[0], seconds=time.monotonic() - started, **longest)

    async def forget(self, weights: PolicyWeights) -> None:
        """The weights' place is about to be written again: no engine that comes up reads it from now on."""
        async with self._weights:
            if self._live == weights:
                self._live = None

    async def score(self, sequences: Seq[Sequence]) -> list[FloatArray]:
        """By every engine, one engine's answers after another's: any of them may have missed a publish."""
        given, deadline_s = list(sequences), self.deadlines.request_s
        answers = await self._of_all_up(lambda actor: actor.call("score", given, deadline_s=deadline_s))
        return [logprobs for answer in answers for logprobs in answer]

    async def sleep(self) -> None:
        await self._of_all_up(lambda actor: actor.call("sleep", deadline_s=self.deadlines.request_s))

    async def wake(self) -> None:
        await self._of_all_up(lambda actor: actor.call("wake", deadline_s=self.deadlines.request_s))

    async def catch_up(self, actor: RemoteActor) -> None:
        """Load what is live. If that is being replaced just now, what comes next."""
        (engine,) = (engine for engine in self._engines if engine.actor is actor)
        async with self._weights:
            await self._weights.wait_for(lambda: self._live is not None or not self._has_loaded)
            if self._live is not None:
                await actor.call("load_weights", self._live, deadline_s=self.deadlines.publish_s)
            engine.is_up = True

    async def close(self, may_rest: bool = False) -> None:
        """Cancel what is open; end the actors and their engines, so that no process is left, or let them rest."""
        of_engines = [task for engine in self._engines for task in (engine.collecting, engine.replacing) if task]
        tasks = [*self._submitting, *of_engines]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for opened in self._open.values():
            opened.answer.cancel()
        await super().close(may_rest)

    def _dispatch_soon(self) -> None:
        """At the end of this turn of the event loop, so that one message takes all that come in it."""
        if not self._is_dispatching:
            self._is_dispatching = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Give waiting requests, the most urgent first, to the engine with the fewest open samples, if it has room."""
        self._is_dispatching = False
        batches: dict[_Engine, list[GenerationRequest]] = {}
        waiting = (opened for opened in self._open.values() if opened.engine is None)
        engines = [engine for engine in self._engines if engine.is_up]
        for opened in sorted(waiting, key=lambda opened: opened.request.priority):
            if not engines:
                break
            engine = min(engines, key=lambda engine: engine.num_open_samples)
            num_samples = opened.request.num_samples
            if engine.num_open_samples and engine.num_open_samples + num_samples > self.max_open_samples:
                break
            opened.engine = engine
            engine.num_open_samples += num_samples
            batches.setdefault(engine, []).append(opened.request)
        for engine, requests in batches.items():
            task = asyncio.create_task(self._submit(engine, requests))
            self._submitting.add(task)
            task.add_done_callback(self._submitting.discard)

    async def _submit(self, engine: _Engine, requests: list[GenerationRequest]) -> None:
        num_replaced = engine.actor.num_replaced
        try:
            await engine.actor.call("submit", requests, deadline_s=self.deadlines.request_s)
        except ActorDiedError as death:
            self._lose(engine, num_replaced, death)
            return
        except Exception as error:
            for request in requests:
                self._settle(request.request_id, error)
            return
        if engine.collecting is None or engine.collecting.done():
            engine.collecting = asyncio.create_task(self._collect(engine))

    async def _collect(self, engine: _Engine) -> None:
        """Fetch answers while any is open. No deadline here: each ``generate`` keeps its own."""
        num_replaced = engine.actor.num_replaced
        while engine.num_open_samples > 0:
            try:
                answers = await engine.actor.call("collect", deadline_s=None)
            except Exception as error:
                answers = [(key, error) for key, opened in self._open.items() if opened.engine is engine]
            for request_id, answer in answers:
                if isinstance(answer, ActorDiedError):
                    self._lose(engine, num_replaced, answer)
                    return
                self._settle(request_id, answer)
            if engine.lost_s is not None:
                seconds, engine.lost_s = time.monotonic() - engine.lost_s, None
                self.emit("engine_answers", actor=engine.actor.role, seconds=seconds)

    def _lose(self, engine: _Engine, num_replaced: int, death: ActorDiedError) -> None:
        """An engine is dead: its requests wait again. ``num_replaced``: as it was when the engine was asked."""
        if not engine.is_up or engine.actor.num_replaced > num_replaced:
            return
        engine.is_up, engine.num_open_samples = False, 0
        engine.lost_s = time.monotonic()
        for opened in self._open.values():
            if opened.engine is engine:
                opened.engine = None
        engine.replacing = asyncio.create_task(self._replace(engine, num_replaced, death))
        self._dispatch_soon()

    async def _replace(self, engine: _Engine, num_replaced: int, death: ActorDiedError) -> None:
        """Where the engine cannot be replaced, every open request fails with its death."""
        try:
            if self._takes_nccl:
                raise death  # the group of trainer and engines is made once
            await self.replace(engine.actor, num_replaced, death)
        except ActorDiedError as error:
            for request_id in list(self._open):
                self._settle(request_id, error)
            raise
        self._dispatch_soon()

    async def _of_all_up(self, ask: Callable[[RemoteActor], Awaitable[Any]]) -> list[Any]:
        """The answers of the engines that are up, in order; if none is, of those that come up."""
        while True:
            up = [engine for engine in self._engines if engine.is_up]
            answers = await asyncio.gather(*(self._answer(engine, ask) for engine in up))
            if answers := [answer for answer in answers if answer is not None]:
                return answers
            replacing = [engine.replacing for engine in self._engines if engine.replacing is not None]
            done, _ = await asyncio.wait(replacing, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    async def _answer(self, engine: _Engine, ask: Callable[[RemoteActor], Awaitable[Any]]) -> Any:
        """None where the engine dies."""
        num_replaced = engine.actor.num_replaced
        try:
            return await ask(engine.actor)
        except ActorDiedError as death:
            self._lose(engine, num_replaced, death)

    def _settle(self, request_id: str, answer: tuple[Sample, ...] | Exception) -> None:
        """Wake the request's ``generate``; one that was dropped meanwhile is no error."""
        opened = self._take(request_id)
        if opened is None or opened.answer.done():
            return
        if isinstance(answer, Exception):
            opened.answer.set_exception(answer)
        else:
            opened.answer.set_result(answer)

    def _take(self, request_id: str) -> _OpenRequest | None:
        """Forget a request: its answer, should one come, is dropped."""
        opened = self._open.pop(request_id, None)
        if opened is not None and opened.engine is not None:
            opened.engine.num_open_samples -= opened.request.num_samples
            self._dispatch_soon()
        return opened
