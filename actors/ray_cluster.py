"""The coordinator's process: runs the stages and RL, over actors and pools that start as they are needed."""

import asyncio
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import ray

from actors.generation import engine_environment
from actors.generation_group import RayGenerationPool
from actors.groups import RayEvaluator, RayPolicyPool, RayRewardPool, RayScoringPool
from actors.placement import log_wait, plan_groups
from actors.ray_metrics import RunMetrics
from actors.ray_pool import RayPool, together
from actors.remote_actor import ActorSpec, ranks_of
from actors.shared_group import StandingGroups
from ocrm_ray.checkpoints import Checkpoint, reward_folder
from ocrm_ray.config import RunConfig
from ocrm_ray.metrics import Observer
from ocrm_ray.networks import context_length
from ocrm_ray.pools import Pools, Show
from ocrm_ray.progress import ProgressState
from ocrm_ray.prompts import read_prompts
from ocrm_ray.records import FloatArray, GenerationRequest, RefitReport, Sample
from ocrm_ray.reinforcement import RL, run_with_restarts
from ocrm_ray.stages import stage_paths
from ocrm_ray.watchdog import StageWatch

NUM_LOGPROB_PARTS = 40
"""Messages in which the pairs' log-probs are asked for, so that progress shows."""
DETERMINISTIC = {"MKL_CBWR": "AUTO,STRICT"}
"""Else the rounding of a product depends on where in memory its factors lie, and so on the file they came from."""
PoolType = TypeVar("PoolType", bound=RayPool)


def choose_transport(config: RunConfig, num_nodes: int) -> tuple[bool, bool]:
    """Whether weights go through Ray's object store instead of shared memory, and whether engines get them by NCCL.

    With NCCL scorers still read the copy on the trainer's host.
    """
    wanted = config.publish.transport
    return wanted == "object_store" or (wanted != "shared_memory" and num_nodes > 1), config.by_nccl


def _num_nodes() -> int:
    return sum(bool(node["Alive"]) for node in ray.nodes())


class RayTrainer(RayPool):
    """The ranks that train one model before RL."""

    name = "trainer"


