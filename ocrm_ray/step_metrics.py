"""From what happened in a step to its line in metrics.jsonl."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from ocrm_ray.metered import PUBLISHING, ROLLOUT_SCORING
from ocrm_ray.metrics import BusyMeter, StepRecord
from ocrm_ray.records import Rollout, UpdateReport
from ocrm_ray.rollout_scoring import ScoreVersions


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Where one step's seconds went."""

    step_s: float
    section_s: Mapping[str, float]
    idle_share: Mapping[str, float]
    scoring_s: float
    """While rollouts were being scored."""
    publishing_s: float
    """While engines took new weights."""

    @property
    def stage_s(self) -> dict[str, float]:
        """Busy seconds of each stage: they overlap, so their sum exceeds the step where the pipeline works."""
        return {
            "generate": self.step_s * (1 - self.idle_share["generation"]),
            "score": self.scoring_s,
            "train": self.section_s.get("train", 0.0),
            "publish": self.publishing_s,
        }


@dataclass(slots=True)
class StepClock:
    """Times named sections of the loop; ``close`` ends a step and starts the next."""

    clock: Callable[[], float]
    meters: Mapping[str, BusyMeter]
    section_s: dict[str, float] = field(default_factory=dict)
    started: float = 0.0

    def __post_init__(self) -> None:
        self.started = self.clock()

    @contextmanager
    def timed(self, section: str) -> Iterator[None]:
        """Add the body's seconds to ``section`` of this step."""
        started = self.clock()
        try:
            yield
        finally:
            self.section_s[section] = self.section_s.get(section, 0.0) + self.clock() - started

    def close(self) -> StepTimes:
        now = self.clock()
        step_s = now - self.started
        idle_share = {name: meter.idle_share_since_last() for name, meter in self.meters.items()}
        scoring_s, publishing_s = (step_s * (1 - idle_share.pop(name)) for name in (ROLLOUT_SCORING, PUBLISHING))
        times = StepTimes(step_s, self.section_s, idle_share, scoring_s, publishing_s)
        self.started, self.section_s = now, {}
        return times


@dataclass(slots=True)
class Increments:
    """Turns running totals into what was added since the last call."""

    last: dict[str, float] = field(default_factory=dict)

    def of(self, **totals: float) -> dict[str, float]:
        added = {name: total - self.last.get(name, 0) for name, total in totals.items()}
        self.last = totals
        return added


def step_record(
    time_s: float,
    live: ScoreVersions,
    batch: list[Rollout],
    update: UpdateReport,
    times: StepTimes,
    counts: Mapping[str, float],
) -> StepRecord:
    """The line of update ``update.version``; ``live`` is the pair after the step's promotion."""
    scores = [score for rollout in batch for score in rollout.scores or ()]
    num_tokens = sum(rollout.num_tokens for rollout in batch)
    used_version = update.version - 1
    return StepRecord(
        step=update.version,
        time_s=time_s,
        policy_version=update.version,
        reward_version=live.reward_version,
        anchor_version=live.anchor_version,
        rollout_version_min=min(rollout.first_version for rollout in batch),
        reward_mean=sum(score.reward for score in scores) / len(scores),
        kl_sft=update.kl_sft,
        kl_anchor=update.kl_anchor,
        rollout_tokens=num_tokens,
        step_s=times.step_s,
        logprob_gap=update.logprob_gap,
        stage_s=times.stage_s,
        idle_share=times.idle_share,
        loss=update.loss,
        entropy=update.entropy,
        clip_share=update.clip_share,
        grad_norm=update.grad_norm,
        response_tokens_mean=num_tokens / len(scores),
        staleness_mean=sum(used_version - rollout.first_version for rollout in batch) / len(batch),
        rollout_wait_s=times.section_s.get("rollout_wait_s", 0.0),
        correction_wait_s=times.section_s.get("correction_wait_s", 0.0),
        publish_wait_s=times.section_s.get("publish_wait_s", 0.0),
        **counts,  # type: ignore[arg-type]
    )
