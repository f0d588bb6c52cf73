"""The lock on stages that several runs share."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ocrm_ray.stage_lock import held

ROOT = Path(__file__).parents[1]


def test_stages_are_made_by_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    told: set[tuple[str, str | None]] = set()
    monkeypatch.setattr("ocrm_ray.stage_lock.POLL_S", 0.0)

    async def run(name: str, may_end: asyncio.Event) -> None:
        async with held(tmp_path / "shared", lambda state: told.add((name, state.note))):
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
    assert told == {("second", f"waiting: another run makes the stages in {tmp_path / 'shared'}")}


def test_the_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    code = f"""
import asyncio, signal, os
from pathlib import Path
from ocrm_ray.stage_lock import held
async def hold():
    async with held(Path({str(tmp_path)!r}), print):
        os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(hold())
"""
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert killed.returncode == -signal.SIGKILL

    async def take() -> None:
        async with asyncio.timeout(10), held(tmp_path, print):
            pass

    asyncio.run(take())
