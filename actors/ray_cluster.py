"""The stages' cluster over Ray: starts the actors that a stage needs, and the pools of RL."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import ray

from actors.generation import engine_environment
from actors.generation_group import RayGenerationPool
from actors.groups import RayEvaluator, RayPolicyPool, RayRewardPool, RayScoringPool
from actors.placement import Bundle, plan_bundles
from actors.ray_pool import RayPool
from actors.remote_actor import ActorSpec
from ocrm_ray.cluster import Show
from ocrm_ray.config import Pool, RunConfig
from ocrm_ray.networks import context_length
from ocrm_ray.pools import Pools
from ocrm_ray.progress import ProgressState
from ocrm_ray.prompts import read_prompts
from ocrm_ray.records import FloatArray, GenerationRequest, RefitReport, Sample
from ocrm_ray.stages import stage_paths

PROGRESS_S = 1.0
NUM_LOGPROB_PARTS = 40
"""Messages in which the pairs' log-probs are asked for, so that progress shows."""
PoolType = TypeVar("PoolType", bound=RayPool)


def choose_transport(config: RunConfig, num_nodes: int) -> tuple[bool, bool]:
    """Whether weights go through Ray's object store instead of shared memory, and whether engines get them by NCCL.

    With NCCL, which needs whole GPUs, scorers still read the copy on the trainer's host.
    """
    wanted, pools = config.publish.transport, config.pools
    whole_gpus = min(pools.policy.gpus_per_actor, pools.generation.gpus_per_actor) >= 1
    by_nccl = wanted == "nccl" or (wanted == "auto" and whole_gpus)
    return wanted == "object_store" or (wanted != "shared_memory" and num_nodes > 1), by_nccl


def _num_nodes() -> int:
    return sum(bool(node["Alive"]) for node in ray.nodes())


class RayTrainer(RayPool):
    """One actor that trains one model before RL."""

    name = "trainer"


