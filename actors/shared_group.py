"""Placement groups that pools share, and the processes that stay in them from one run of a session to the next."""

import asyncio
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from ray.util.placement_group import PlacementGroup, remove_placement_group

from actors.placement import Bundle, GroupRequest, Slot, Tell, log_wait, place
from actors.remote_actor import ActorSpec, Place, RemoteActor


class SharedGroup:
    """A placement group that the first pool in it reserves.

    The last one frees it, or with ``stays`` leaves it, and in it the processes that were ``kept``, until ``end``.
    """

    def __init__(self, request: GroupRequest, tell: Tell = log_wait, stays: bool = False) -> None:
        self.request, self.stays = request, stays
        self._tell = tell
        self._lock = asyncio.Lock()
        self._group: PlacementGroup | None = None
        self._num_inside = 0
        self._kept: dict[int, RemoteActor] = {}

    async def enter(self, deadline_s: float) -> None:
        """Be inside, once the group is there. DeadlineError as ``place``."""
        started = time.monotonic()
        async with self._lock:
            if self._group is None:
                left_s = max(0.0, started + deadline_s - time.monotonic())
                self._group = await place(self.request, left_s, self._tell)
            self._num_inside += 1

    async def seat(self, bundle: int, spec: ActorSpec) -> RemoteActor:
        """An actor in a bundle, still to be started: in the process that was kept there, if it is of its kind."""
        assert self._group is not None, "enter comes first"
        kept = self._kept.pop(bundle, None)
        if kept is not None and not kept.is_of_kind(spec):
            await kept.end()
            kept = None
        return RemoteActor(spec, Place(self._group, bundle), kept)

    def keep(self, bundle: int, actor: RemoteActor) -> None:
        """Let the process of an actor that rests wait for the next one of its kind in the bundle."""
        assert self.stays, "nobody would end it"
        self._kept[bundle] = actor

    def leave(self) -> None:
        self._num_inside -= 1
        if self._num_inside == 0 and not self.stays:
            self._free()

    async def end(self) -> None:
        """End the processes that were kept, and free the place."""
        try:
            await asyncio.gather(*(actor.end() for actor in self._kept.values()))
        finally:
            self._kept.clear()
            self._free()

    def _free(self) -> None:
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


@dataclass(frozen=True)
class Share:
    """Of a placement group the bundles of one pool: from ``first`` on, in its order."""

    group: SharedGroup
    first: int = 0


def alone(name: str, bundles: Seq[Bundle], tell: Tell = log_wait) -> Share:
    """Of a group with nothing else in it."""
    return Share(SharedGroup(GroupRequest(name, tuple(Slot(name, bundle) for bundle in bundles)), tell))


class StandingGroups:
    """The groups of a run, among them those that it has from the run before. For one event loop."""

    def __init__(self, tell: Tell = log_wait) -> None:
        self._tell = tell
        self._groups: list[SharedGroup] = []
        self._ending: list[asyncio.Task[None]] = []

    def shares(self, requests: Seq[GroupRequest]) -> dict[str, Share]:
        """Every pool's, of groups that are reserved when a pool enters. What is not asked for any more ends."""
        self._dismiss([group for group in self._groups if group.request not in requests])
        standing = [group.request for group in self._groups]
        new = [request for request in requests if request not in standing]
        self._groups += [SharedGroup(request, self._tell, stays=True) for request in new]
        found: dict[str, Share] = {}
        for group in self._groups:
            for bundle, slot in enumerate(group.request.slots):
                found.setdefault(slot.pool, Share(group, bundle))
        return found

    async def end(self) -> None:
        """End every process that was kept, and free every place: the next run begins anew."""
        self._dismiss(list(self._groups))
        await asyncio.gather(*self._ending)

    def _dismiss(self, groups: Seq[SharedGroup]) -> None:
        self._groups = [group for group in self._groups if group not in groups]
        self._ending += [asyncio.create_task(group.end()) for group in groups]
