"""The coordinator: RLHF in which the reward model follows the policy. It sees four pools and nothing of Ray.

    repeat for t = 1 .. num_updates:
        take a batch of scored rollouts, at most S versions old
        policy update                                   pi_v -> pi_v+1
        publish pi_v+1 to the engines                   beside the next update; running requests go on
        promote a finished correction, if there is one  RM, calibration, anchor and critic together
        start a correction if t is a multiple of k      ratios -> weights -> refit -> staged, beside all this

These tasks run for the whole run: the rollout pump (waits for a free slot of the buffer, unblocked by a publish), two
scoring pumps (wait for finished rollouts), and the loop above, which is finite and ends the others. A publish and a
correction are tasks of their own. The death of any of them ends the run with that task's own error.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ocrm_ray.algorithm.schedule import CorrectionClock
from ocrm_ray.config import RunConfig
from ocrm_ray.correction import Candidate, Corrector, PairData
from ocrm_ray.heldout import HeldoutPolicy
from ocrm_ray.metrics import RunLog
from ocrm_ray.pools import Pools
from ocrm_ray.records import PolicyWeights, Prompt, Rollout, Sample, Sequence, UpdateReport
from ocrm_ray.rollout_pump import RolloutPump
from ocrm_ray.rollout_scoring import RolloutScorer, ScoreVersions
from ocrm_ray.step_metrics import TRAIN, StepClock, metered, step_record
from ocrm_ray.weight_publisher import Exported, WeightPublisher


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a run trains and is measured on; ``probe``: the sequences on which engine and trainer are compared."""

    prompts: Iterator[Prompt]
    heldout: tuple[Prompt, ...]
    pairs: PairData
    probe: tuple[Sequence, ...]


