"""What is measured while a step runs, and its line in metrics.jsonl."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from statistics import fmean
from typing import Any, cast

from ocrm_ray.metrics import POOLS, STAGES, BusyMeter, StepRecord
from ocrm_ray.pools import Evaluator, GenerationPool, PolicyPool, Pools, RewardPool, ScoringPool
from ocrm_ray.records import Rollout, UpdateReport
from ocrm_ray.rollout_scoring import ScoreVersions
from ocrm_ray.watchdog import OpenCalls

TRAIN = "train"
ROLLOUT_SCORING = "rollout_scoring"
"""Meter of the scores of rollouts alone: the scoring and reward pools also work for corrections."""
PUBLISHING = "publishing"
"""Meter of engines taking new weights, which goes on beside everything else."""
METERED = {"generate": "generation", "score": ROLLOUT_SCORING, "publish": PUBLISHING}
"""Stages whose seconds are those with a request in flight."""
WAITS = ("rollout_wait_s", "correction_wait_s", "publish_wait_s")
_OF_UPDATE = (
    *("loss", "kl_sft", "kl_anchor", "entropy", "clip_share", "grad_norm", "logprob_gap"),
    *("truncated_share", "value_loss", "num_skipped_steps"),
)


class _Metered:
    """The pool ``name``; every call is open in ``calls`` while it is awaited, under ``meter`` or under the meters that
    ``by_method`` names for it."""

    def __init__(
        self, pool: object, name: str, calls: OpenCalls, meter: BusyMeter, **by_method: tuple[BusyMeter, ...]
    ) -> None:
        self._pool = pool
        self._name = name
        self._calls = calls
        self._meter = meter
        self._by_method = by_method

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._pool, name)

        async def metered(*args: object) -> object:
            async with AsyncExitStack() as requests:
                for meter in self._by_method.get(name, (self._meter,)):
                    await requests.enter_async_context(meter.request())
                requests.enter_context(self._calls.call(self._name, name))
                return await method(*args)

        return metered


def metered(pools: Pools, clock: Callable[[], float]) -> tuple[Pools, dict[str, BusyMeter], OpenCalls]:
    """The pools of a run, each behind its meter, the meters, and the calls without an answer."""
    calls = OpenCalls(clock)
    meters = {name: BusyMeter(clock) for name in (*POOLS, ROLLOUT_SCORING, PUBLISHING)}
    generation, policy, scoring, reward, scores, publishes = meters.values()
    behind = Pools(
        cast(
            GenerationPool,
            _Metered(pools.generation, "generation", calls, generation, load_weights=(publishes,), sleep=(), wake=()),
        ),
        cast(PolicyPool, _Metered(pools.policy, "policy", calls, policy, send_weights=(publishes,))),
        cast(ScoringPool, _Metered(pools.scoring, "scoring", calls, scoring, score=(scoring, scores))),
        cast(RewardPool, _Metered(pools.reward, "reward", calls, reward, score=(reward, scores))),
        cast(Evaluator, _Metered(pools.evaluator, "evaluation", calls, BusyMeter(clock))),
    )
    return behind, meters, calls


class StepClock:
    """Times sections of the loop (``TRAIN`` and ``WAITS``); ``close`` ends a step and starts the next.

    ``totals``: running ones that do not begin at 0.
    """

    def __init__(self, clock: Callable[[], float], meters: Mapping[str, BusyMeter], **totals: float) -> None:
        self._clock = clock
        self._meters = meters
        self._totals: Mapping[str, float] = totals
        self._section_s: defaultdict[str, float] = defaultdict(float)
        self._started = clock()

    @contextmanager
    def timed(self, section: str) -> Iterator[None]:
        """Add the body's seconds to ``section`` of this step."""
        started = self._clock()
        try:
            yield
        finally:
            self._section_s[section] += self._clock() - started

    def close(self, **totals: float) -> dict[str, Any]:
        """Fields of the step's ``StepRecord``: where its seconds went, and what it added to running ``totals``.

        Stages overlap, so that their busy seconds sum to more than the step where the pipeline works.
        """
        started, self._started = self._started, self._clock()
        step_s = self._started - started
        idle_share = {name: meter.idle_share_since_last() for name, meter in self._meters.items()}
        stage_s = {name: step_s * (1 - idle_share[meter]) for name, meter in METERED.items()}
        fields: dict[str, Any] = {name: self._section_s[name] for name in WAITS}
        fields |= {name: total - self._totals.get(name, 0) for name, total in totals.items()}
        fields["stage_s"] = {name: stage_s.get(name, self._section_s[TRAIN]) for name in STAGES}
        self._totals = totals
        self._section_s.clear()
        return {**fields, "step_s": step_s, "idle_share": {pool: idle_share[pool] for pool in POOLS}}


def step_record(
    time_s: float, live: ScoreVersions, batch: list[Rollout], update: UpdateReport, fields: Mapping[str, Any]
) -> StepRecord:
    """The line of update ``update.version``; ``live``: the pair after its promotion, ``fields``: of ``StepClock``."""
    scores = [score for rollout in batch for score in rollout.scores or ()]
    num_tokens = sum(rollout.num_tokens for rollout in batch)
    oldest = [rollout.first_version for rollout in batch]
    return StepRecord(
        step=update.version,
        time_s=time_s,
        policy_version=update.version,
        reward_version=live.reward_version,
        anchor_version=live.anchor_version,
        rollout_version_min=min(oldest),
        reward_mean=fmean(score.reward for score in scores),
        rollout_tokens=num_tokens,
        response_tokens_mean=num_tokens / len(scores),
        staleness_mean=update.version - 1 - fmean(oldest),
        **of_update(update),
        **fields,
    )


def of_update(update: UpdateReport) -> dict[str, Any]:
    """The fields of a ``StepRecord`` that an update reports under the same names."""
    return {name: getattr(update, name) for name in _OF_UPDATE}
