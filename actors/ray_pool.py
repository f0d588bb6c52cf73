"""What the pools have in common: their actors are placed together, started together and ended together."""

import asyncio
import logging
import time
from collections.abc import Sequence as Seq
from typing import ClassVar, Self

from ray.util.placement_group import PlacementGroup, remove_placement_group

from actors.placement import Bundle, place
from actors.remote_actor import ActorSpec, RemoteActor, spawn
from ocrm_ray.config import Deadlines

logger = logging.getLogger(__name__)

_FAREWELL_S = 20.0


class RayPool:
    """The actors of a pool, in the order of their specs, in one placement group.

    ``farewell`` is the method by which an actor ends what it has started, if it has one.
    """

    name: ClassVar[str]
    farewell: ClassVar[str | None] = None

    def __init__(self, actors: Seq[RemoteActor], group: PlacementGroup, deadlines: Deadlines) -> None:
        self.actors = tuple(actors)
        self.deadlines = deadlines
        self._group = group

    @classmethod
    async def start(cls, specs: Seq[ActorSpec], bundles: Seq[Bundle], deadlines: Deadlines) -> Self:
        """Place the pool, one bundle an actor, and wait until all are ready: ``deadlines.start_s`` for both.

        Raises the first actor's own error, ActorDiedError or DeadlineError; nothing of the pool is then left.
        """
        assert len(bundles) == len(specs), f"pool {cls.name}: one bundle an actor"
        started = time.monotonic()
        group = await place(cls.name, bundles, deadlines.start_s)
        actors: list[RemoteActor] = []
        try:
            actors.extend(spawn(spec, group, bundle) for bundle, spec in enumerate(specs))
            left_s = max(0.0, started + deadlines.start_s - time.monotonic())
            await asyncio.gather(*(_wait_until_ready(actor, left_s) for actor in actors))
        except BaseException:
            _end(actors, group)
            raise
        return cls(actors, group, deadlines)

    async def close(self) -> None:
        """End every actor, with 20 s for its farewell, and free the place.

        An actor that fails its farewell, or is dead already, is logged: an end must not hide why it was needed.
        """
        try:
            if self.farewell is not None:
                await asyncio.gather(*(_say(actor, self.farewell) for actor in self.actors))
        finally:
            _end(self.actors, self._group)


async def _wait_until_ready(actor: RemoteActor, deadline_s: float) -> None:
    started = time.monotonic()
    await actor.start(deadline_s)
    logger.info("actor %s is ready after %.1f s", actor.role, time.monotonic() - started)


async def _say(actor: RemoteActor, farewell: str) -> None:
    try:
        await actor.call(farewell, deadline_s=_FAREWELL_S)
    except Exception as error:
        logger.warning("actor %s did not end by itself: %s", actor.role, error)


def _end(actors: Seq[RemoteActor], group: PlacementGroup) -> None:
    for actor in actors:
        actor.kill()
    remove_placement_group(group)
