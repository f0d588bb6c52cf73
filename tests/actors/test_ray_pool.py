"""A pool whose actor dies. No Ray."""

import asyncio
from types import SimpleNamespace
from typing import Any

from actors.ray_pool import RayPool
from ocrm_ray.config import Deadlines
from ocrm_ray.errors import ActorDiedError


class MortalActor:
    """Dead until its replacement has caught up; remembers what its processes were asked, and when."""

    role, rank, num_ranks = "scoring-0", 0, 1

    def __init__(self) -> None:
        self.num_replaced = 0
        self.asked: list[tuple[int, str]] = []
        self.may_start = asyncio.Event()

    async def call(self, method: str, deadline_s: float) -> str:
        self.asked.append((self.num_replaced, method))
        await asyncio.sleep(0)
        if self.num_replaced == 0:
            raise ActorDiedError("dead")
        return method

    def replace(self) -> None:
        self.num_replaced += 1

    async def start(self, deadline_s: float, meeting: tuple[str, int] | None) -> None:
        await self.may_start.wait()


class CatchingUp(RayPool):
    name = "scoring"

    async def catch_up(self, actor: Any) -> None:
        await actor.call("catch up", deadline_s=1.0)


def test_a_process_in_the_place_of_a_dead_one_is_asked_nothing_before_it_has_caught_up() -> None:
    async def play() -> tuple[list[str], list[tuple[int, str]]]:
        actor: Any = MortalActor()
        pool = CatchingUp([actor], SimpleNamespace(), Deadlines())  # type: ignore[arg-type]
        pool.max_replacements = 1
        first = asyncio.create_task(pool.ask(actor, "score", deadline_s=1.0))
        while actor.num_replaced == 0:
            await asyncio.sleep(0)
        second = asyncio.create_task(pool.ask(actor, "commit", deadline_s=1.0))
        for _ in range(5):
            await asyncio.sleep(0)
        actor.may_start.set()
        return [await first, await second], actor.asked

    answers, asked = asyncio.run(play())
    assert answers == ["score", "commit"]
    assert asked[:2] == [(0, "score"), (1, "catch up")]
    assert sorted(asked[2:]) == [(1, "commit"), (1, "score")]