class RayCluster:
    """``Cluster`` over Ray actors, each pool placed as its section says.

    Engines, scorers and the evaluator that a stage started are the ones that RL goes on with.
    """

    def __init__(
        self,
        config: RunConfig,
        shared_memory: Path,
        observe: Observer,
        groups: StandingGroups,
        saved: Checkpoint | None,
    ) -> None:
        """``groups``: where the pools are. ``saved``: from which those of a resumed run go on."""
        self.observe = observe
        self.config = config
        self.saved = saved
        self.paths = stage_paths(config)
        self._groups = groups
        self._shares = groups.shares(plan_groups(config.pools))
        self._shared_memory = shared_memory
        self._started: dict[str, asyncio.Task[RayPool]] = {}

    async def train_sft(self, show: Show) -> dict[str, object]:
        arguments = self.paths.policy_base, self.paths.root / "data" / "prompts.jsonl", Path(self.paths.sft)
        num_ranks = self.config.pools.policy.num_actors
        specs = self._ranks("sft", num_ranks, "actors.sft:SftActor", "policy", *arguments)
        return {"loss": await self._train(specs, "train", "policy", show)}

    async def sample(self, request: GenerationRequest) -> tuple[Sample, ...]:
        return await (await self._generation()).generate(request)

    async def gold(self, prompts: list[str], responses: list[str], references: list[str | None]) -> list[float]:
        return await (await self._once(RayEvaluator)).gold(prompts, responses, references)

    async def train_reward(self, show: Show) -> dict[str, object]:
        specs = self._refitters("reward", None)
        report: RefitReport = await self._train(specs, "fit_first", "reward", show)
        return {"loss": report.loss, "heldout_accuracy": report.heldout_accuracy, "seconds": report.seconds}

    async def behaviour_logprobs(self, num_pairs: int, show: Show) -> FloatArray:
        scoring, parts = await self._once(RayScoringPool), []
        for indices in np.array_split(np.arange(num_pairs), min(NUM_LOGPROB_PARTS, num_pairs)):
            parts.append(await scoring.pair_logprobs(None, indices))
            num_done = sum(map(len, parts))
            show(ProgressState(stage="logprobs", done=num_done, total=num_pairs, unit="pairs"))
        return np.concatenate(parts)

    async def _train(self, specs: list[ActorSpec], method: str, pool: str, show: Show) -> Any:
        """Start the ranks, let them train, and end them; progress, told on a second thread, is shown meanwhile."""
        deadlines, stage = self.config.deadlines, specs[0].role.partition("-")[0]
        specs = [replace(spec, concurrency=2) for spec in specs]
        trainer = await RayTrainer.start_in(self._shares[pool], specs, deadlines)

        watch = StageWatch(stage, deadlines.progress_s, time.monotonic)

        def tell(progress: tuple[int, int]) -> None:
            watch.see(progress)
            show(ProgressState(stage=stage, done=progress[0], total=progress[1], unit="steps"))

        first, *others = trainer.actors
        calls = [first.watch(method, tell=tell, deadline_s=deadlines.request_s)]
        try:
            return (await together([*calls, *(other.call(method, deadline_s=None) for other in others)]))[0]
        finally:
            await trainer.close()

    async def pools(self) -> Pools:
        """All pools, started side by side."""
        generation, policy, scoring, reward, evaluator = await asyncio.gather(
            self._generation(),
            self._once(RayPolicyPool),
            self._once(RayScoringPool),
            self._once(RayRewardPool),
            self._once(RayEvaluator),
        )
        policy.before_release = generation.forget
        return Pools(generation, policy, scoring, reward, evaluator)

    async def listen(self, emit: Callable[..., None]) -> None:
        for starting in self._started.values():
            (await starting).emit = emit

    async def close(self, is_done: bool = False) -> None:
        """End every pool, also one that is only starting; where the run ``is_done``, processes stay in their groups."""
        tasks = list(self._started.values())
        for task in tasks:
            task.cancel()
        pools = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(pool.close(may_rest=is_done) for pool in pools if isinstance(pool, RayPool)))
        if not is_done:
            await self._groups.end()

    async def _once(self, kind: type[PoolType]) -> PoolType:
        """The pool of this kind, started at the first call."""
        name = kind.name
        if name not in self._started:
            self._started[name] = asyncio.create_task(self._start(kind))
        return cast(PoolType, await asyncio.shield(self._started[name]))

    async def _start(self, kind: type[RayPool]) -> RayPool:
        pool = await kind.start_in(self._shares[kind.name], self._specs(kind.name), self.config.deadlines)
        # a rank of the trainer has what no other process knows
        pool.max_replacements = 0 if kind is RayPolicyPool else self.config.faults.max_replacements
        return pool

    async def _generation(self) -> RayGenerationPool:
        pool = await self._once(RayGenerationPool)
        # a quarter more than it decodes, so that the next request is there when one ends
        pool.max_open_samples = self.config.pools.generation.max_running * 5 // 4
        return pool

    def _specs(self, pool: str) -> list[ActorSpec]:
        """The actors of a pool, one a bundle."""
        paths, run_dir, saved = self.paths, self.config.run_dir, self.saved
        match pool:
            case "generation":
                return self._engines()
            case "policy":
                reward_path = paths.reward if self.config.policy.algorithm == "ppo" else None
                through_store, by_nccl = choose_transport(self.config, _num_nodes())
                exports_dir = None if through_store else self._shared_memory
                arguments = paths.sft, reward_path, run_dir, exports_dir, by_nccl, saved.folder if saved else None
                specs = ranks_of(self._alike("actors.policy:PolicyActor", pool, *arguments))
                return [replace(spec, concurrency=4) for spec in specs]  # checkpoint and best policy are written beside
            case "scoring":
                anchor_path = saved.anchor_path if saved else None
                *scorers, background = self._alike("actors.scoring:ScoringActor", pool, paths.sft, anchor_path)
                return [*scorers, replace(background, role="ratios", yields=self._shares_cores(pool))]
            case "reward":
                live = reward_folder(run_dir, saved.state.reward_version if saved else 0, paths.reward)
                refitters = self._refitters("refit", paths.reward)
                return [*self._alike("actors.reward:RewardServer", pool, live)[: -len(refitters)], *refitters]
            case _:
                prompts = read_prompts(paths.root / "data" / "heldout.jsonl")[: self.config.evaluation.num_prompts]
                specs = self._alike("actors.evaluation:EvaluationActor", pool, paths.sft, tuple(prompts))
                return [replace(spec, concurrency=1, secrets=self.config.secrets) for spec in specs]

    def _refitters(self, role: str, reward_path: str | None) -> list[ActorSpec]:
        num_ranks, arguments = self.config.pools.reward.num_refit_ranks, (self.paths.sft, reward_path)
        path = "actors.reward:RewardRefitter"
        specs = self._ranks(role, num_ranks, path, "reward", *arguments, self.config.run_dir)
        return [replace(spec, yields=self._shares_cores("reward")) for spec in specs]

    def _ranks(self, role: str, num_ranks: int, path: str, pool: str, *arguments: Any) -> list[ActorSpec]:
        """Ranks of one process group; one alone is named by its role."""
        roles = [f"{role}-{rank}" for rank in range(num_ranks)] if num_ranks > 1 else [role]
        return ranks_of([self._spec(each, path, pool, *arguments) for each in roles])

    def _engines(self) -> list[ActorSpec]:
        pool, trust = self.config.pools.generation, self.config.trust_remote_code
        # one more than is ever generated: the probe asks for a token behind a whole sequence
        num_tokens = self.config.data.max_prompt_tokens + self.config.rollout.max_new_tokens + 1
        length = min(num_tokens, context_length(self.paths.sft, trust_remote_code=trust) or num_tokens)
        _, by_nccl = choose_transport(self.config, _num_nodes())
        path, environment = "actors.generation:GenerationActor", engine_environment(pool)
        specs = (
            self._spec(f"generation-{number}", path, "generation", number, self.paths.sft, length, by_nccl)
            for number in range(pool.num_actors)
        )
        return [replace(spec, asynchronous=True, environment={**spec.environment, **environment}) for spec in specs]

    def _alike(self, path: str, pool: str, *arguments: Any) -> list[ActorSpec]:
        """Each with a second thread, for what must not wait for a call that is long."""
        num_actors = self.config.pools.num_placed(pool)
        specs = (self._spec(f"{pool}-{number}", path, pool, *arguments) for number in range(num_actors))
        return [replace(spec, concurrency=2) for spec in specs]

    def _spec(self, role: str, path: str, pool: str, *arguments: Any) -> ActorSpec:
        threads = getattr(self.config.pools, pool).threads_per_actor
        environment = DETERMINISTIC if self.config.deterministic else {}
        return ActorSpec(role, path, (self.config, *arguments), threads, environment=environment)

    def _shares_cores(self, pool: str) -> bool:
        """Whether a correction's work would take cores from rollouts and training."""
        return getattr(self.config.pools, pool).gpus_per_actor == 0 and sys.platform == "linux"


