"""The policy on held-out prompts: sampled at one exact version, measured beside the next updates."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise

from ocrm_ray.config import RunConfig
from ocrm_ray.metrics import RunLog
from ocrm_ray.pools import Pools
from ocrm_ray.records import GenerationRequest, PolicyWeights, Prompt, Sample

HELDOUT_PRIORITY = -1
"""Before rollouts: the next publish waits for them."""


@dataclass(eq=False)
class HeldoutPolicy:
    """``begin`` once a publish is on its way; the next one waits for ``sampling``, so that no sample mixes versions.

    ``release(version)`` gives back the weights that ``begin`` was handed.
    """

    config: RunConfig
    pools: Pools
    prompts: tuple[Prompt, ...]
    log: RunLog
    release: Callable[[int], Awaitable[None]]

    def __post_init__(self) -> None:
        self.settings = self.config.evaluation
        self.prompts = self.prompts[: self.settings.num_prompts]
        self.sampling: asyncio.Task[list[tuple[Sample, ...]]] | None = None
        self.measuring: asyncio.Task[None] | None = None
        self._best_gold = self.log.best_gold

    def is_due(self, step: int) -> bool:
        """Before the first update, every so many, and after the last; never without held-out prompts."""
        return bool(self.prompts) and (step % self.settings.every == 0 or step == self.config.policy.num_updates)

    def begin(
        self,
        tasks: asyncio.TaskGroup,
        step: int,
        weights: PolicyWeights | None,
        publishing: "asyncio.Task[None] | None",
    ) -> None:
        """Evaluate the version that ``publishing`` puts live, whose ``weights`` are held; None for the SFT model."""
        self.sampling = tasks.create_task(self._sample(publishing))
        self.measuring = tasks.create_task(self._measure(step, self.sampling, weights, self.measuring))

    async def finish(self) -> None:
        """Wait for the latest evaluation."""
        if self.measuring is not None:
            await asyncio.wait([self.measuring])

    async def _sample(self, publishing: "asyncio.Task[None] | None") -> list[tuple[Sample, ...]]:
        """The same prompts and seeds every time; the first ``num_pair_prompts`` get two samples."""
        if publishing is not None:
            await asyncio.wait([publishing])
        rollout = self.config.rollout
        requests = [
            GenerationRequest(
                request_id=f"heldout-{index}",
                prompt=prompt,
                num_samples=2 if index < self.settings.num_pair_prompts else 1,
                max_new_tokens=rollout.max_new_tokens,
                temperature=rollout.temperature,
                seed=2 * index + 1,
                top_p=rollout.top_p,
                top_k=rollout.top_k,
                priority=HELDOUT_PRIORITY,
            )
            for index, prompt in enumerate(self.prompts)
        ]
        return list(await asyncio.gather(*(self.pools.generation.generate(request) for request in requests)))

    async def _measure(
        self,
        step: int,
        sampling: "asyncio.Task[list[tuple[Sample, ...]]]",
        weights: PolicyWeights | None,
        previous: "asyncio.Task[None] | None",
    ) -> None:
        samples = await sampling
        sequences = [sample.sequence for prompt_samples in samples for sample in prompt_samples]
        (anchor, sft), proxy = await asyncio.gather(
            self.pools.scoring.score(sequences, ("live", "sft")), self.pools.reward.score(sequences)
        )
        if previous is not None:
            await asyncio.wait([previous])
        bounds = list(pairwise(accumulate(map(len, samples), initial=0)))
        report, rows = await self.pools.evaluator.evaluate(
            step,
            samples,
            [proxy[a:b] for a, b in bounds],
            [sft[a:b] for a, b in bounds],
            [anchor[a:b] for a, b in bounds],
        )
        self.log.evaluation(report)
        self.log.samples(rows)
        if report.judge is not None:
            self.log.event("judged", step=step, **asdict(report.judge))
        if weights is None:
            return
        if report.gold_mean is not None and report.gold_mean > self._best_gold:
            self._best_gold = report.gold_mean
            await self.pools.policy.save("policy-best", weights)
        await self.release(weights.version)
