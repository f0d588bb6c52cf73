"""The RL stage and what follows it: corrections, evaluation, summary, report."""

import time
from collections.abc import Callable
from pathlib import Path

from ocrm_ray.config import RunConfig
from ocrm_ray.config_file import dump_yaml
from ocrm_ray.coordinator import Coordinator, TrainingData
from ocrm_ray.correction import PairData
from ocrm_ray.metrics import RunLog, StepRecord, summarise
from ocrm_ray.pools import Cluster, Show
from ocrm_ray.preferences import read_pairs
from ocrm_ray.progress import ProgressState
from ocrm_ray.records import EvaluationReport
from ocrm_ray.report import write_report
from ocrm_ray.stages import Stages, shuffled_epochs


class ShownRunLog(RunLog):
    """A run log that also shows each step and the figures known so far."""

    def __init__(
        self, run_dir: Path, num_updates: int, show: Show, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(run_dir, clock)
        self._num_updates = num_updates
        self._show = show
        self._step = 0
        self._reward_mean: float | None = None
        self._latest: EvaluationReport | None = None

    def step(self, record: StepRecord) -> None:
        super().step(record)
        self._step, self._reward_mean = record.step, record.reward_mean
        self._refresh()

    def evaluation(self, report: EvaluationReport) -> None:
        super().evaluation(report)
        self._latest = report
        self._refresh()

    def _refresh(self) -> None:
        latest = self._latest
        self._show(
            ProgressState(
                stage="rl",
                done=self._step,
                total=self._num_updates,
                unit="updates",
                proxy=latest.proxy_mean if latest else self._reward_mean,
                gold=latest.gold_mean if latest else None,
                kl=latest.kl_sft if latest else None,
            )
        )


async def run_to_the_end(config: RunConfig, cluster: Cluster, show: Show) -> dict[str, object]:
    """Every stage of a run, its summary and its report; returns the summary."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(dump_yaml(config))
    stages = Stages(config, cluster, show)
    await stages.run()
    show(ProgressState(stage="start"))
    pools = await cluster.pools()
    with ShownRunLog(config.run_dir, config.policy.num_updates, show) as log:
        await Coordinator(config, pools, training_data(config, stages), log, time.monotonic).run()
    summary = summarise(config.run_dir)
    show(ProgressState(stage="report"))
    write_report(config.run_dir)
    return summary


def training_data(config: RunConfig, stages: Stages) -> TrainingData:
    """What the stages left, as the coordinator takes it."""
    held_out = read_pairs(stages.paths.root / "pairs" / "heldout.jsonl")
    probe = [sequence for pair in held_out for sequence in (pair.chosen, pair.rejected)]
    return TrainingData(
        prompts=shuffled_epochs(stages.training_prompts(), config.seed),
        heldout=tuple(stages.heldout_prompts()),
        pairs=PairData(stages.num_training_pairs(), stages.behaviour_logprobs()),
        probe=tuple(probe[: config.probe.num_sequences]),
    )
