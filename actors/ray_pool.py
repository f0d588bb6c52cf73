"""What the pools have in common: their actors are placed together, started together and ended together."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, ClassVar, Self

from actors.placement import Bundle, Share, alone
from actors.remote_actor import ActorSpec, Place, RemoteActor
from ocrm_ray.config import Deadlines
from ocrm_ray.errors import ActorDiedError

logger = logging.getLogger(__name__)

_FAREWELL_S = 20.0


class RayPool:
    """The actors of a pool, in the order of their specs, in one placement group, maybe with another pool's.

    ``farewell`` is the method by which an actor ends what it has started, if it has one. An actor that died is replaced
    by another process, ``max_replacements`` times; ``emit(event, **fields)`` is told.
    """

    name: ClassVar[str]
    farewell: ClassVar[str | None] = None

    def __init__(self, actors: Seq[RemoteActor], share: Share, deadlines: Deadlines) -> None:
        self.actors = tuple(actors)
        self.deadlines = deadlines
        self.max_replacements = 0
        """Of each actor."""
        self.emit: Callable[..., None] = _log_event
        self._share = share
        self._replacing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @classmethod
    async def start(cls, specs: Seq[ActorSpec], bundles: Seq[Bundle], deadlines: Deadlines) -> Self:
        """As ``start_in``, in a placement group of its own, one bundle an actor."""
        assert len(bundles) == len(specs), f"pool {cls.name}: one bundle an actor"
        return await cls.start_in(alone(cls.name, bundles), specs, deadlines)

    @classmethod
    async def start_in(cls, share: Share, specs: Seq[ActorSpec], deadlines: Deadlines) -> Self:
        """Place the pool and wait until all actors are ready: ``deadlines.start_s`` for both.

        Raises the first actor's own error, ActorDiedError or DeadlineError; nothing of the pool is then left.
        """
        started = time.monotonic()
        group = await share.group.enter(deadlines.start_s)
        actors: list[RemoteActor] = []
        try:
            actors.extend(RemoteActor(spec, Place(group, share.first + number)) for number, spec in enumerate(specs))
            left_s = max(0.0, started + deadlines.start_s - time.monotonic())
            await asyncio.gather(*(_wait_until_ready(actor, left_s) for actor in actors))
        except BaseException:
            _end(actors, share)
            raise
        return cls(actors, share, deadlines)

    async def ask(self, actor: RemoteActor, method: str, *arguments: Any, deadline_s: float) -> Any:
        """As ``RemoteActor.call``; where the actor dies, the one in its place is asked again."""
        while True:
            num_replaced = actor.num_replaced
            try:
                return await actor.call(method, *arguments, deadline_s=deadline_s)
            except ActorDiedError as error:
                await self.replace(actor, num_replaced, error)

    async def ask_all(self, actors: Seq[RemoteActor], method: str, *arguments: Any, deadline_s: float) -> list[Any]:
        """The answers of all ``actors``, in their order; the first failure is raised."""
        asked = (self.ask(actor, method, *arguments, deadline_s=deadline_s) for actor in actors)
        return list(await asyncio.gather(*asked))

    async def replace(self, actor: RemoteActor, num_replaced: int, death: ActorDiedError) -> None:
        """Another process for an actor that died, once whoever finds it dead: ``num_replaced`` is what its finder saw.

        Raises ``death`` where it was replaced as often as is allowed, or where it cannot be.
        """
        async with self._replacing[actor.role]:
            if actor.num_replaced > num_replaced:
                return
            if num_replaced >= self.max_replacements:
                raise death
            started = time.monotonic()
            self.emit("actor_died", actor=actor.role, error=str(death))
            try:
                await actor.replace(self.deadlines.start_s)
                await self.catch_up(actor)
            except Exception as error:
                raise death from error
            self.emit("actor_restarted", actor=actor.role, seconds=time.monotonic() - started)

    async def catch_up(self, actor: RemoteActor) -> None:
        """Tell a new process what the others of the pool were told since they started."""

    async def close(self) -> None:
        """End every actor, with 20 s for its farewell, and free the place.

        An actor that fails its farewell, or is dead already, is logged: an end must not hide why it was needed.
        """
        try:
            if self.farewell is not None:
                await asyncio.gather(*(_say(actor, self.farewell) for actor in self.actors))
        finally:
            _end(self.actors, self._share)


def _log_event(event: str, **fields: object) -> None:
    logger.warning("%s %s", event, fields)


async def _wait_until_ready(actor: RemoteActor, deadline_s: float) -> None:
    started = time.monotonic()
    await actor.start(deadline_s)
    logger.info("actor %s is ready after %.1f s", actor.role, time.monotonic() - started)


async def _say(actor: RemoteActor, farewell: str) -> None:
    try:
        await actor.call(farewell, deadline_s=_FAREWELL_S)
    except Exception as error:
        logger.warning("actor %s did not end by itself: %s", actor.role, error)


def _end(actors: Seq[RemoteActor], share: Share) -> None:
    for actor in actors:
        actor.kill()
    share.group.leave()
