"""Several runs of a study at once, each an ``ocrm-ray run`` in a process of its own."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence

from ocrm_ray.config import RunConfig
from ocrm_ray.config_file import dump_yaml
from ocrm_ray.errors import RunError
from ocrm_ray.whole_files import write_whole

COMMAND = (sys.executable, "-m", "ocrm_ray", "run", "--resume")
LOG = "run.log"
ENDS_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Becomes the run. Else a killed study would leave runs behind that a resumed one starts a second time."""
StudyRun = tuple[str, int, RunConfig]


def run_side_by_side(runs: Sequence[StudyRun], num_jobs: int, report: Callable[[], object]) -> None:
    """All runs in order, ``num_jobs`` at once; ``report()`` after each that is done. For the main thread.

    What a run prints goes to ``run.log`` in its folder. After a failure no further run starts, and those under way are
    waited for; RunError then names the failed ones. On SIGTERM and Ctrl-C all are ended; KeyboardInterrupt.
    """
    try:
        failed = asyncio.run(_all(runs, num_jobs, report))
    except asyncio.CancelledError as error:
        raise KeyboardInterrupt from error
    if failed:
        raise RunError("\n".join(failed))


async def _all(runs: Sequence[StudyRun], num_jobs: int, report: Callable[[], object]) -> list[str]:
    """What failed."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    failed: list[str] = []
    waiting = iter(runs)

    async def work() -> None:
        for arm, seed, config in _until(waiting, failed):
            _say(f"{arm} seed {seed}: begins")
            status = await _run(config)
            if status:
                failed.append(f"arm {arm} seed {seed} ended with status {status}: see {config.run_dir / LOG}")
            else:
                report()
            _say(f"{arm} seed {seed}: {'failed' if status else 'done'}")

    async with asyncio.TaskGroup() as tasks:
        for _ in range(num_jobs):
            tasks.create_task(work())
    return failed


def _until(runs: Iterable[StudyRun], failed: Sequence[str]) -> Iterable[StudyRun]:
    """The next runs, none after a failure."""
    for run in runs:
        yield run
        if failed:
            return


async def _run(config: RunConfig) -> int:
    """One run in a process of its own; its exit status. Cancelled, it is ended as by Ctrl-C, and waited for."""
    path = config.run_dir / "config.yaml"
    write_whole(path, [dump_yaml(config)])
    with (config.run_dir / LOG).open("ab") as log:
        # in a session of its own: Ctrl-C comes to this process alone, which then ends each run once
        starting = asyncio.create_task(
            asyncio.create_subprocess_exec(
                *(sys.executable, "-c", ENDS_WITH_PARENT),
                *COMMAND,
                str(path),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        )
        try:
            # cancelled by itself, the start of a process would kill it
            return await (await asyncio.shield(starting)).wait()
        finally:
            process = await starting
            if process.returncode is None:
                process.terminate()
                await process.wait()


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
