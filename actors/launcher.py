"""The driver: starts Ray and the coordinator's actor, and shows progress until it is done."""

import asyncio
import functools
import json
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeAlias

from actors.placement import COORDINATOR
from actors.ray_pool import RayPool
from actors.remote_actor import ActorSpec
from actors.session import ray_session
from actors.shared_group import alone
from ocrm_ray.config import Deadlines, RunConfig, StudyConfig
from ocrm_ray.config_file import study_runs
from ocrm_ray.progress import ProgressDisplay, ProgressState, plain_console
from ocrm_ray.study_report import study_table, write_study

NamedRun: TypeAlias = tuple[str, RunConfig]
"""A run with the name of its arm and seed; alone it has none."""


class CoordinatorPool(RayPool):
    """The one actor that holds the coordinator."""

    name = "coordinator"
    has_farewell = True


def run(config: RunConfig, resume: bool) -> str:
    """One run, to its report; returns closing words. Stages that are done are skipped.

    ``resume`` allows a folder that has RL metrics: a finished run is left as it is, another goes on from its newest
    checkpoint, or without one starts RL over.
    """
    report = config.run_dir / "report.html"
    if resume and (config.run_dir / "summary.json").exists():
        return f"this run is done\nreport: {report}"
    with ray_session(config.name) as shared_memory:
        (summary,) = _run_all([("", config)], shared_memory)
    figures = ", ".join(f"{name} {value:.4g}" for name, value in summary.items() if isinstance(value, float))
    return f"{figures}\nreport: {report}"


def run_study(study: StudyConfig, num_jobs: int = 1) -> str:
    """Every arm with every seed over shared stages, ``num_jobs`` at once; a run that has its summary is skipped.

    The report is written anew after every run. Returns the table, and where the report is.
    """
    folder = study.output_dir / study.name
    runs = [
        (f"{arm} seed {seed}", run)
        for arm, seed, run in study_runs(study, cwd=Path.cwd())
        if not (run.run_dir / "summary.json").exists()
    ]
    if runs:
        with ray_session(study.name, num_jobs) as shared_memory:
            _run_all(runs, shared_memory, lambda: write_study(folder, study), num_jobs)
    page = write_study(folder, study)
    table = study_table(json.loads((folder / "study.json").read_text(encoding="utf-8")))
    return f"{table}\nreport: {page}"


def _run_all(
    runs: Sequence[NamedRun],
    shared_memory: Path,
    report: Callable[[], object] = lambda: None,
    num_jobs: int = 1,
) -> list[dict[str, object]]:
    """The summaries of all runs, in the order in which they ended; ``report()`` after each.

    After a failure none begins, and those under way are waited for; then the first failure is raised. Ctrl-C or SIGTERM
    ends what goes on behind a step and its checkpoint, a second one now; both as KeyboardInterrupt.
    """
    try:
        outcome = asyncio.run(_share_out(runs, shared_memory, report, num_jobs))
    except asyncio.CancelledError as error:
        raise KeyboardInterrupt from error
    if outcome.failures:
        raise outcome.failures[0]
    if outcome.is_stopped:
        raise KeyboardInterrupt
    return outcome.summaries


@dataclass
class Outcome:
    """Of runs; ``is_stopped``: one was ended by a signal."""

    summaries: list[dict[str, object]] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    is_stopped: bool = False

    @property
    def is_final(self) -> bool:
        """Whether no other run is to begin."""
        return self.is_stopped or bool(self.failures)


async def _share_out(
    runs: Sequence[NamedRun], shared_memory: Path, report: Callable[[], object], num_jobs: int
) -> Outcome:
    """Give the runs to ``num_jobs`` coordinators, each of which goes on with the processes of its last run."""
    secrets = tuple(dict.fromkeys(secret for _, config in runs for secret in config.secrets))
    waiting, outcome = iter(runs), Outcome()
    lanes: list[_Lane] = []
    try:
        for _ in range(min(num_jobs, len(runs))):
            lanes.append(await _Lane.open(shared_memory, secrets, runs[0][1].deadlines, is_alone=num_jobs == 1))
        with _finished_at_the_first_signal(lambda: _finish(lanes)):
            await asyncio.gather(*(lane.work(waiting, outcome, report) for lane in lanes))
    finally:
        await asyncio.gather(*(lane.close() for lane in lanes))
    return outcome


async def _finish(lanes: "Sequence[_Lane]") -> None:
    await asyncio.gather(*(lane.finish() for lane in lanes))


@dataclass
class _Lane:
    """A coordinator's actor, which does one run after another, and the display of how far it is."""

    pool: CoordinatorPool
    display: ProgressDisplay

    @classmethod
    async def open(cls, shared_memory: Path, secrets: tuple[str, ...], deadlines: Deadlines, is_alone: bool) -> Self:
        """``is_alone``: its progress may be bars that stay; of several, lines."""
        display = ProgressDisplay() if is_alone else ProgressDisplay(plain_console())

        def tell(name: str, missing: str | None) -> None:
            display.update(ProgressState(stage="start", note=f"waiting: {missing}" if missing else ""))

        path = "actors.ray_cluster:RunActor"
        spec = ActorSpec("coordinator", path, (shared_memory,), threads=1, asynchronous=True, secrets=secrets)
        share = alone(CoordinatorPool.name, [COORDINATOR], tell)
        return cls(await CoordinatorPool.start_in(share, [spec], deadlines), display)

    async def work(self, waiting: Iterator[NamedRun], outcome: Outcome, report: Callable[[], object]) -> None:
        """What waits, until nothing does or a run, here or elsewhere, ends otherwise than it should."""

        def show(arm: str, state: ProgressState) -> None:
            self.display.update(replace(state, arm=arm or None))

        while not outcome.is_final and (run := next(waiting, None)):
            arm, config = run
            tell, deadline_s = functools.partial(show, arm), config.deadlines.request_s
            try:
                summary = await self.pool.actors[0].watch("run", config, tell=tell, deadline_s=deadline_s)
            except Exception as error:
                if arm:
                    sys.stderr.write(f"{arm} failed: {error}\n")
                outcome.failures.append(error)
                return
            if summary is None:
                outcome.is_stopped = True
                return
            outcome.summaries.append(summary)
            report()

    async def finish(self) -> None:
        await self.pool.actors[0].call("finish", deadline_s=self.pool.deadlines.request_s)

    async def close(self) -> None:
        with self.display:
            await self.pool.close()


@contextmanager
def _finished_at_the_first_signal(finish: Callable[[], Coroutine[Any, Any, None]]) -> Iterator[None]:
    """Ctrl-C, which SIGTERM is too, calls ``finish``; a second one cancels the task inside."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    asked: list[asyncio.Task[None]] = []

    def on_signal() -> None:
        if asked:
            task.cancel()
        else:
            asked.append(loop.create_task(finish()))
            sys.stderr.write("\nfinishing this update, then a checkpoint; again to end now\n")

    loop.add_signal_handler(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
