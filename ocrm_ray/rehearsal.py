"""A rehearsal's configuration, and its figures: how near a step came to the slowest pool alone."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TypeAlias

from ocrm_ray.config import Duration, Rehearsal, RunConfig
from ocrm_ray.cost import StepCost, correction_line, seconds_text, step_cost
from ocrm_ray.errors import mistake
from ocrm_ray.inspection import network_sizes
from ocrm_ray.run_files import Run

Booked: TypeAlias = defaultdict[str, list[tuple[float, float]]]
"""What actors drew, by kind of work: (start in seconds since the run's start, seconds)."""
BACKGROUND = ("ratios", "refit")
"""A correction's work, which limits no step."""
WAITS = ("rollout", "straggler", "publish", "correction")


@dataclass(frozen=True)
class Figures:
    """Of the measured updates; seconds are means of a step."""

    step_s: float
    busy_s: Mapping[str, float]  # drawn by each worker of a pool, and by BACKGROUND
    wait_s: Mapping[str, float]  # training waited for them
    staleness: Counter[int]  # rollouts by the updates between their oldest token and their use
    lags: Counter[int]  # corrections by the updates between snapshot and promotion
    ages: Counter[int]  # updates by those since the snapshot that their reward model was right for
    num_deferred: int

    @property
    def bottleneck(self) -> str:
        return max((pool for pool in self.busy_s if pool not in BACKGROUND), key=self.busy_s.__getitem__)

    @property
    def limit_s(self) -> float:
        """What the slowest pool drew, spread over its workers: no pipeline is faster."""
        return self.busy_s[self.bottleneck]

    @property
    def efficiency(self) -> float:
        return self.limit_s / self.step_s


def prepared(config: RunConfig) -> RunConfig:
    """The run to rehearse: with durations, and with updates that fill the pipeline first and empty it last.

    Durations are those of ``rehearsal``, else of an earlier run of the folder, else from arithmetic; UserError where
    there are none.
    """
    rehearsal = config.rehearsal
    if rehearsal is None:
        cost = step_cost(config, network_sizes(config))
        if cost is None:
            need = "durations: a model is not on this machine and no earlier run is in the run folder"
            raise mistake("rehearsal", "nothing", need, "write that section")
        rehearsal = _durations_of(config, cost)
    num_updates = _num_filling(config) + rehearsal.num_updates + config.rollout.max_staleness + 1
    changes = {"policy": ("num_updates", num_updates), "correction": ("num_pairs", None)}
    changes |= dict.fromkeys(("evaluation", "checkpoint"), ("every", num_updates))
    sections = {name: getattr(config, name).model_copy(update=dict([change])) for name, change in changes.items()}
    return config.model_copy(update={"rehearsal": rehearsal, **sections})


def _num_filling(config: RunConfig) -> int:
    return max(5, 2 * (config.rollout.max_staleness + 1))


def _durations_of(config: RunConfig, cost: StepCost) -> Rehearsal:
    """Those that give the stages of ``cost``; engines decode all prompts of a step at once."""
    num_prompts, pools = config.rollout.prompts_per_step, config.pools
    slots = -(-num_prompts // pools.generation.num_actors)

    def each(stage: str, num_workers: int) -> Duration:
        return Duration(item_s=cost.stage_s[stage] * num_workers / num_prompts)

    return Rehearsal(
        generate=each("generate", slots * pools.generation.num_actors),
        engine_slots=slots,
        score=each("score", pools.scoring.num_actors),
        reward=each("score", pools.reward.num_actors),
        train=each("train", 1),
        weights_gib=cost.stage_s["publish"],  # at 1 GiB/s
        ratio_s=cost.ratio_s or 0.0,
        refit_s=cost.refit_s or 0.0,
    )


def _workers(config: RunConfig) -> dict[str, int]:
    pools, rehearsal = config.pools, config.rehearsal
    assert rehearsal is not None
    num_engines = pools.generation.num_actors
    workers = {"scoring": pools.scoring.num_actors, "reward": pools.reward.num_actors}
    workers["policy"] = pools.policy.num_actors  # each rank takes as long as the whole update
    generation = {"generation": num_engines * rehearsal.engine_slots}
    return generation | workers | {"publish": num_engines} | dict.fromkeys(BACKGROUND, 1)


def figures(config: RunConfig, run: Run, booked: Booked) -> Figures:
    """From the files of the rehearsed run and what its actors drew while the pipeline was full."""
    assert config.rehearsal is not None
    first, num_steps = _num_filling(config), config.rehearsal.num_updates
    rows = {row["step"]: row for row in run.metrics}
    measured = [rows[first + 1 + number] for number in range(num_steps)]
    start_s, end_s = rows[first]["time_s"], measured[-1]["time_s"]
    busy_s = {
        work: sum(max(0.0, min(start + drawn, end_s) - max(start, start_s)) for start, drawn in booked[work])
        / (num_workers * num_steps)
        for work, num_workers in _workers(config).items()
    }
    staleness = Counter(int(updates) for start, updates in booked["staleness"] if start_s <= start < end_s)
    promoted = [event for event in run.events if event["event"] == "promoted" and event["reward_version"]]
    snapshots = {event["policy_version"]: event["snapshot_version"] for event in promoted}
    ages = [row["step"] - 1 - max((snapshots[v] for v in snapshots if v < row["step"]), default=0) for row in measured]
    return Figures(
        step_s=fmean(row["step_s"] for row in measured),
        busy_s=busy_s,
        wait_s={name: fmean(row[f"{name}_wait_s"] for row in measured) for name in WAITS},
        staleness=Counter({updates: num // config.pools.policy.num_actors for updates, num in staleness.items()}),
        lags=Counter(e["lag_steps"] for e in promoted if first < e["policy_version"] <= first + num_steps),
        ages=Counter(ages),
        num_deferred=sum(row["num_deferred_corrections"] for row in measured),
    )


def figure_lines(config: RunConfig, found: Figures) -> list[str]:
    """A table of the pools, and what to read beside it."""
    cost, workers = step_cost(config, None), _workers(config)
    assert cost is not None
    idle = {work: max(0.0, 1 - busy_s / found.step_s) for work, busy_s in found.busy_s.items()}
    lines = [
        f"{'':12}{'workers':>8}{'busy s/step':>13}{'idle':>7}",
        *(f"{work:12}{workers[work]:8}{found.busy_s[work]:13.3f}{share:7.0%}" for work, share in idle.items()),
        f"step: {seconds_text(found.step_s)}, predicted {seconds_text(cost.step_s)}",
        f"limit: {seconds_text(found.limit_s)} ({found.bottleneck}); overlap efficiency {found.efficiency:.1%}",
        "training waited, s/step: rollouts {rollout:.3f}, stragglers among them {straggler:.3f}, "
        "publishes {publish:.3f}, corrections {correction:.3f}".format(**found.wait_s),
        f"rollouts by staleness: {_histogram(found.staleness)}",
        f"corrections: {correction_line(config, replace(cost, step_s=found.step_s))}",
    ]
    if config.correction.strategy != "none":
        lines += [
            f"corrections by updates until promotion: {_histogram(found.lags)}; {found.num_deferred} deferred",
            f"updates by those since the live reward model's snapshot: {_histogram(found.ages)}",
        ]
    return lines


def _histogram(counts: Counter[int]) -> str:
    return ", ".join(f"{value}: {count}" for value, count in sorted(counts.items())) or "none"
