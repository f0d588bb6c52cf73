"""Whole runs over fakes on a virtual clock, and what they left in their folders."""

import asyncio
import json
from pathlib import Path

import numpy as np
from fakes import FakePools, prompts
from virtual_clock import run_virtual

from ocrm_ray.checkpoints import Checkpoint
from ocrm_ray.config import RunConfig
from ocrm_ray.coordinator import Coordinator, TrainingData
from ocrm_ray.correction import PairData
from ocrm_ray.metrics import RunLog
from ocrm_ray.offline import OfflineCoordinator
from ocrm_ray.prompts import ShuffledEpochs
from ocrm_ray.records import IntArray, Sequence

NUM_PAIRS = 10
NUM_PROMPTS = 60


class InOrder(ShuffledEpochs):
    """Every epoch in the order of the prompts."""

    def _draw(self, epoch: int) -> IntArray:
        return np.arange(len(self._prompts))


async def coordinate(
    config: RunConfig,
    fakes: FakePools,
    run_dir: Path,
    saved: Checkpoint | None = None,
    num_prompts: int = 50,
    stopping: asyncio.Event | None = None,
) -> float:
    """Run to the end; returns the virtual seconds it took."""
    fakes.reward.run_dir = run_dir
    config = config.model_copy(update={"output_dir": run_dir.parent, "name": run_dir.name})
    clock = asyncio.get_running_loop().time
    logprobs = np.arange(2 * NUM_PAIRS, dtype=np.float32).reshape(-1, 2)
    data = TrainingData(
        prompts=InOrder(prompts(num_prompts), seed=0),
        heldout=prompts(3),
        pairs=PairData(NUM_PAIRS, logprobs, np.arange(NUM_PAIRS), first_accuracy=0.72),
        probe=(Sequence((1,), (2,), True),),
        saved=saved.state if saved else None,
    )
    with RunLog(run_dir, clock, saved.state.step if saved else -1) as log:
        kind = OfflineCoordinator if config.policy.is_offline else Coordinator
        await kind(config, fakes.pools(), data, log, clock).run(stopping)
    return clock()


def run(config: RunConfig, fakes: FakePools, run_dir: Path) -> float:
    return run_virtual(coordinate(config, fakes, run_dir))


def cut_off(config: RunConfig, fakes: FakePools, seconds: float, saved: Checkpoint | None = None) -> bool:
    """Run and kill the coordinator after so many virtual seconds; whether it was still running."""

    async def limited() -> bool:
        try:
            async with asyncio.timeout(seconds):
                await coordinate(config, fakes, config.run_dir, saved, NUM_PROMPTS)
        except TimeoutError:
            return True
        return False

    return bool(run_virtual(limited()))


def trained(fakes: FakePools) -> list[list[int]]:
    return [[rollout.prompt.prompt_id for rollout in batch] for _, batch in fakes.policy.updates]


def events(run_dir: Path, name: str | None = None) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if name in (None, row["event"])]


def metrics(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
