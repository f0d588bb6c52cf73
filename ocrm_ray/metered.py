"""Pools that know when they are idle: each call counts as a request of its pool while it lasts."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any, cast

from ocrm_ray.metrics import POOLS, BusyMeter
from ocrm_ray.pools import GenerationPool, PolicyPool, Pools, RewardPool, ScoringPool

ROLLOUT_SCORING = "rollout_scoring"
"""Meter of the scores of rollouts alone: the scoring and reward pools also work for corrections."""
PUBLISHING = "publishing"
"""Meter of engines taking new weights, which goes on beside everything else."""


class _Metered:
    """Any pool; every method is awaited under ``meter``, or under the meters that ``by_method`` names for it."""

    def __init__(self, pool: object, meter: BusyMeter, **by_method: tuple[BusyMeter, ...]) -> None:
        self._pool = pool
        self._meter = meter
        self._by_method = by_method

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._pool, name)

        async def metered(*args: object) -> object:
            async with AsyncExitStack() as requests:
                for meter in self._by_method.get(name, (self._meter,)):
                    await requests.enter_async_context(meter.request())
                return await method(*args)

        return metered


def metered(pools: Pools, clock: Callable[[], float]) -> tuple[Pools, dict[str, BusyMeter]]:
    """The pools of a run, each behind its meter, and the meters."""
    meters = {name: BusyMeter(clock) for name in (*POOLS, ROLLOUT_SCORING, PUBLISHING)}
    generation, policy, scoring, reward, scores, publishes = meters.values()
    behind = Pools(
        cast(GenerationPool, _Metered(pools.generation, generation, load_weights=(publishes,))),
        cast(PolicyPool, _Metered(pools.policy, policy, send_weights=(publishes,))),
        cast(ScoringPool, _Metered(pools.scoring, scoring, score=(scoring, scores))),
        cast(RewardPool, _Metered(pools.reward, reward, score=(reward, scores))),
        pools.evaluator,
    )
    return behind, meters
