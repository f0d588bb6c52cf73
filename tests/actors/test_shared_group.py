"""Placement groups that stay, and who takes over the processes in them. Ray and the processes are stand-ins."""

import asyncio
from dataclasses import replace

import pytest

from actors import shared_group
from actors.placement import GroupRequest, Slot
from actors.remote_actor import ActorSpec, RemoteActor
from actors.shared_group import SharedGroup, StandingGroups
from ocrm_ray.errors import DeadlineError

REQUEST = GroupRequest("policy", (Slot("policy", {"CPU": 0.1}), Slot("reward", {"CPU": 0.1})))
OTHER = GroupRequest("scoring", (Slot("scoring", {"CPU": 0.1}),))
SPEC = ActorSpec("policy-0", "actors.policy:PolicyActor", ("one run",), threads=1)


@pytest.fixture
def reserved(monkeypatch):
    """Groups that are reserved now; one of the name ``full`` is never."""
    groups = []

    async def place(request, deadline_s, tell):
        if request.name == "full":
            raise DeadlineError(request.name)
        await asyncio.sleep(0)
        groups.append(object())
        return groups[-1]

    monkeypatch.setattr(shared_group, "place", place)
    monkeypatch.setattr(shared_group, "remove_placement_group", groups.remove)
    return groups


def test_a_group_is_reserved_by_the_first_pool_freed_by_the_last_and_reserved_again(reserved):
    async def play():
        group = SharedGroup(REQUEST)
        await asyncio.gather(group.enter(1.0), group.enter(1.0))
        (first,) = reserved
        group.leave()
        assert reserved == [first]
        group.leave()
        assert reserved == []
        await group.enter(1.0)
        assert len(reserved) == 1
        assert reserved != [first]

    asyncio.run(play())


def test_a_group_that_could_not_be_reserved_is_tried_again_by_the_next(reserved):
    async def play():
        group = SharedGroup(GroupRequest("full", ()))
        for _ in range(2):
            with pytest.raises(DeadlineError):
                await group.enter(1.0)

    asyncio.run(play())


class Actor:
    """An actor with a process that has a number, and a list of what it was told at its end."""

    is_of_kind, end = RemoteActor.is_of_kind, RemoteActor.end
    num_processes = 0

    def __init__(self, spec, place, kept=None):
        self._spec, self.told = spec, []
        if kept is None:
            Actor.num_processes += 1
        self.process = Actor.num_processes if kept is None else kept.process

    async def close(self):
        self.told.append("close")

    def kill(self):
        self.told.append("kill")


@pytest.fixture
def group(reserved, monkeypatch):
    monkeypatch.setattr(shared_group, "RemoteActor", Actor)
    return SharedGroup(REQUEST, stays=True)


def test_an_actor_of_the_next_run_has_the_process_that_was_kept_in_its_bundle(group):
    async def play():
        await group.enter(1.0)
        first = await group.seat(1, SPEC)
        group.keep(1, first)
        second, elsewhere = await group.seat(1, replace(SPEC, arguments=("another run",))), await group.seat(0, SPEC)
        assert second.process == first.process != elsewhere.process
        assert first.told == []
        assert (await group.seat(1, SPEC)).process not in (first.process, elsewhere.process), "it was given away"

    asyncio.run(play())


@pytest.mark.parametrize(
    "changes",
    [{"threads": 2}, {"environment": {"MKL_CBWR": "AUTO"}}, {"path": "actors.sft:SftActor"}, {"yields": True}],
)
def test_a_process_that_was_started_otherwise_is_ended_before_another_takes_its_place(group, changes):
    async def play():
        await group.enter(1.0)
        first = await group.seat(0, SPEC)
        group.keep(0, first)
        assert (await group.seat(0, replace(SPEC, **changes))).process != first.process
        assert first.told == ["close", "kill"]

    asyncio.run(play())


def test_a_group_that_stays_is_left_with_its_processes_until_it_ends(group, reserved):
    async def play():
        await group.enter(1.0)
        actor = await group.seat(0, SPEC)
        group.keep(0, actor)
        group.leave()
        assert (len(reserved), actor.told) == (1, [])
        await group.end()
        assert (reserved, actor.told) == ([], ["close", "kill"])

    asyncio.run(play())


def test_the_next_run_has_the_groups_that_it_asks_for_again_and_the_others_end(reserved):
    async def play():
        groups = StandingGroups()
        before = groups.shares([REQUEST, OTHER])
        assert (before["policy"].first, before["reward"].first) == (0, 1)
        for name in ("policy", "scoring"):
            await before[name].group.enter(1.0)
        first, _ = reserved
        after = groups.shares([REQUEST])
        assert after["policy"].group is before["policy"].group
        await asyncio.gather(*groups._ending)
        assert reserved == [first]
        await groups.end()
        assert reserved == []

    asyncio.run(play())


def test_a_run_after_one_that_failed_has_nothing_of_it(reserved):
    async def play():
        groups = StandingGroups()
        before = groups.shares([REQUEST])["policy"]
        await before.group.enter(1.0)
        await groups.end()
        assert reserved == []
        assert groups.shares([REQUEST])["policy"].group is not before.group

    asyncio.run(play())
