"""The offline baselines: DPO and WPO learn from the pairs; engines only sample what is measured.

repeat for t = 1 .. num_updates:
    policy update on the next pairs
    publish and measure, if that is due
"""

import asyncio
from itertools import chain, count, islice

from ocrm_ray.coordinator import Coordinator
from ocrm_ray.metrics import StepRecord
from ocrm_ray.records import IntArray, UpdateReport
from ocrm_ray.reward_learning import epoch_batches
from ocrm_ray.step_metrics import TRAIN, of_update


class OfflineCoordinator(Coordinator):
    """The same run without rollouts, scores and corrections: budget in updates, evaluation and files are alike."""

    async def _optimise(self, tasks: asyncio.TaskGroup) -> None:
        anchor = self.data.pairs.behaviour_logprobs
        assert anchor is not None, "the pairs' log-probs under the SFT model"
        first = await self._begin(tasks)
        for step, indices in enumerate(self._batches()[first - 1 :], start=first):
            with self.step_clock.timed(TRAIN):
                update = await self.pools.policy.learn_pairs(indices, anchor[indices])
            if self.heldout.is_due(step):
                await self._publish(tasks, update.version)
            self._evaluate(tasks, step)
            self._record_update(update)
            if await self._checkpoint(tasks, step):
                return

    def _pumps(self, tasks: asyncio.TaskGroup) -> "list[asyncio.Task[None]]":
        return []

    def _batches(self) -> list[IntArray]:
        """Training pairs of every update; an epoch's last, smaller batch is one too."""
        num_pairs, policy, seed = self.data.pairs.num_training, self.config.policy, self.config.seed
        epochs = (epoch_batches(num_pairs, policy.direct.pairs_per_step, 1, seed + epoch) for epoch in count())
        return list(islice(chain.from_iterable(epochs), policy.num_updates))

    def _record_update(self, update: UpdateReport) -> None:
        fields = self.step_clock.close()
        record = StepRecord(
            step=update.version,
            time_s=self.log.elapsed_s(),
            policy_version=update.version,
            reward_version=0,
            anchor_version=0,
            **of_update(update),
            **fields,
        )
        self.watchdog.progress()
        self.log.step(record)
        self.corrector.guards.check_update(update)
