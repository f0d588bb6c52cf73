"""The driver: starts Ray and the coordinator's actor, and shows progress until it is done."""

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.placement import COORDINATOR, alone
from actors.ray_pool import RayPool
from actors.remote_actor import ActorSpec
from actors.session import ray_session
from ocrm_ray.config import RunConfig, StudyConfig
from ocrm_ray.config_file import study_runs
from ocrm_ray.progress import ProgressDisplay, ProgressState
from ocrm_ray.study_jobs import run_side_by_side
from ocrm_ray.study_report import study_table, write_study


class CoordinatorPool(RayPool):
    """The one actor that holds the coordinator."""

    name = "coordinator"
    farewell = "stop"


def run(config: RunConfig, resume: bool) -> str:
    """One run, to its report; returns closing words. Stages that are done are skipped.

    ``resume`` allows a folder that has RL metrics: a finished run is left as it is, another goes on from its newest
    checkpoint, or without one starts RL over.
    """
    report = config.run_dir / "report.html"
    if resume and (config.run_dir / "summary.json").exists():
        return f"this run is done\nreport: {report}"
    with ray_session(config.name) as shared_memory, ProgressDisplay() as display:
        summary = _run_to_the_end(config, shared_memory, display, arm=None)
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
            for arm, seed, config in runs:
                _run_to_the_end(config, shared_memory, display, arm=f"{arm} seed {seed}")
                write_study(folder, study)
    page = write_study(folder, study)
    table = study_table(json.loads((folder / "study.json").read_text(encoding="utf-8")))
    return f"{table}\nreport: {page}"


def _run_to_the_end(
    config: RunConfig, shared_memory: Path, display: ProgressDisplay, arm: str | None
) -> dict[str, object]:
    """The run's summary. Ctrl-C or SIGTERM ends it behind a step and its checkpoint, a second one now; both as
    KeyboardInterrupt."""
    try:
        summary = asyncio.run(_run(config, shared_memory, display, arm))
    except asyncio.CancelledError as error:
        raise KeyboardInterrupt from error
    if summary is None:
        raise KeyboardInterrupt
    return summary


async def _run(
    config: RunConfig, shared_memory: Path, display: ProgressDisplay, arm: str | None
) -> dict[str, object] | None:
    """Run the coordinator's actor to its end and return its summary; its own error is raised here."""
    spec = ActorSpec(
        "coordinator",
        "actors.ray_cluster:RunActor",
        (config, shared_memory),
        threads=1,
        asynchronous=True,
        secrets=config.secrets,
    )

    def tell(name: str, missing: str | None) -> None:
        display.update(ProgressState(stage="start", arm=arm, note=f"waiting: {missing}" if missing else ""))

    share = alone(CoordinatorPool.name, [COORDINATOR], tell)
    coordinator = await CoordinatorPool.start_in(share, [spec], config.deadlines)
    actor, deadline_s = coordinator.actors[0], config.deadlines.request_s
    try:
        with _finished_at_the_first_signal(lambda: actor.call("finish", deadline_s=deadline_s)):
            summary: dict[str, object] | None = await actor.watch(
                "run", lambda state: display.update(replace(state, arm=arm)), deadline_s
            )
        return summary
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
