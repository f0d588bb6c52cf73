"""Runs of a study side by side: real processes that stand in for ``ocrm-ray run``."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ocrm_ray import study_jobs
from ocrm_ray.config import RunConfig
from ocrm_ray.config_file import load_run_config
from ocrm_ray.errors import RunError
from ocrm_ray.stage_lock import held
from ocrm_ray.study_jobs import StudyRun, run_side_by_side

ROOT = Path(__file__).parents[1]
PEERS = """
import sys, time
from pathlib import Path
run = Path(sys.argv[-1]).parent
(run / "began").touch()
peers = {peers}
while sum((each / "began").exists() for each in run.parent.iterdir()) < peers:
    time.sleep(0.01)
print("said by", run.name)
sys.exit(3 if run.name in {failing} else 0)
"""


def runs_in(folder: Path, *names: str) -> list[StudyRun]:
    return [(f"arm-{name}", 1, RunConfig(name=name, output_dir=folder)) for name in names]


def stand_in(monkeypatch: pytest.MonkeyPatch, peers: int, failing: tuple[str, ...] = ()) -> None:
    code = PEERS.format(peers=peers, failing=failing)
    monkeypatch.setattr(study_jobs, "COMMAND", (sys.executable, "-c", code))


def test_as_many_runs_go_on_at_once_as_asked_for_each_with_its_own_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, peers=2)  # the first can only end once the second has begun
    runs, reports = runs_in(tmp_path, "a", "b", "c"), []
    run_side_by_side(runs, 2, lambda: reports.append(None))
    assert len(reports) == 3
    for _, _, config in runs:
        assert (config.run_dir / "run.log").read_text() == f"said by {config.name}\n"
        assert load_run_config(config.run_dir / "config.yaml", []) == config


def test_after_a_failure_no_run_begins_and_those_under_way_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, peers=2, failing=("a", "b"))
    with pytest.raises(RunError) as caught:
        run_side_by_side(runs_in(tmp_path, "a", "b", "c"), 2, lambda: None)
    assert sorted(str(caught.value).splitlines()) == [
        f"arm arm-{name} seed 1 ended with status 3: see {tmp_path / name / 'run.log'}" for name in "ab"
    ]
    assert not (tmp_path / "c").exists()


STUDY = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
from ocrm_ray import study_jobs
from ocrm_ray.config import RunConfig
study_jobs.COMMAND = (sys.executable, "-c", '''
import os, signal, sys
from pathlib import Path
def end(*_):
    (Path(sys.argv[-1]).parent / "ended").touch()
    os._exit(130)
signal.signal(signal.SIGTERM, end)
os.write({pipe}, b"up")
signal.pause()
''')
import asyncio, functools
spawn = asyncio.create_subprocess_exec
asyncio.create_subprocess_exec = functools.partial(spawn, pass_fds=({pipe},))
try:
    study_jobs.run_side_by_side([("a", 1, RunConfig(name="a", output_dir=Path(sys.argv[1])))], 2, lambda: None)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda how: how.name)
def test_the_runs_end_with_the_study_however_it_ends(tmp_path: Path, how: signal.Signals) -> None:
    reader, writer = os.pipe()
    command = [sys.executable, "-c", STUDY.format(pipe=writer), str(tmp_path)]
    study = subprocess.Popen(command, pass_fds=(writer,), env={**os.environ, "PYTHONPATH": str(ROOT)})
    os.close(writer)
    assert os.read(reader, 2) == b"up"
    study.send_signal(how)
    assert study.wait() == (-9 if how is signal.SIGKILL else 130)
    assert os.read(reader, 1) == b""  # the last process that held the pipe is gone
    assert (tmp_path / "a" / "ended").exists()


def test_stages_are_made_by_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr("ocrm_ray.stage_lock.POLL_S", 0.0)

    async def run(name: str, may_end: asyncio.Event) -> None:
        async with held(tmp_path / "shared"):
            events.append(f"{name} in")
            await may_end.wait()
            events.append(f"{name} out")

    async def both() -> None:
        first_may_end, second_may_end = asyncio.Event(), asyncio.Event()
        second_may_end.set()
        runs = [asyncio.create_task(run("first", first_may_end)), asyncio.create_task(run("second", second_may_end))]
        for _ in range(20):  # turns of the loop, in each of which the second asks for the lock
            await asyncio.sleep(0)
        assert events == ["first in"]
        first_may_end.set()
        await asyncio.gather(*runs)

    asyncio.run(both())
    assert events == ["first in", "first out", "second in", "second out"]


def test_the_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    code = f"""
import asyncio, signal, os
from pathlib import Path
from ocrm_ray.stage_lock import held
async def hold():
    async with held(Path({str(tmp_path)!r})):
        os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(hold())
"""
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert killed.returncode == -signal.SIGKILL

    async def take() -> None:
        async with asyncio.timeout(10), held(tmp_path):
            pass

    asyncio.run(take())
