"""What the pools have in common: their actors are placed together, started together and ended together."""

import asyncio
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, ClassVar, Self

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from actors.remote_actor import ActorSpec, Place, RemoteActor
from ocrm_ray.config import Deadlines, Pools
from ocrm_ray.errors import ActorDiedError, DeadlineError

logger = logging.getLogger(__name__)

Bundle = dict[str, float]

_REPORT_S = 10.0
_FAREWELL_S = 20.0


def plan_bundles(pools: Pools) -> dict[str, list[Bundle]]:
    """Ray resources of every actor, by pool: one bundle an actor, in the order in which a pool spawns them.

    Two pools have one actor more than ``num_actors``, the last of its list: scoring its background actor
    (snapshots and pair ratios), reward its refitter. Evaluation always is one actor.
    """
    plan: dict[str, list[Bundle]] = {}
    for name, pool in pools:
        num_actors = 1 if name == "evaluation" else pool.num_actors + (name in ("scoring", "reward"))
        gpus = {"GPU": pool.gpus_per_actor} if pool.gpus_per_actor > 0 else {}
        plan[name] = [{"CPU": pool.cpus_per_actor, **gpus} for _ in range(num_actors)]
    return plan


class RayPool:
    """The actors of a pool, in the order of their specs, in one placement group.

    ``farewell`` is the method by which an actor ends what it has started, if it has one. An actor that died is replaced
    by another process, ``max_replacements`` times; ``emit(event, **fields)`` is told.
    """

    name: ClassVar[str]
    farewell: ClassVar[str | None] = None

    def __init__(self, actors: Seq[RemoteActor], group: PlacementGroup, deadlines: Deadlines) -> None:
        self.actors = tuple(actors)
        self.deadlines = deadlines
        self.max_replacements = 0
        """Of each actor."""
        self.emit: Callable[..., None] = _log_event
        self._group = group
        self._replacing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

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
            actors.extend(RemoteActor(spec, Place(group, bundle)) for bundle, spec in enumerate(specs))
            left_s = max(0.0, started + deadlines.start_s - time.monotonic())
            await asyncio.gather(*(_wait_until_ready(actor, left_s) for actor in actors))
        except BaseException:
            _end(actors, group)
            raise
        return cls(actors, group, deadlines)

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
            _end(self.actors, self._group)


async def place(pool: str, bundles: Seq[Bundle], deadline_s: float) -> PlacementGroup:
    """Reserve ``bundles`` together as one placement group; every 10 s of waiting is logged.

    Raises DeadlineError with what was asked for and what is free; the group is then gone from the cluster.
    """
    # a suffix: Ray refuses a second group of one name, and a removed one keeps its name for a moment
    group = placement_group(list(bundles), strategy="PACK", name=f"{pool}-{secrets.token_hex(4)}")
    ready = asyncio.ensure_future(group.ready())
    try:
        async with asyncio.timeout(deadline_s):
            while not (await asyncio.wait({ready}, timeout=_REPORT_S))[0]:
                logger.info("pool %s waits for a place: %s", pool, _shortage(bundles))
        ready.result()
        return group
    except BaseException as error:
        ready.cancel()
        remove_placement_group(group)
        if isinstance(error, TimeoutError):
            raise DeadlineError(
                f"pool {pool} was not placed within {deadline_s:g} s: {_shortage(bundles)}; "
                f"free the cluster, add nodes, or lower pools.{pool}.num_actors, cpus_per_actor or gpus_per_actor"
            ) from None
        raise


def _log_event(event: str, **fields: object) -> None:
    logger.warning("%s %s", event, fields)


def _shortage(bundles: Seq[Bundle]) -> str:
    return describe_shortage(bundles, ray.available_resources(), ray.cluster_resources())


def describe_shortage(bundles: Seq[Bundle], free: Mapping[str, float], total: Mapping[str, float]) -> str:
    """What was asked for against what the cluster has, resource by resource."""
    asked = " + ".join(", ".join(f"{amount:g} {name}" for name, amount in bundle.items()) for bundle in bundles)
    names = sorted({name for bundle in bundles for name in bundle})
    has = ", ".join(f"{free.get(name, 0.0):g} of {total.get(name, 0.0):g} {name}" for name in names)
    return f"asked for {len(bundles)} bundles ({asked}), the cluster has free {has}"


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
