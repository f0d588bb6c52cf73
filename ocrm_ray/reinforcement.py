"""The RL stage and what follows it: corrections, evaluation, summary, report."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ocrm_ray.checkpoints import Checkpoint, forget_unsaved, newest
from ocrm_ray.config import RunConfig
from ocrm_ray.config_file import dump_yaml
from ocrm_ray.coordinator import Coordinator, TrainingData
from ocrm_ray.correction import PairData
from ocrm_ray.errors import ActorDiedError, DeadlineError
from ocrm_ray.metrics import RunLog, StepRecord, summarise
from ocrm_ray.offline import OfflineCoordinator
from ocrm_ray.pools import Cluster, Show
from ocrm_ray.preferences import read_pairs
from ocrm_ray.progress import ProgressState
from ocrm_ray.prompts import ShuffledEpochs
from ocrm_ray.records import EvaluationReport
from ocrm_ray.report import write_report
from ocrm_ray.run_lease import run_lease
from ocrm_ray.stage_lock import held
from ocrm_ray.stages import Stages
from ocrm_ray.whole_files import write_whole

RL = "rl"
"""The stage in which a run can be stopped without loss."""


class ShownRunLog(RunLog):
    """A run log that also shows each step and the figures known so far."""

    def __init__(
        self,
        run_dir: Path,
        num_updates: int,
        show: Show,
        clock: Callable[[], float] = time.monotonic,
        last_step: int = -1,
    ) -> None:
        super().__init__(run_dir, clock, last_step)
        self._state = ProgressState(stage=RL, total=num_updates, unit="updates")
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


async def run_with_restarts(
    config: RunConfig, start: Callable[[Checkpoint | None], Cluster], show: Show, stopping: asyncio.Event
) -> dict[str, object] | None:
    """``run_to_the_end`` over a cluster from ``start``; after the death of a process over another one, from the newest
    checkpoint, at most ``faults.max_restarts`` times. Whatever happens, the cluster is closed.

    UserError, before anything is written, where another run is alive in the folder.
    """
    restarts: list[str] = []
    config.run_dir.mkdir(parents=True, exist_ok=True)
    async with run_lease(config.run_dir, config.lease):
        while True:
            forget_unsaved(config.run_dir)
            cluster, summary = start(newest(config.run_dir)), None
            try:
                summary = await run_to_the_end(config, cluster, show, stopping, restarts)
                return summary
            except (ActorDiedError, DeadlineError) as error:
                if len(restarts) == config.faults.max_restarts:
                    raise
                restarts.append(str(error))
            finally:
                await cluster.close(is_done=summary is not None)


async def run_to_the_end(
    config: RunConfig, cluster: Cluster, show: Show, stopping: asyncio.Event, restarts: Sequence[str] = ()
) -> dict[str, object] | None:
    """Every stage of a run, its summary and its report; returns the summary. ``restarts``: why there were any.

    Where ``stopping`` is set during RL, it ends behind the update that goes on, with a checkpoint; None then.
    """
    write_whole(config.run_dir / "config.yaml", [dump_yaml(config)])
    stages = Stages(config, cluster, show)
    async with held(config.stage_root, show):
        await stages.run()
    show(ProgressState(stage="start"))
    pools = await cluster.pools()
    saved = cluster.saved
    last_step = saved.state.step if saved else -1
    with ShownRunLog(config.run_dir, config.policy.num_updates, show, last_step=last_step) as log:
        log.observe = cluster.observe
        if saved or restarts:
            checkpoint = {"checkpoint": saved.folder.name, "refused": saved.refused} if saved else {}
            log.event("resumed", step=max(last_step, 0), restarts=restarts, **checkpoint)
        await cluster.listen(log.event)
        kind = OfflineCoordinator if config.policy.is_offline else Coordinator
        data = training_data(config, stages, saved, len(restarts) + 1)
        if not await kind(config, pools, data, log, time.monotonic).run(stopping):
            return None
    show(ProgressState(stage="report"))
    write_report(config.run_dir)
    return summarise(config.run_dir)  # last: a run with a summary is taken for done


def training_data(config: RunConfig, stages: Stages, saved: Checkpoint | None, incarnation: int) -> TrainingData:
    """What the stages left, as the coordinator takes it."""
    folder = stages.paths.root / "pairs"
    pairs, held_out = read_pairs(folder / "train.jsonl"), read_pairs(folder / "heldout.jsonl")
    num_tokens = [len(pair.chosen.response_ids) + len(pair.rejected.response_ids) for pair in pairs]
    probe = [sequence for pair in held_out for sequence in (pair.chosen, pair.rejected)]
    return TrainingData(
        prompts=ShuffledEpochs(stages.training_prompts(), config.seed),
        heldout=tuple(stages.heldout_prompts()),
        pairs=PairData(
            len(pairs), stages.behaviour_logprobs(), np.array(num_tokens, dtype=np.int64), stages.first_accuracy()
        ),
        probe=tuple(probe[: config.probe.num_sequences]),
        saved=saved.state if saved else None,
        incarnation=incarnation,
    )
