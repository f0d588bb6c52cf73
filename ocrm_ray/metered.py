"""Pools that know when they are idle: each call counts as a request of its pool while it lasts."""

from collections.abc import Callable
from typing import Any, cast

from ocrm_ray.metrics import BusyMeter
from ocrm_ray.pools import Evaluator, GenerationPool, PolicyPool, Pools, RewardPool, ScoringPool


class _Metered:
    """Any pool; every method is awaited under the pool's meter."""

    def __init__(self, pool: object, meter: BusyMeter) -> None:
        self._pool = pool
        self._meter = meter

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._pool, name)

        async def metered(*args: object) -> object:
            async with self._meter.request():
                return await method(*args)

        return metered


class MeteredPools:
    """The pools of a run, each behind its meter."""

    def __init__(self, pools: Pools, clock: Callable[[], float]) -> None:
        self.meters = {name: BusyMeter(clock) for name in ("generation", "policy", "scoring", "reward")}
        self.generation = cast(GenerationPool, _Metered(pools.generation, self.meters["generation"]))
        self.policy = cast(PolicyPool, _Metered(pools.policy, self.meters["policy"]))
        self.scoring = cast(ScoringPool, _Metered(pools.scoring, self.meters["scoring"]))
        self.reward = cast(RewardPool, _Metered(pools.reward, self.meters["reward"]))
        self.evaluator: Evaluator = pools.evaluator
