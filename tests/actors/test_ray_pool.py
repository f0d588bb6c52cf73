import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from actors.ray_pool import RayPool, describe_shortage, plan_bundles
from ocrm_ray.config import Deadlines, GenerationPool, Pool, Pools, RewardPool
from ocrm_ray.errors import ActorDiedError

CPU = {"CPU": 0.1}
GPU = {"CPU": 0.1, "GPU": 1.0}


@pytest.mark.parametrize(
    ("pools", "expected"),
    [
        (
            Pools(),
            {"generation": [CPU], "policy": [CPU], "scoring": [CPU] * 2, "reward": [CPU] * 2, "evaluation": [CPU]},
        ),
        (
            Pools(
                generation=GenerationPool(num_actors=2, gpus_per_actor=1.0),
                policy=Pool(num_actors=3, gpus_per_actor=1.0),
                scoring=Pool(gpus_per_actor=0.5),
                reward=RewardPool(num_actors=2, cpus_per_actor=2.0, num_refit_ranks=3),
            ),
            {
                "generation": [GPU] * 2,
                "policy": [GPU] * 3,
                "scoring": [{"CPU": 0.1, "GPU": 0.5}] * 2,
                "reward": [{"CPU": 2.0}] * 5,
                "evaluation": [CPU],
            },
        ),
    ],
    ids=["defaults fit two cores", "on GPUs the background actors get their own share"],
)
def test_plan_has_a_bundle_for_every_actor_of_every_pool(pools, expected):
    assert plan_bundles(pools) == expected


def test_bundles_of_a_plan_do_not_share_one_dictionary():
    first, second = plan_bundles(Pools(policy=Pool(num_actors=2)))["policy"]
    assert first is not second


def test_shortage_names_what_was_asked_for_and_what_is_free():
    text = describe_shortage([GPU, CPU], free={"CPU": 1.5}, total={"CPU": 2.0, "GPU": 0.0, "memory": 9.0})
    assert text == "asked for 2 bundles (0.1 CPU, 1 GPU + 0.1 CPU), the cluster has free 1.5 of 2 CPU, 0 of 0 GPU"


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
