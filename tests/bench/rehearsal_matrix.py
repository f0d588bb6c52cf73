"""How near the pipeline comes to its slowest pool, over profiles of timed actors on a local Ray: one table.

    python tests/bench/rehearsal_matrix.py [PROFILE ...]

All of it takes about 14 minutes. ``adds``: what corrections add to the step, against the same profile without any.
Profiles in which training waits for a correction, because the configuration says so, are no part of the median.
"""

import asyncio
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from actors.rehearsal import MANY_ACTORS, rehearse_on_ray
from actors.session import ray_session
from ocrm_ray.config import RunConfig
from ocrm_ray.rehearsal import Figures, prepared

NUM_UPDATES = 15
GIGABYTE_S = {"weights_gib": 0.5, "pause_s": 0.02}
SHORT, LONG = {"ratio_s": 1.0, "refit_s": 5.0}, {"ratio_s": 2.0, "refit_s": 14.0}


@dataclass(frozen=True)
class Profile:
    """A step of 16 prompts takes 2 s or more; every 5 steps a correction of 6 s falls due."""

    engines: int = 4
    prompts: int = 16
    durations: dict[str, object] = field(default_factory=dict)
    correction: dict[str, object] = field(default_factory=dict)
    workers: int = 1
    """Scorers, and reward servers."""
    staleness: int = 2
    """Enough for every stage and its jitter to be under way at once."""
    is_paired: bool = False

    def config(self, strategy: str) -> RunConfig:
        stage = {"generate": 1.2, "score": 0.05, "reward": 0.005, "train": 0.05}
        section = {name: {"item_s": seconds, "jitter": 0.02} for name, seconds in stage.items()}
        slots = self.prompts // self.engines
        section |= {"num_updates": NUM_UPDATES, "engine_slots": slots, **GIGABYTE_S, **SHORT, **self.durations}
        pools = {"scoring": self.workers, "reward": self.workers, "generation": self.engines}
        tree = {
            "name": "rehearsal-matrix",
            "world": {},
            "rehearsal": section,
            "rollout": {"prompts_per_step": self.prompts, "max_staleness": self.staleness, "max_new_tokens": 100},
            "correction": {"every": 5, "strategy": strategy, **self.correction},
            "pools": {name: {"num_actors": number} for name, number in pools.items()},
        }
        return prepared(RunConfig.model_validate(tree))


def stage(seconds: float, jitter: float = 0.02, **more: float) -> dict[str, object]:
    return {"item_s": seconds, "jitter": jitter, **more}


SLOW = {"generate": stage(2.0)}
PROFILES = {
    "1 engine": Profile(engines=1, durations=SLOW),
    "2 engines": Profile(engines=2, durations=SLOW),
    "generation-bound": Profile(durations=SLOW, is_paired=True),
    "8 engines": Profile(engines=8, prompts=32, durations=SLOW | {"score": stage(0.03), "train": stage(0.03)}),
    "16 engines": Profile(engines=16, prompts=64, durations=SLOW | {"score": stage(0.015), "train": stage(0.02)}),
    "train-bound": Profile(durations={"train": stage(0.13)}, is_paired=True),
    "score-bound": Profile(durations={"score": stage(0.26)}, workers=2),
    "reward-bound": Profile(durations={"reward": stage(0.13)}, workers=1),
    "balanced": Profile(durations={name: stage(0.125) for name in ("score", "train")} | SLOW, staleness=5),
    "long-tailed": Profile(
        durations={"generate": stage(1.6, jitter=0.3, tail_share=0.05, tail_factor=4.0)}, staleness=5
    ),
    "slow publish": Profile(durations={"weights_gib": 2.2}),
    "refit > k steps": Profile(durations=SLOW | LONG),
    "refit > promote_after": Profile(durations=SLOW | LONG, correction={"promote_after": 4}),
    "refit > max_lag": Profile(durations=SLOW | LONG, correction={"max_lag": 4}),
}
HEAD = ("profile", "limit s", "step s", "efficiency", "adds", "gen. idle", "rollouts", "publish", "correction", "lags")


async def rehearse(profile: Profile, strategy: str = "ocrm") -> Figures:
    return await rehearse_on_ray(profile.config(strategy), lambda state: None)


def cells(name: str, found: Figures, without: Figures | None) -> list[str]:
    waits = [f"{found.wait_s[what]:.3f}" for what in ("rollout", "publish", "correction")]
    adds = "" if without is None else f"{found.step_s / without.step_s - 1:+.2%}"
    idle = f"{max(0.0, 1 - found.busy_s['generation'] / found.step_s):.1%}"
    lags = " ".join(f"{lag}x{count}" for lag, count in sorted(found.lags.items()))
    return [name, f"{found.limit_s:.3f}", f"{found.step_s:.3f}", f"{found.efficiency:.1%}", adds, idle, *waits, lags]


def main() -> None:
    unknown = set(sys.argv[1:]) - set(PROFILES)
    if unknown:
        sys.exit(f"no profile {', '.join(sorted(unknown))}: choose of {', '.join(PROFILES)}")
    os.environ.setdefault(*MANY_ACTORS)
    efficiencies, started = [], time.monotonic()
    print(("{:22}" + "{:>11}" * (len(HEAD) - 1)).format(*HEAD), flush=True)
    with ray_session("rehearsal-matrix"), asyncio.Runner() as runner:
        for name in sys.argv[1:] or PROFILES:
            profile = PROFILES[name]
            found = runner.run(rehearse(profile))
            without = runner.run(rehearse(profile, "none")) if profile.is_paired else None
            print(("{:22}" + "{:>11}" * (len(HEAD) - 1)).format(*cells(name, found, without)), flush=True)
            if not {"promote_after", "max_lag"} & set(profile.correction):
                efficiencies.append(found.efficiency)
    if efficiencies:
        print(f"efficiency: median {statistics.median(efficiencies):.1%}, worst {min(efficiencies):.1%}")
    print(f"{time.monotonic() - started:.0f} s in all; rollouts, publish, correction: seconds a step training waited")


if __name__ == "__main__":
    main()
