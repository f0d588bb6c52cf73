"""The RL stage and what follows it: corrections, evaluation, summary, report."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ocrm_ray.config import RunConfig
from ocrm_ray.config_file import dump_yaml
from ocrm_ray.coordinator import Coordinator, TrainingData
from ocrm_ray.correction import PairData
from ocrm_ray.metrics import RunLog, StepRecord, summarise
from ocrm_ray.offline import OfflineCoordinator
from ocrm_ray.pools import Cluster, Show
from ocrm_ray.preferences import read_pairs
from ocrm_ray.progress import ProgressState
from ocrm_ray.records import EvaluationReport
from ocrm_ray.report import write_report
from ocrm_ray.stage_lock import held
from ocrm_ray.stages import Stages, shuffled_epochs
from ocrm_ray.whole_files import write_whole


class ShownRunLog(RunLog):
    """A run log that also shows each step and the figures known so far."""

    def __init__(
        self, run_dir: Path, num_updates: int, show: Show, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(run_dir, clock)
        self._state = ProgressState(stage="rl", total=num_updates, unit="updates")
        self._show = show

    def step(self, record: StepRecord) -> None:
        super().step(record)
        is_evaluated = self._state.kl is not None
        self._tell(done=record.step, proxy=self._state.proxy if is_evaluated else record.reward_mean)

    def evaluation(self, report: EvaluationReport) -> None:
        super().evaluation(report)
        self._tell(proxy=report.proxy_mean, gold=report.gold_mean, kl=report.kl_sft)

    def _tell(self, **known: Any) -> None:
        self._state = replace(self._state, **known)
        self._show(self._state)


async def run_to_the_end(config: RunConfig, cluster: Cluster, show: Show) -> dict[str, object]:
    """Every stage of a run, its summary and its report; returns the summary."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(config.run_dir / "config.yaml", [dump_yaml(config)])
    stages = Stages(config, cluster, show)
    async with held(config.stage_root):
        await stages.run()
    show(ProgressState(stage="start"))
    pools = await cluster.pools()
    with ShownRunLog(config.run_dir, config.policy.num_updates, show) as log:
        kind = OfflineCoordinator if config.policy.is_offline else Coordinator
        await kind(config, pools, training_data(config, stages), log, time.monotonic).run()
    show(ProgressState(stage="report"))
    write_report(config.run_dir)
    return summarise(config.run_dir)  # last: a run with a summary is taken for done


def training_data(config: RunConfig, stages: Stages) -> TrainingData:
    """What the stages left, as the coordinator takes it."""
    folder = stages.paths.root / "pairs"
    pairs, held_out = read_pairs(folder / "train.jsonl"), read_pairs(folder / "heldout.jsonl")
    num_tokens = [len(pair.chosen.response_ids) + len(pair.rejected.response_ids) for pair in pairs]
    probe = [sequence for pair in held_out for sequence in (pair.chosen, pair.rejected)]
    return TrainingData(
        prompts=shuffled_epochs(stages.training_prompts(), config.seed),
        heldout=tuple(stages.heldout_prompts()),
        pairs=PairData(len(pairs), stages.behaviour_logprobs(), np.array(num_tokens, dtype=np.int64)),
        probe=tuple(probe[: config.probe.num_sequences]),
    )
