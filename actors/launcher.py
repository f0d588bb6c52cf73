"""The driver: starts Ray and the coordinator's actor, and shows progress until it is done."""

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

from actors.placement import place
from actors.remote_actor import ActorSpec, RemoteActor, spawn
from actors.session import Session, ray_session
from ocrm_ray.config import RunConfig, StudyConfig
from ocrm_ray.config_file import study_runs
from ocrm_ray.progress import ProgressDisplay
from ocrm_ray.study_report import write_study

COORDINATOR_CPUS = 0.1
POLL_S = 0.5

logger = logging.getLogger(__name__)


def run(config: RunConfig, resume: bool) -> None:
    """One run, to its report. Stages that are done are skipped; ``resume`` goes on in a folder that has RL metrics."""
    with ray_session(config.name) as session, ProgressDisplay() as display:
        asyncio.run(_run(config, session, display, arm=None))


def run_study(study: StudyConfig) -> Path:
    """Every arm with every seed, one after the other over shared stages; an arm that has its summary is skipped.

    Returns the study's report.
    """
    with ray_session(study.name) as session, ProgressDisplay() as display:
        for arm, seed, config in study_runs(study, cwd=Path.cwd()):
            if not (config.run_dir / "summary.json").exists():
                asyncio.run(_run(config, session, display, arm=f"{arm} seed {seed}"))
    return write_study(study.output_dir / study.name, list(study.arms), study.seeds)


async def _run(config: RunConfig, session: Session, display: ProgressDisplay, arm: str | None) -> None:
    """Run the coordinator's actor to its end; its own error is raised here."""
    group = await place("coordinator", [{"CPU": COORDINATOR_CPUS}], config.deadlines.start_s)
    spec = ActorSpec(
        role="coordinator",
        path="actors.run_actor:RunActor",
        arguments=(config, session.shared_memory),
        threads=1,
        asynchronous=True,
    )
    coordinator = spawn(spec, group, 0)
    try:
        await coordinator.start(config.deadlines.start_s)
        running = asyncio.ensure_future(coordinator.call("run", deadline_s=None))
        await _show_until_done(running, coordinator, display, arm, config.deadlines.request_s)
        await running
    finally:
        coordinator.kill()


async def _show_until_done(
    running: "asyncio.Future[object]",
    coordinator: RemoteActor,
    display: ProgressDisplay,
    arm: str | None,
    deadline_s: float,
) -> None:
    while not running.done():
        await asyncio.wait({running}, timeout=POLL_S)
        if not running.done():
            state = await coordinator.call("progress", deadline_s=deadline_s)
            display.update(replace(state, arm=arm))
