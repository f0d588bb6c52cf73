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
from collections.abc import Callable
from dataclasses import dataclass, replace

from ocrm_ray import checkpoints
from ocrm_ray.algorithm.schedule import CorrectionClock
from ocrm_ray.checkpoints import RunState
from ocrm_ray.config import RunConfig
from ocrm_ray.correction import Candidate, Corrector, PairData
from ocrm_ray.heldout import HeldoutPolicy
from ocrm_ray.metrics import RunLog
from ocrm_ray.pools import Pools
from ocrm_ray.prompts import ShuffledEpochs
from ocrm_ray.records import PolicyWeights, Prompt, Rollout, Sample, Sequence, UpdateReport
from ocrm_ray.rollout_pump import RolloutPump, rollout_numbers
from ocrm_ray.rollout_scoring import RolloutScorer, ScoreVersions
from ocrm_ray.step_metrics import TRAIN, StepClock, metered, step_record
from ocrm_ray.watchdog import Watchdog
from ocrm_ray.weight_publisher import Exported, WeightPublisher


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a run trains and is measured on; ``probe``: the sequences on which engine and trainer are compared.

    ``saved``: where a resumed run goes on; the pools are there already, but the engines have the SFT model.
    ``incarnation`` counts up when a run goes back to a checkpoint.
    """

    prompts: ShuffledEpochs
    heldout: tuple[Prompt, ...]
    pairs: PairData
    probe: tuple[Sequence, ...]
    saved: RunState | None = None
    incarnation: int = 1


class Coordinator:
    """Runs the algorithm above over any implementation of the pools: Ray actors, or fakes on a virtual clock."""

    def __init__(self, config: RunConfig, pools: Pools, data: TrainingData, log: RunLog, clock: Callable[[], float]):
        self.config = config
        self.data = data
        self.log = log
        self.pools, meters, calls = metered(pools, clock)
        rule = config.correction
        saved = self.saved = data.saved
        fresh = CorrectionClock(rule.every, rule.promote_after, rule.max_lag)
        self.correction_clock = replace(saved.clock) if saved else fresh
        self.step_clock = StepClock(clock, meters, num_deferred_corrections=self.correction_clock.num_deferred)
        live = ScoreVersions(saved.reward_version, saved.anchor_version) if saved else ScoreVersions(0, 0)
        self.scorer = RolloutScorer(self.pools.scoring, self.pools.reward, live)
        self.pump = RolloutPump(config, self.pools.generation, self.scorer, data.prompts, saved, data.incarnation)
        if saved:
            self.pump.pause()  # until the engines have the weights
        self.buffer = self.pump.buffer
        self.corrector = Corrector(config, self.pools, self.scorer, self.buffer, data.pairs, log.event)
        self.publishing: asyncio.Task[None] | None = None
        self.publisher = WeightPublisher(self.pools.generation, self.pools.policy, config.probe, log.event)
        self.heldout = HeldoutPolicy(config, self.pools, data.heldout, log, self.publisher.release)
        self.correction: asyncio.Task[Candidate | None] | None = None
        self.anchor_version: int | None = None
        """Of the weights that are held for a scorer that dies: the live anchor, once it has moved."""
        self.checkpointing: asyncio.Task[None] | None = None
        self.stopping = asyncio.Event()
        self.watchdog = Watchdog(config.deadlines.progress_s, calls)

    async def run(self, stopping: asyncio.Event | None = None) -> bool:
        """All updates, or those until ``stopping`` is set and a checkpoint behind them; whether it was all.

        Raises the first failing task's own error.
        """
        self.stopping = stopping or self.stopping
        try:
            async with asyncio.TaskGroup() as tasks:
                pumps = [*self._pumps(tasks), tasks.create_task(self.watchdog.watch())]
                await self._optimise(tasks)
                is_all = await self._finish()
                self._abandon(pumps)
        except BaseExceptionGroup as group:
            raise first_cause(group) from group
        return is_all

    def _pumps(self, tasks: asyncio.TaskGroup) -> "list[asyncio.Task[None]]":
        # two scoring pumps: the next message is with the actors before they have answered this one
        work = self.pump.issue(tasks), self.pump.score(), self.pump.score()
        return [tasks.create_task(pump) for pump in work]

    async def _optimise(self, tasks: asyncio.TaskGroup) -> None:
        first = await self._begin(tasks)
        for step in range(first, self.config.policy.num_updates + 1):
            with self.step_clock.timed("rollout_wait_s"):
                rollouts = await self.buffer.take(step - 1)
            batch = await self.scorer.refresh(rollouts)
            with self.step_clock.timed(TRAIN):
                update = await self._update(batch)
            self.corrector.on_policy.add(batch)
            await self._publish(tasks, update.version)
            await self._promote(step)
            await self._correct(tasks, step)
            self._evaluate(tasks, step)
            self._record(batch, update, rollout_numbers(rollouts))
            if await self._checkpoint(tasks, step):
                return

    async def _begin(self, tasks: asyncio.TaskGroup) -> int:
        """The first step: 1, or the one behind the checkpoint, with what was in flight there started again."""
        saved = self.saved
        if saved is None:
            await self.publisher.start(self.data.probe)
            self._evaluate(tasks, step=0)
            return 1
        await self.publisher.resume(self.data.probe, saved.probe_bound)
        self.pump.resume()
        self.corrector.on_policy.restore(saved.on_policy)
        if saved.clock.snapshot is not None:
            if saved.clock.snapshot == saved.step:
                snapshot = self.publisher.hold()
            else:
                snapshot = self.publisher.adopt(await self.pools.policy.saved_snapshot())
            self.correction = tasks.create_task(self.corrector.prepare(snapshot))
            if self.correction_clock.may_promote(saved.step + 1):
                self.corrector.near()
        return saved.step + 1

    async def _update(self, batch: list[Rollout]) -> UpdateReport:
        """Engines that share the trainer's GPUs sleep meanwhile; held-out samples are finished before."""
        if not self.config.pools.generation.sleeps:
            return await self.pools.policy.update(batch)
        if self.heldout.sampling is not None:
            await asyncio.wait([self.heldout.sampling])
        await self.pools.generation.sleep()
        update = await self.pools.policy.update(batch)
        await self.pools.generation.wake()
        return update

    async def _finish(self) -> bool:
        is_all = not self.stopping.is_set() or self.log.last_step == self.config.policy.num_updates
        if is_all:
            await self.pools.policy.save("policy")
        await self.heldout.finish()
        if self.checkpointing is not None:
            await asyncio.wait([self.checkpointing])
        return is_all

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
            if self.config.deterministic:
                await self.heldout.finish()  # an evaluation is of the pair that was live when it began
            candidate = self.correction.result()
            lag_steps = self.correction_clock.finish(step)
            await self.corrector.commit(candidate, step, lag_steps)
            await self._release_snapshot(step - lag_steps, candidate)
            self.correction = None
        elif self.correction_clock.may_promote(step + 1):
            self.corrector.near()

    async def _release_snapshot(self, version: int, candidate: Candidate | None) -> None:
        """Nobody reads the snapshot any more, unless it has become the anchor."""
        freed: int | None = version
        if candidate is not None and self.config.correction.kl_reference == "moving":
            freed, self.anchor_version = self.anchor_version, version
        if freed is not None:
            await self.publisher.release(freed)

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

    def _record(self, batch: list[Rollout], update: UpdateReport, numbers: tuple[int, ...]) -> None:
        fields = self.step_clock.close(
            straggler_wait_s=self.buffer.straggler_wait_s,
            num_reissued=self.buffer.num_reissued,
            num_rescored_late=self.scorer.num_rescored_late,
            num_deferred_corrections=self.correction_clock.num_deferred,
        )
        self.watchdog.progress()
        fields["rollouts"] = numbers
        self.log.step(step_record(self.log.elapsed_s(), self.scorer.live, batch, update, fields))
        self.corrector.guards.check_update(update)

    async def _checkpoint(self, tasks: asyncio.TaskGroup, step: int) -> bool:
        """Copy out what a checkpoint of pi_step holds, if one is due; it is written beside the next updates.

        Returns whether there are none, since the run is to stop here.
        """
        is_last = self.stopping.is_set()
        if step == self.config.policy.num_updates or (step % self.config.checkpoint.every and not is_last):
            return False
        if self.checkpointing is not None:
            await asyncio.wait([self.checkpointing])
        version = self.correction_clock.snapshot
        snapshot = None if version in (None, step) else self.publisher.hold(version)
        await asyncio.gather(self.pools.policy.capture(), self.pools.scoring.capture())
        writing = self._write(self._state(step), snapshot, self.heldout.measuring)
        self.checkpointing = tasks.create_task(writing)
        return is_last

    def _state(self, step: int) -> RunState:
        live = self.scorer.live
        return RunState(
            step=step,
            reward_version=live.reward_version,
            anchor_version=live.anchor_version,
            clock=replace(self.correction_clock),
            num_issued=self.pump.num_issued,
            outstanding=self.pump.outstanding,
            probe_bound=self.publisher.bound,
            on_policy=self.corrector.on_policy.state,
        )

    async def _write(
        self, state: RunState, snapshot: PolicyWeights | None, measuring: "asyncio.Task[None] | None"
    ) -> None:
        """``measuring``: the evaluation that the checkpoint's step may have; it would be missing later on."""
        folder = checkpoints.begin(self.config.run_dir, state.step)
        trainer = self.pools.policy.write_checkpoint(folder, snapshot)
        written, _ = await asyncio.gather(trainer, self.pools.scoring.write_anchor(folder, state.anchor_version))
        if snapshot is not None:
            await self.publisher.release(snapshot.version)
        if measuring is not None:
            await asyncio.wait([measuring])
        # where a scorer in place of a dead one finds the anchor that this run began with
        origin = self.saved.step if self.saved and self.saved.anchor_version else None
        num_kept = self.config.checkpoint.num_kept
        await asyncio.to_thread(checkpoints.finish, folder, state, written, num_kept, origin)
        self.log.event("checkpoint_saved", step=state.step)

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
