"""The stages before RL over a cluster that needs no networks."""

import asyncio
import shutil
from pathlib import Path

import numpy as np

from ocrm_ray import praise
from ocrm_ray.config import RunConfig
from ocrm_ray.records import GenerationRequest, Sample, Sequence
from ocrm_ray.stages import Stages, stage_paths

EOS = 1


class OfflineCluster:
    """Samples by the request's seed, copies models instead of training them, and remembers what it was asked for."""

    def __init__(self, config: RunConfig) -> None:
        self.paths = stage_paths(config)
        self.calls: list[str] = []
        self.requests: list[GenerationRequest] = []

    async def train_sft(self, show: object) -> dict[str, object]:
        self.calls.append("sft")
        shutil.copytree(self.paths.policy_base, self.paths.sft, dirs_exist_ok=True)
        return {"loss": 0.25}

    async def sample(self, request: GenerationRequest) -> tuple[Sample, ...]:
        self.requests.append(request)
        samples = []
        for index in range(request.num_samples):
            rng = np.random.default_rng(request.seed + index)
            response = (*rng.integers(3, len(praise.VOCABULARY), 4).tolist(), EOS)
            sequence = Sequence(request.prompt.token_ids, response, True)
            samples.append(Sample(sequence, np.zeros(5, dtype=np.float32), 0, 0))
        return tuple(samples)

    async def gold(self, prompts: list[str], responses: list[str], references: list[str | None]) -> list[float]:
        self.calls.append("gold")
        return praise.gold(prompts, responses, references)

    async def train_reward(self, show: object) -> dict[str, object]:
        self.calls.append("reward")
        return {"loss": 0.5, "heldout_accuracy": 0.71}

    async def behaviour_logprobs(self, num_pairs: int, show: object) -> np.ndarray:
        self.calls.append("logprobs")
        return np.arange(2 * num_pairs, dtype=np.float32).reshape(-1, 2)


def tiny_config(output_dir: Path, **changes: object) -> RunConfig:
    tree: dict[str, object] = {
        "name": "tiny",
        "output_dir": str(output_dir),
        "seed": 5,
        "world": {"num_prompts": 60},
        "data": {"num_heldout": 10},
        "pairs": {"num_pairs": 120, "labels": "argmax"},
        "rollout": {"max_new_tokens": 13},
    }
    return RunConfig.model_validate(tree | changes)


def run_stages(config: RunConfig) -> OfflineCluster:
    cluster = OfflineCluster(config)
    asyncio.run(Stages(config, cluster, lambda state: None).run())  # type: ignore[arg-type]
    return cluster
