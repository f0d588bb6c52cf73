"""What the pools have in common: their actors are placed together, started together and ended together."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Any, ClassVar, Self, TypeVar

from actors.placement import Bundle
from actors.remote_actor import ActorSpec, RemoteActor
from actors.shared_group import Share, alone
from ocrm_ray.config import Deadlines
from ocrm_ray.errors import ActorDiedError

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_DEATH_S = 30.0
"""In which Ray finds an actor dead whose peers have noticed already."""


class RayPool:
    """The actors of a pool, in the order of their specs, in one placement group, maybe with another pool's.

    ``has_farewell``: an actor has something to end by itself. An actor that died is replaced by another process,
    ``max_replacements`` times; ``emit(event, **fields)`` is told.
    """

    name: ClassVar[str]
    has_farewell: ClassVar[bool] = False

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
        await share.group.enter(deadlines.start_s)
        actors: list[RemoteActor] = []
        try:
            for bundle, spec in enumerate(specs, share.first):
                actors.append(await share.group.seat(bundle, spec))
            left_s = max(0.0, started + deadlines.start_s - time.monotonic())
            groups = (actors[start : start + a.num_ranks] for start, a in enumerate(actors) if a.rank == 0)
            await asyncio.gather(*(_start_together(group, left_s) for group in groups))
        except BaseException:
            for actor in actors:
                actor.kill()
            share.group.leave()
            raise
        return cls(actors, share, deadlines)

    async def ask(self, actor: RemoteActor, method: str, *arguments: Any, deadline_s: float) -> Any:
        """As ``RemoteActor.call``; where the actor dies, the one in its place is asked again."""
        while True:
            async with self._replacing[actor.role]:  # a new process is asked only once it has caught up
                num_replaced = actor.num_replaced
            try:
                return await actor.call(method, *arguments, deadline_s=deadline_s)
            except ActorDiedError as error:
                await self.replace(actor, num_replaced, error)

    async def ask_all(self, actors: Seq[RemoteActor], method: str, *arguments: Any, deadline_s: float) -> list[Any]:
        """The answers of all ``actors``, in their order; of several failures a death is raised."""
        return await together(self.ask(actor, method, *arguments, deadline_s=deadline_s) for actor in actors)

    async def replace(self, actor: RemoteActor, num_replaced: int, death: ActorDiedError) -> None:
        """Another process for an actor that died, once whoever finds it dead: ``num_replaced`` is what its finder saw.

        So for all ranks of its process group, which ends with any of them. Raises ``death`` where it was replaced as
        often as is allowed, or where it cannot be.
        """
        first = self.actors.index(actor) - actor.rank
        ranks = self.actors[first : first + actor.num_ranks]
        async with self._replacing[ranks[0].role]:
            if actor.num_replaced > num_replaced:
                return
            if num_replaced >= self.max_replacements:
                raise death
            started = time.monotonic()
            self.emit("actor_died", actor=actor.role, error=str(death))
            try:
                for each in ranks:
                    each.replace()
                await _start_together(ranks, self.deadlines.start_s)
                await asyncio.gather(*map(self.catch_up, ranks))
            except Exception as error:
                raise death from error
            self.emit("actor_restarted", actor=actor.role, seconds=time.monotonic() - started)

    async def catch_up(self, actor: RemoteActor) -> None:
        """Tell a new process what the others of the pool were told since they started."""

    async def close(self, may_rest: bool = False) -> None:
        """End every actor, with 20 s for its farewell, and leave the place; or let it rest in a place that stays."""
        group, ended = self._share.group, set(self.actors)
        try:
            if may_rest and group.stays:
                resting = zip(self.actors, await asyncio.gather(*(actor.rest() for actor in self.actors)), strict=True)
                ended -= {actor for actor, rests in resting if rests}
            if self.has_farewell:
                await asyncio.gather(*(actor.close() for actor in ended))
        finally:
            for bundle, actor in enumerate(self.actors, self._share.first):
                if actor in ended:
                    actor.kill()
                else:
                    group.keep(bundle, actor)
            group.leave()


def _log_event(event: str, **fields: object) -> None:
    logger.warning("%s %s", event, fields)


async def together(calls: Iterable[Awaitable[Answer]]) -> list[Answer]:
    """What all of them answer, in their order; of several failures a death is raised, else the first.

    Who trains with an actor that died fails too, at its connection to it, and often before Ray knows of the death.
    """
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    except ActorDiedError:
        raise
    except Exception as error:
        done, _ = await asyncio.wait(tasks, timeout=_DEATH_S)
        failures = [task.exception() for task in done if not task.cancelled()]
        deaths = [failure for failure in failures if isinstance(failure, ActorDiedError)]
        if deaths:
            raise deaths[0] from error
        raise


async def _start_together(ranks: Seq[RemoteActor], deadline_s: float) -> None:
    """One actor, or the ranks of a process group, which meet at the first one's node."""
    meeting = await ranks[0].meeting_point(deadline_s) if len(ranks) > 1 else None
    await together(_wait_until_ready(actor, deadline_s, meeting) for actor in ranks)


async def _wait_until_ready(actor: RemoteActor, deadline_s: float, meeting: tuple[str, int] | None) -> None:
    started = time.monotonic()
    await actor.start(deadline_s, meeting)
    logger.info("actor %s is ready after %.1f s", actor.role, time.monotonic() - started)
