"""``ocrm-ray rehearse``: the real coordinator over the real pools on Ray, whose actors only take time."""

import asyncio
import itertools
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np

from actors.generation_group import RayGenerationPool
from actors.groups import RayPolicyPool, RayRewardPool, RayScoringPool
from actors.ray_pool import RayPool
from actors.remote_actor import ActorSpec
from actors.session import ray_session
from actors.timed import NUM_PAIRS
from ocrm_ray.config import RunConfig
from ocrm_ray.coordinator import Coordinator, TrainingData
from ocrm_ray.correction import PairData
from ocrm_ray.memory import prompt_tokens
from ocrm_ray.pools import Pools, Show
from ocrm_ray.progress import ProgressDisplay
from ocrm_ray.prompts import ShuffledEpochs
from ocrm_ray.records import Prompt, Sequence
from ocrm_ray.rehearsal import Booked, Figures, figure_lines, figures
from ocrm_ray.reinforcement import ShownRunLog
from ocrm_ray.run_files import read_run

TIMED_CPUS = 0.01
"""Ray CPUs of each actor, whatever the configuration says: 64 fit one core."""

MANY_ACTORS = ("RAY_worker_maximum_startup_concurrency", "32")
"""Ray warns where four times as many processes are started."""


def rehearse(config: RunConfig) -> str:
    """Rehearse a configuration that ``prepared`` returned; the figures as text. Leaves nothing behind."""
    os.environ.setdefault(*MANY_ACTORS)
    with ray_session(config.name), ProgressDisplay() as display:
        measured = asyncio.run(rehearse_on_ray(config, display.update))
    return "\n".join(figure_lines(config, measured))


async def rehearse_on_ray(config: RunConfig, show: Show) -> Figures:
    """Start the pools in the Ray session that goes on, rehearse, and end them."""
    pools: list[RayPool] = []
    try:
        for kind, specs in actor_specs(config).items():
            pools.append(await kind.start(specs, [{"CPU": TIMED_CPUS}] * len(specs), config.deadlines))
        with TemporaryDirectory() as folder:
            return await rehearse_over(config, pools, Path(folder), show)
    finally:
        await asyncio.gather(*(pool.close() for pool in pools))


def actor_specs(config: RunConfig) -> dict[type[RayPool], list[ActorSpec]]:
    """The actors of each pool; the last ones of two are those that a correction uses."""
    pools = config.pools
    actors: Mapping[type[RayPool], list[str]] = {
        RayGenerationPool: ["TimedEngine"] * pools.generation.num_actors,
        RayPolicyPool: ["TimedPolicy"] * pools.policy.num_actors,
        RayScoringPool: ["TimedScorer"] * (pools.scoring.num_actors + 1),
        RayRewardPool: [*["TimedServer"] * pools.reward.num_actors, "TimedRefitter"],
    }
    seeds = itertools.count(1000 * config.seed)

    def spec(role: str, name: str) -> ActorSpec:
        arguments = config.rehearsal, config.rollout, next(seeds)
        return ActorSpec(role, f"actors.timed:{name}", arguments, threads=1, asynchronous=True)

    return {kind: [spec(f"{kind.name}-{i}", name) for i, name in enumerate(names)] for kind, names in actors.items()}


async def rehearse_over(config: RunConfig, pools: list[RayPool], folder: Path, show: Show) -> Figures:
    """Run the coordinator over ``pools``, in the order of ``actor_specs``; its files go to ``folder``."""
    assert config.rehearsal is not None
    generation, policy, scoring, reward = cast(tuple[Any, ...], pools)
    generation.max_open_samples = config.rehearsal.engine_slots * config.rollout.samples_per_prompt
    clock = asyncio.get_running_loop().time
    with ShownRunLog(folder, config.policy.num_updates, show, clock) as log:
        began = clock() - log.elapsed_s()
        timed = Pools(generation, policy, scoring, reward, evaluator=cast(Any, None))  # nothing is held out
        await Coordinator(config, timed, _training_data(config), log, clock).run()
    booked: Booked = defaultdict(list)
    for pool in pools:
        for work in await pool.ask_all(pool.actors, "booked", deadline_s=config.deadlines.request_s):
            for kind, times in work.items():
                booked[kind] += [(start - began, amount) for start, amount in times]
    return figures(config, read_run(folder), booked)


def _training_data(config: RunConfig) -> TrainingData:
    tokens = (0,) * prompt_tokens(config)
    return TrainingData(
        prompts=ShuffledEpochs([Prompt(0, "", tokens)], seed=0),
        heldout=(),
        pairs=PairData(NUM_PAIRS, np.zeros((NUM_PAIRS, 2), dtype=np.float32), np.arange(NUM_PAIRS)),
        probe=(Sequence((0,), (0,), has_eos=True),),
    )
