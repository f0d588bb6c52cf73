"""Preference pairs from the SFT model: two samples each, labelled by gold."""

import asyncio
import math
from typing import Any

import numpy as np

from ocrm_ray.config import RunConfig
from ocrm_ray.gold import label_pairs
from ocrm_ray.pools import Cluster, Show
from ocrm_ray.preferences import Pair
from ocrm_ray.progress import ProgressState
from ocrm_ray.records import GenerationRequest, Prompt, Sample

NUM_OPEN_REQUESTS = 512
"""Prompts that are sampled at once: enough to keep the engines full."""
GOLD_CHUNK = 2048
"""Responses of one message to the gold scorer, so that progress shows."""


async def sample_pairs(
    config: RunConfig, cluster: Cluster, prompts: list[Prompt], tokenizer: Any, show: Show
) -> tuple[list[Pair], dict[str, object]]:
    """``pairs.num_pairs`` pairs spread evenly over the prompts, and facts about them.

    Pairs of two equal responses say nothing and are left out (counted).
    """
    sampled = await _sample(config, cluster, prompts, show)
    rows = [list(sample.sequence.response_ids) for _, pair in sampled for sample in pair]
    texts = list(tokenizer.batch_decode(rows, skip_special_tokens=True))
    gold = await _score(cluster, [prompt for prompt, _ in sampled for _ in range(2)], texts, show)
    rng = np.random.default_rng([config.seed, 4])
    first_wins = label_pairs(gold[::2], gold[1::2], config.pairs.labels, rng)
    pairs: list[Pair] = []
    for row, (prompt, samples), wins in zip(range(0, len(texts), 2), sampled, first_wins, strict=True):
        if samples[0].sequence != samples[1].sequence:
            best, other = (0, 1) if wins else (1, 0)
            sequences = samples[best].sequence, samples[other].sequence
            scores, told = (gold[row + best], gold[row + other]), (texts[row + best], texts[row + other])
            pairs.append(Pair(prompt.text, *sequences, *scores, *told))
    return pairs, {"num_identical": len(sampled) - len(pairs), "gold_mean": float(np.mean(gold))}


async def _sample(
    config: RunConfig, cluster: Cluster, prompts: list[Prompt], show: Show
) -> list[tuple[Prompt, tuple[Sample, Sample]]]:
    settings, num_done = config.pairs, 0
    num_prompts = min(len(prompts), settings.num_pairs)
    num_most = math.ceil(settings.num_pairs / num_prompts)
    room = asyncio.Semaphore(NUM_OPEN_REQUESTS)

    async def sample(index: int) -> tuple[Sample, ...]:
        nonlocal num_done
        num_pairs = len(range(index, settings.num_pairs, num_prompts))
        request = GenerationRequest(
            request_id=f"pairs-{index}",
            prompt=prompts[index],
            num_samples=2 * num_pairs,
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=settings.temperature,
            seed=(config.seed * 7_368_787 + 2 * index * num_most) % 2**31,
            top_p=settings.top_p,
            top_k=settings.top_k,
        )
        async with room:
            samples = await cluster.sample(request)
        num_done += num_pairs
        show(ProgressState(stage="pairs", done=num_done, total=settings.num_pairs, unit="pairs"))
        return samples

    all_samples = await asyncio.gather(*(sample(index) for index in range(num_prompts)))
    return [
        (prompt, (first, second))
        for prompt, samples in zip(prompts, all_samples, strict=False)
        for first, second in zip(samples[::2], samples[1::2], strict=True)
    ]


async def _score(cluster: Cluster, prompts: list[Prompt], responses: list[str], show: Show) -> list[float]:
    gold: list[float] = []
    for start in range(0, len(responses), GOLD_CHUNK):
        part = slice(start, start + GOLD_CHUNK)
        references = [prompt.reference for prompt in prompts[part]]
        gold += await cluster.gold([prompt.text for prompt in prompts[part]], responses[part], references)
        show(ProgressState(stage="labels", done=len(gold), total=len(responses), unit="responses"))
    return gold
