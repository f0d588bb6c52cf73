"""The driver: starts Ray and the coordinator's actor, and shows progress until it is done."""

import asyncio
import functools
import json
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.placement import COORDINATOR
from actors.ray_pool import RayPool
from actors.remote_actor import ActorSpec
from actors.session import ray_session
from actors.shared_group import alone
from ocrm_ray.config import RunConfig, StudyConfig
from ocrm_ray.config_file import study_runs
from ocrm_ray.progress import ProgressDisplay, ProgressState
from ocrm_ray.study_jobs import run_side_by_side
from ocrm_ray.study_report import study_table, write_study


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
    with ray_session(config.name) as shared_memory, ProgressDisplay() as display:
        (summary,) = _run_in_turn([("", config)], shared_memory, display)
    figures = ", ".join(f"{name} {value:.4g}" for name, value in summary.items() if isinstance(value, float))
    return f"{figures}\nreport: {report}"


def run_study(study: StudyConfig, num_jobs: int = 1) -> str:
    """Every arm with every seed over shared stages, ``num_jobs`` at once; a run that has its summary is skipped.

    The report is written anew after every run. Returns the table, and where the report is.
    """
    folder = study.output_dir / study.name
    runs = [run for run in study_runs(study, cwd=Path.cwd()) if not (run[2].run_dir / "summary.json").exists()]
    if num_jobs > 1:
        run_side_by_side(runs, num_jobs, lambda: write_study(folder, study))
    elif runs:
        with ray_session(study.name) as shared_memory, ProgressDisplay() as display:
            named = [(f"{arm} seed {seed}", config) for arm, seed, config in runs]
            _run_in_turn(named, shared_memory, display, lambda: write_study(folder, study))
    page = write_study(folder, study)
    table = study_table(json.loads((folder / "study.json").read_text(encoding="utf-8")))
    return f"{table}\nreport: {page}"


def _run_in_turn(
    runs: Sequence[tuple[str, RunConfig]],
    shared_memory: Path,
    display: ProgressDisplay,
    report: Callable[[], object] = lambda: None,
) -> list[dict[str, object]]:
    """The summaries of named runs; ``report()`` after each.

    Ctrl-C or SIGTERM ends a run behind a step and its checkpoint, a second one now; both as KeyboardInterrupt.
    """
    try:
        return asyncio.run(_run(runs, shared_memory, display, report))
    except asyncio.CancelledError as error:
        raise KeyboardInterrupt from error


async def _run(
    runs: Sequence[tuple[str, RunConfig]], shared_memory: Path, display: ProgressDisplay, report: Callable[[], object]
) -> list[dict[str, object]]:
    """Have one coordinator's actor do all runs, which so go on with one another's processes; its own error is raised
    here."""

    def tell(name: str, missing: str | None) -> None:
        display.update(ProgressState(stage="start", note=f"waiting: {missing}" if missing else ""))

    secrets = tuple(dict.fromkeys(secret for _, config in runs for secret in config.secrets))
    path = "actors.ray_cluster:RunActor"
    spec = ActorSpec("coordinator", path, (shared_memory,), threads=1, asynchronous=True, secrets=secrets)
    share, deadlines = alone(CoordinatorPool.name, [COORDINATOR], tell), runs[0][1].deadlines
    coordinator = await CoordinatorPool.start_in(share, [spec], deadlines)
    actor, summaries = coordinator.actors[0], []

    def show(arm: str, state: ProgressState) -> None:
        display.update(replace(state, arm=arm or None))

    try:
        with _finished_at_the_first_signal(lambda: actor.call("finish", deadline_s=deadlines.request_s)):
            for arm, config in runs:
                tell_arm, deadline_s = functools.partial(show, arm), config.deadlines.request_s
                summary = await actor.watch("run", config, tell=tell_arm, deadline_s=deadline_s)
                if summary is None:
                    raise KeyboardInterrupt
                summaries.append(summary)
                report()
        return summaries
    finally:
        await coordinator.close()


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