class Coordinator:
    """Runs the algorithm above over any implementation of the pools: Ray actors, or fakes on a virtual clock."""

    def __init__(self, config: RunConfig, pools: Pools, data: TrainingData, log: RunLog, clock: Callable[[], float]):
        self.config = config
        self.data = data
        self.log = log
        self.pools, meters = metered(pools, clock)
        self.step_clock = StepClock(clock, meters)
        rule = config.correction
        self.correction_clock = CorrectionClock(rule.every, rule.promote_after, rule.max_lag)
        self.scorer = RolloutScorer(self.pools.scoring, self.pools.reward, ScoreVersions(0, 0))
        self.pump = RolloutPump(config, self.pools.generation, self.scorer, data.prompts)
        self.buffer = self.pump.buffer
        self.corrector = Corrector(config, self.pools, self.scorer, self.buffer, data.pairs, log.event)
        self.publishing: asyncio.Task[None] | None = None
        self.publisher = WeightPublisher(self.pools.generation, self.pools.policy, config.probe, log.event)
        self.heldout = HeldoutPolicy(config, self.pools, data.heldout, log, self.publisher.release)
        self.correction: asyncio.Task[Candidate | None] | None = None

    async def run(self) -> None:
        """All updates. Raises the first failing task's own error."""
        try:
            async with asyncio.TaskGroup() as tasks:
                pumps = self._pumps(tasks)
                await self._optimise(tasks)
                self._abandon(pumps)
        except BaseExceptionGroup as group:
            raise first_cause(group) from group

    def _pumps(self, tasks: asyncio.TaskGroup) -> "list[asyncio.Task[None]]":
        # two scoring pumps: the next message is with the actors before they have answered this one
        work = self.pump.issue(tasks), self.pump.score(), self.pump.score()
        return [tasks.create_task(pump) for pump in work]

    async def _optimise(self, tasks: asyncio.TaskGroup) -> None:
        await self.publisher.start(self.data.probe)
        self._evaluate(tasks, step=0)
        for step in range(1, self.config.policy.num_updates + 1):
            with self.step_clock.timed("rollout_wait_s"):
                rollouts = await self.buffer.take(step - 1)
            batch = await self.scorer.refresh(rollouts)
            with self.step_clock.timed(TRAIN):
                update = await self.pools.policy.update(batch)
            self.corrector.on_policy.add(batch)
            await self._publish(tasks, update.version)
            await self._promote(step)
            await self._correct(tasks, step)
            self._evaluate(tasks, step)
            self._record(batch, update)
            await self._checkpoint(step)
        await self.pools.policy.save("policy")
        await self.heldout.finish()

    async def _publish(self, tasks: asyncio.TaskGroup, version: int) -> None:
        """Copy pi_v+1 out; engines take it beside the next update, once they have the version before."""
        with self.step_clock.timed("publish_wait_s"):
            exported = await self.publisher.export()
            assert exported.weights.version == version
            if self.publishing is not None:
                await asyncio.wait([self.publishing])
        self.publishing = tasks.create_task(self._put_live(exported, self.heldout.sampling))

    async def _put_live(self, exported: Exported, sampling: "asyncio.Task[list[tuple[Sample, ...]]] | None") -> None:
        """Between tokens of running requests; a held-out evaluation of an earlier version is sampled to its end."""
        if sampling is not None:
            await asyncio.wait([sampling])
        await self.publisher.put_live(exported)
        await self.buffer.publish(exported.weights.version)

    async def _promote(self, step: int) -> None:
        """Between two updates: a prepared correction goes live; wait for it only where the configuration says so."""
        if self.correction is None:
            return
        if self.correction_clock.must_promote(step):
            with self.step_clock.timed("correction_wait_s"):
                await asyncio.wait([self.correction])
        if self.correction.done() and self.correction_clock.may_promote(step):
            candidate = self.correction.result()
            lag_steps = self.correction_clock.finish(step)
            await self.corrector.commit(candidate, step, lag_steps)
            await self.publisher.release(step - lag_steps)
            self.correction = None
        elif self.correction_clock.may_promote(step + 1):
            self.corrector.near()

    async def _correct(self, tasks: asyncio.TaskGroup, step: int) -> None:
        """Start a correction for pi_step if one is due and none is in flight; ``blocking`` also ends it here."""
        is_last = step == self.config.policy.num_updates
        if is_last or not self.correction_clock.should_start(step):
            return
        self.correction_clock.start(step)
        snapshot: PolicyWeights = self.publisher.hold()
        self.correction = tasks.create_task(self.corrector.prepare(snapshot))
        if self.correction_clock.may_promote(step + 1):
            self.corrector.near()
        if self.config.correction.schedule == "blocking":
            self.pump.pause()
            with self.step_clock.timed("correction_wait_s"):
                await asyncio.wait([self.correction])
            await self._promote(step)
            self.pump.resume()

    def _evaluate(self, tasks: asyncio.TaskGroup, step: int) -> None:
        """Sample and measure pi_step on held-out prompts, if that is due; its line in the metrics waits for it."""
        if self.heldout.is_due(step):
            self.log.hold(step)
            self.heldout.begin(tasks, step, self.publisher.hold() if step > 0 else None, self.publishing)

    def _record(self, batch: list[Rollout], update: UpdateReport) -> None:
        fields = self.step_clock.close(
            straggler_wait_s=self.buffer.straggler_wait_s,
            num_reissued=self.buffer.num_reissued,
            num_rescored_late=self.scorer.num_rescored_late,
            num_deferred_corrections=self.correction_clock.num_deferred,
        )
        self.log.step(step_record(self.log.elapsed_s(), self.scorer.live, batch, update, fields))
        self.corrector.guards.check_update(update)

    async def _checkpoint(self, step: int) -> None:
        if step % self.config.checkpoint.every == 0 and step < self.config.policy.num_updates:
            await self.pools.policy.save(f"checkpoints/step-{step}")
            self.log.event("checkpoint_saved", step=step)

    def _abandon(self, pumps: list["asyncio.Task[None]"]) -> None:
        """The last update is done: end what would go on for ever."""
        for task in [*pumps, *self.pump.requests, *([self.correction] if self.correction else [])]:
            task.cancel()


def first_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that came first in a group of failed tasks: what ended the run."""
    cause: BaseException = group
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return cause
