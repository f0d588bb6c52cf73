"""Pools that know when they are idle: each call counts as a request of its pool while it lasts."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any, cast

from ocrm_ray.metrics import POOLS, BusyMeter
from ocrm_ray.pools import Evaluator, GenerationPool, PolicyPool, Pools, RewardPool, ScoringPool

ROLLOUT_SCORING = "rollout_scoring"
"""Meter of the scores of rollouts alone: the scoring and reward pools also work for corrections."""


class _Metered:
    """Any pool; every method is awaited under the pool's meter, ``score`` also under ``scores``."""

    def __init__(self, pool: object, meter: BusyMeter, scores: BusyMeter | None = None) -> None:
        self._pool = pool
        self._meter = meter
        self._scores = scores

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._pool, name)
        is_score = self._scores is not None and name == "score"

        async def metered(*args: object) -> object:
            async with AsyncExitStack() as requests:
                await requests.enter_async_context(self._meter.request())
                if is_score and self._scores is not None:
                    await requests.enter_async_context(self._scores.request())
                return await method(*args)

        return metered


class MeteredPools:
    """The pools of a run, each behind its meter."""

    def __init__(self, pools: Pools, clock: Callable[[], float]) -> None:
        self.meters = {name: BusyMeter(clock) for name in (*POOLS, ROLLOUT_SCORING)}
        scores = self.meters[ROLLOUT_SCORING]
        self.generation = cast(GenerationPool, _Metered(pools.generation, self.meters["generation"]))
        self.policy = cast(PolicyPool, _Metered(pools.policy, self.meters["policy"]))
        self.scoring = cast(ScoringPool, _Metered(pools.scoring, self.meters["scoring"], scores))
        self.reward = cast(RewardPool, _Metered(pools.reward, self.meters["reward"], scores))
        self.evaluator: Evaluator = pools.evaluator