class RayCluster:
    """``Cluster`` over Ray actors, each pool in a placement group of its own.

    Engines, scorers and the evaluator that a stage started are the ones that RL goes on with.
    """

    def __init__(self, config: RunConfig, shared_memory: Path) -> None:
        self.config = config
        self.paths = stage_paths(config)
        self.bundles = plan_bundles(config.pools)
        self._deadlines = config.deadlines
        self._shared_memory = shared_memory
        self._started: dict[str, asyncio.Task[RayPool]] = {}

    async def train_sft(self, show: Show) -> None:
        prompts, folder = self.paths.root / "data" / "prompts.jsonl", Path(self.paths.sft)
        pool, base = self.config.pools.policy, self.paths.policy_base
        spec = self._spec("sft", "actors.sft:SftActor", pool, base, prompts, folder)
        await self._train(spec, "train", self.bundles["policy"][:1], show)

    async def sample(self, request: GenerationRequest) -> tuple[Sample, ...]:
        return await (await self._generation()).generate(request)

    async def gold(self, prompts: list[str], responses: list[str], references: list[str | None]) -> list[float]:
        return await (await self._evaluator()).gold(prompts, responses, references)

    async def train_reward(self, show: Show) -> dict[str, object]:
        report: RefitReport = await self._train(
            replace(self._refitter(None), role="reward"), "fit_first", self.bundles["reward"][:1], show
        )
        return {"loss": report.loss, "heldout_accuracy": report.heldout_accuracy, "seconds": report.seconds}

    async def behaviour_logprobs(self, num_pairs: int, show: Show) -> FloatArray:
        scoring, parts = await self._scoring(), []
        for indices in np.array_split(np.arange(num_pairs), min(NUM_LOGPROB_PARTS, num_pairs)):
            parts.append(await scoring.pair_logprobs(None, indices))
            num_done = sum(map(len, parts))
            show(ProgressState(stage="logprobs", done=num_done, total=num_pairs, unit="pairs"))
        return np.concatenate(parts)

    async def _train(self, spec: ActorSpec, method: str, bundles: list[Bundle], show: Show) -> Any:
        """Start an actor, let it train, and end it; its progress, told on a second thread, is shown meanwhile."""
        trainer = await RayTrainer.start([replace(spec, concurrency=2)], bundles, self._deadlines)
        actor = trainer.actors[0]
        try:
            training = asyncio.ensure_future(actor.call(method, deadline_s=None))
            while not training.done():
                await asyncio.wait({training}, timeout=PROGRESS_S)
                done, total = await actor.call("progress", deadline_s=self._deadlines.request_s)
                show(ProgressState(stage=spec.role, done=done, total=total, unit="steps"))
            return await training
        finally:
            await trainer.close()

    async def pools(self) -> Pools:
        """All pools, started side by side."""
        generation, policy, scoring, reward, evaluator = await asyncio.gather(
            self._generation(), self._policy(), self._scoring(), self._reward(), self._evaluator()
        )
        return Pools(generation, policy, scoring, reward, evaluator)

    async def close(self) -> None:
        """End every pool, also one that is only starting."""
        tasks = list(self._started.values())
        for task in tasks:
            task.cancel()
        pools = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(pool.close() for pool in pools if isinstance(pool, RayPool)))

    async def _once(self, kind: type[PoolType], specs: Callable[[], list[ActorSpec]]) -> PoolType:
        """The pool of this kind, started at the first call."""
        if kind.name not in self._started:
            starting: Awaitable[RayPool] = kind.start(specs(), self.bundles[kind.name], self._deadlines)
            self._started[kind.name] = asyncio.ensure_future(starting)
        return cast(PoolType, await asyncio.shield(self._started[kind.name]))

    async def _generation(self) -> RayGenerationPool:
        pool = await self._once(RayGenerationPool, self._generation_specs)
        # a quarter more than it decodes, so that the next request is there when one ends
        pool.max_open_samples = self.config.pools.generation.max_running * 5 // 4
        return pool

    async def _policy(self) -> RayPolicyPool:
        reward_path = self.paths.reward if self.config.policy.algorithm == "ppo" else None
        through_store, by_nccl = choose_transport(self.config, _num_nodes())
        exports_dir = None if through_store else self._shared_memory
        arguments = (self.paths.sft, reward_path, self.config.run_dir, exports_dir, by_nccl)
        return await self._once(
            RayPolicyPool,
            lambda: self._specs("policy", "actors.policy:PolicyActor", self.config.pools.policy, *arguments),
        )

    async def _scoring(self) -> RayScoringPool:
        pool = self.config.pools.scoring

        def specs() -> list[ActorSpec]:
            *scorers, background = self._specs("scoring", "actors.scoring:ScoringActor", pool, self.paths.sft)
            return [*scorers, replace(background, role="ratios", yields=_shares_cores(pool))]

        return await self._once(RayScoringPool, specs)

    async def _reward(self) -> RayRewardPool:
        pool = self.config.pools.reward
        return await self._once(
            RayRewardPool,
            lambda: [
                *self._specs("reward", "actors.reward:RewardServer", pool, self.paths.reward)[:-1],
                self._refitter(self.paths.reward),
            ],
        )

    async def _evaluator(self) -> RayEvaluator:
        prompts = read_prompts(self.paths.root / "data" / "heldout.jsonl")[: self.config.evaluation.num_prompts]
        path, pool = "actors.evaluation:EvaluationActor", self.config.pools.evaluation
        return await self._once(
            RayEvaluator, lambda: self._specs("evaluation", path, pool, self.paths.sft, tuple(prompts))
        )

    def _refitter(self, reward_path: str | None) -> ActorSpec:
        pool = self.config.pools.reward
        spec = self._spec(
            "refit", "actors.reward:RewardRefitter", pool, self.paths.sft, reward_path, self.config.run_dir
        )
        return replace(spec, yields=_shares_cores(pool))

    def _generation_specs(self) -> list[ActorSpec]:
        pool, trust = self.config.pools.generation, self.config.trust_remote_code
        # one more than is ever generated: the probe asks for a token behind a whole sequence
        num_tokens = self.config.data.max_prompt_tokens + self.config.rollout.max_new_tokens + 1
        length = min(num_tokens, context_length(self.paths.sft, trust_remote_code=trust) or num_tokens)
        _, by_nccl = choose_transport(self.config, _num_nodes())
        return [
            ActorSpec(
                role=f"generation-{number}",
                path="actors.generation:GenerationActor",
                arguments=(self.config, number, self.paths.sft, length, by_nccl),
                threads=pool.threads_per_actor,
                asynchronous=True,
                environment=engine_environment(pool),
            )
            for number in range(pool.num_actors)
        ]

    def _specs(self, pool_name: str, path: str, pool: Pool, *arguments: Any) -> list[ActorSpec]:
        """One spec a bundle of the pool; most have a second thread, for what must not wait for a call that is long."""
        concurrency = 1 if pool_name == "evaluation" else 2
        return [
            replace(self._spec(f"{pool_name}-{number}", path, pool, *arguments), concurrency=concurrency)
            for number in range(len(self.bundles[pool_name]))
        ]

    def _spec(self, role: str, path: str, pool: Pool, *arguments: Any) -> ActorSpec:
        return ActorSpec(role, path, (self.config, *arguments), pool.threads_per_actor)


def _shares_cores(pool: Pool) -> bool:
    """Whether a correction's work would take cores from rollouts and training."""
    return pool.gpus_per_actor == 0 and sys.platform == "linux"