class RunActor:
    """Runs, each from its configuration to its report: one after the other, on the same processes where it can be."""

    def __init__(self, shared_memory: Path) -> None:
        """``shared_memory``: the session's folder for weights on their way."""
        self._shared_memory = shared_memory
        self._groups = StandingGroups(self._tell_wait)
        self._state = ProgressState(stage="start")
        self._waits: dict[str, str] = {}
        self._running: asyncio.Task[dict[str, object] | None] | None = None
        self._stopping = asyncio.Event()

    async def start(self) -> None:
        """Nothing to load."""

    async def run(self, config: RunConfig) -> dict[str, object] | None:
        """A whole run; returns its summary, None if it was to ``finish``. Whatever happens, its pools are closed."""
        if self._stopping.is_set():
            return None
        self._state = ProgressState(stage="start")
        metrics = RunMetrics(str(config.run_dir))
        start = functools.partial(RayCluster, config, self._shared_memory, metrics.observe, self._groups)
        self._running = asyncio.create_task(run_with_restarts(config, start, self._show, self._stopping))
        try:
            return await self._running
        except asyncio.CancelledError:
            if not self._stopping.is_set():
                raise
            return None

    async def finish(self) -> None:
        """End RL behind the update that goes on, with a checkpoint; what is not RL ends now."""
        self._stopping.set()
        if self._state.stage != RL and self._running is not None:
            self._running.cancel()

    async def close(self) -> None:
        """End a run that goes on, and what the last one left: engines that are killed leave shared memory behind."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        await self._groups.end()

    async def progress(self) -> ProgressState:
        """Where the run is now, and what it waits for: its stages, or places of pools."""
        return replace(self._state, note="; ".join(filter(None, (self._state.note, *self._waits.values()))))

    def _tell_wait(self, group: str, missing: str | None) -> None:
        log_wait(group, missing)
        self._waits = {name: text for name, text in self._waits.items() if name != group}
        if missing is not None:
            self._waits[group] = f"waiting: {missing}"

    def _show(self, state: ProgressState) -> None:
        self._state = state
