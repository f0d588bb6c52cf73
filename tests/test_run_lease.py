"""A run folder that two runs want: who gets it, who is refused, who finds out that it has lost it."""

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fakes import tiny_run
from test_reinforcement import OpenCluster
from virtual_clock import run_virtual

from ocrm_ray import reinforcement
from ocrm_ray.config import Lease
from ocrm_ray.errors import RunError, UserError
from ocrm_ray.reinforcement import run_with_restarts
from ocrm_ray.run_lease import FILE, RunLease, run_lease

SETTINGS = Lease(heartbeat_s=5.0, num_missed=4)
QUICK = Lease(heartbeat_s=0.02, num_missed=3000)
STUCK_S = 60.0
"""After which a test that hangs fails."""


class Planted(Exception):
    pass


def contents(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / FILE).read_text())
    return found


def leave_dead(folder: Path) -> RunLease:
    """The lease of a run that was killed."""
    lease = RunLease(folder, SETTINGS)
    asyncio.run(lease.take())
    return lease


@pytest.mark.parametrize("error", [None, Planted])
def test_a_free_folder_is_held_at_once_and_free_again_however_the_run_ends(
    tmp_path: Path, error: type[Exception] | None
) -> None:
    async def body() -> None:
        async with run_lease(tmp_path, SETTINGS):
            assert contents(tmp_path)["pid"] == os.getpid()
            if error is not None:
                raise error

    if error is None:
        asyncio.run(body())
    else:
        with pytest.raises(error):
            asyncio.run(body())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alive_until", [1, 3, 4])
def test_one_heartbeat_while_a_second_run_watches_refuses_it(tmp_path: Path, alive_until: int) -> None:
    holder, waits = leave_dead(tmp_path), list[float]()

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == alive_until:
            holder.beat()

    before = contents(tmp_path)["token"]
    with pytest.raises(UserError) as told:
        asyncio.run(RunLease(tmp_path, SETTINGS, sleep).take())
    assert waits == [5.0] * alive_until
    assert contents(tmp_path)["token"] == before
    host = contents(tmp_path)["host"]
    assert str(told.value) == (
        f"{tmp_path}: got a run that is alive on {host} (process {os.getpid()}): its last heartbeat came within "
        f"{5 * alive_until} s, need a folder that no run writes to: wait until that run has ended, end it, or choose "
        "another name"
    )


@pytest.mark.parametrize("torn", [False, True])
def test_a_lease_that_shows_no_heartbeat_is_taken_over_and_its_run_is_told(tmp_path: Path, torn: bool) -> None:
    holder, waits = leave_dead(tmp_path), list[float]()
    if torn:
        (tmp_path / FILE).write_bytes(b'{"tok')

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    asyncio.run(RunLease(tmp_path, SETTINGS, sleep).take())
    assert waits == [5.0] * (4 + 1), "as many as may be missed, and one to see whether another run took it too"
    with pytest.raises(RunError, match=r"has lost its folder .* holds it now.*lease\.num_missed"):
        holder.beat()


def test_a_slow_holder_is_watched_at_its_own_pace(tmp_path: Path) -> None:
    asyncio.run(RunLease(tmp_path, Lease(heartbeat_s=30)).take())
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    asyncio.run(RunLease(tmp_path, SETTINGS, sleep).take())
    assert waits == [30.0] * 4 + [5.0]


def test_a_holder_that_ends_while_it_is_watched_leaves_the_folder_to_the_watcher(tmp_path: Path) -> None:
    holder, waits = leave_dead(tmp_path), list[float]()

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        holder.release()

    lease = RunLease(tmp_path, SETTINGS, sleep)
    asyncio.run(lease.take())
    lease.beat()
    assert waits == [5.0]


@pytest.mark.parametrize("late_s", [0.0, 1.0, 4.9, 5.1, 19.0, 24.0])
def test_of_two_runs_that_find_a_dead_one_exactly_one_gets_the_folder(tmp_path: Path, late_s: float) -> None:
    leave_dead(tmp_path)

    async def want(after_s: float) -> str | None:
        await asyncio.sleep(after_s)
        lease = RunLease(tmp_path, SETTINGS)
        try:
            await lease.take()
        except UserError:
            return None
        while asyncio.get_running_loop().time() < 100:
            lease.beat()
            await asyncio.sleep(5)
        return lease._token

    async def both() -> list[str | None]:
        return list(await asyncio.gather(want(0), want(late_s)))

    winners = [token for token in run_virtual(both()) if token is not None]
    assert winners == [contents(tmp_path)["token"]]


def test_a_holder_that_was_only_slow_keeps_the_folder_if_it_writes_last(tmp_path: Path) -> None:
    holder, num_waits = leave_dead(tmp_path), 0

    async def sleep(seconds: float) -> None:
        nonlocal num_waits
        num_waits += 1
        if num_waits == 5:  # it had read its own token before the other wrote
            holder._write()

    with pytest.raises(UserError, match="alive"):
        asyncio.run(RunLease(tmp_path, SETTINGS, sleep).take())
    holder.beat()


def test_a_run_that_is_ended_while_it_takes_over_leaves_no_lease_of_its_own(tmp_path: Path) -> None:
    leave_dead(tmp_path)

    async def body() -> None:
        task = asyncio.create_task(wait())
        await asyncio.sleep(4 * 5 + 1)
        assert (tmp_path / FILE).exists()
        task.cancel()
        await asyncio.wait([task])

    async def wait() -> None:
        async with run_lease(tmp_path, SETTINGS):
            raise AssertionError("it had not the time to take over")

    run_virtual(body())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["taken", "removed"])
def test_a_holder_that_finds_its_lease_gone_ends_its_run_and_leaves_the_others_lease(tmp_path: Path, how: str) -> None:
    async def body() -> None:
        async with asyncio.timeout(STUCK_S), run_lease(tmp_path, QUICK):
            other = RunLease(tmp_path, QUICK)
            (tmp_path / FILE).unlink()
            if how == "taken":
                await other.take()
            await asyncio.Event().wait()

    with pytest.raises(RunError, match="holds it now" if how == "taken" else "is gone"):
        asyncio.run(body())
    assert (tmp_path / FILE).exists() == (how == "taken")


def counted_writes(monkeypatch: pytest.MonkeyPatch, num: int, fail_first: int = 0) -> threading.Event:
    """Set after ``num`` writes of a heartbeat; the first ``fail_first`` find a full disk."""
    written, plain, calls = threading.Event(), os.replace, list[int]()

    def replace(source: Path, target: Path) -> None:
        calls.append(1)
        if len(calls) <= fail_first:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(source, target)
        if len(calls) >= num:
            written.set()

    monkeypatch.setattr(os, "replace", replace)
    return written


def test_heartbeats_go_on_while_the_event_loop_is_blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = counted_writes(monkeypatch, 3)

    async def body() -> None:
        async with run_lease(tmp_path, QUICK):
            assert written.wait(STUCK_S)

    asyncio.run(body())


def test_a_full_disk_delays_heartbeats_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = counted_writes(monkeypatch, 3, fail_first=2)

    async def body() -> None:
        async with run_lease(tmp_path, QUICK):
            assert written.wait(STUCK_S)

    asyncio.run(body())
    assert list(tmp_path.iterdir()) == []


def test_a_heartbeat_that_cannot_be_written_leaves_the_one_before_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = leave_dead(tmp_path)
    before = contents(tmp_path)
    counted_writes(monkeypatch, 1, fail_first=1)
    with pytest.raises(OSError, match="No space left"):
        holder.beat()
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert contents(tmp_path) == before


HOLD = """
import asyncio, sys
from pathlib import Path
from ocrm_ray.config import Lease
from ocrm_ray.run_lease import run_lease

async def hold():
    async with run_lease(Path(sys.argv[1]), Lease(heartbeat_s=float(sys.argv[2]), num_missed=int(sys.argv[3]))):
        print("holds", flush=True)
        await asyncio.to_thread(sys.stdin.readline)

async def told():
    try:
        await hold()
    except Exception as error:
        print(type(error).__name__, flush=True)

asyncio.run(told())
"""


class Holder:
    """A process that holds ``folder`` until it is told to end; the first line says whether it could."""

    def __init__(self, folder: Path, heartbeat_s: float, num_missed: int) -> None:
        command = [sys.executable, "-c", HOLD, str(folder), str(heartbeat_s), str(num_missed)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.communicate("\n")


def test_a_second_process_is_refused_while_the_first_lives_and_gets_the_folder_once_it_is_killed(
    tmp_path: Path,
) -> None:
    first = Holder(tmp_path, 0.05, 1000)
    assert first.says() == "holds"
    second = Holder(tmp_path, 0.05, 1000)
    assert second.says() == "UserError"
    second.end()
    first.process.kill()
    first.process.wait()
    assert (tmp_path / FILE).exists()
    third = Holder(tmp_path, 0.05, 3)
    assert third.says() == "holds"
    third.end()
    assert list(tmp_path.iterdir()) == []
    first.end()


def test_a_process_that_was_stopped_and_wakes_up_after_its_folder_was_taken_ends_with_an_error(tmp_path: Path) -> None:
    first = Holder(tmp_path, 0.05, 3)
    assert first.says() == "holds"
    first.process.send_signal(signal.SIGSTOP)
    second = Holder(tmp_path, 0.05, 3)
    assert second.says() == "holds"
    first.process.send_signal(signal.SIGCONT)
    assert first.says() == "RunError"
    first.end()
    second.end()


def test_a_run_is_refused_before_it_touches_a_folder_in_which_another_is_alive(tmp_path: Path) -> None:
    config = tiny_run(output_dir=tmp_path, lease=QUICK.model_dump())
    config.run_dir.mkdir()
    (config.run_dir / "metrics.jsonl").write_text("{}\n")

    async def body() -> None:
        async with run_lease(config.run_dir, QUICK):
            with pytest.raises(UserError, match="alive"):
                await run_with_restarts(config, OpenCluster, print, asyncio.Event())  # type: ignore[arg-type]
            assert [path.name for path in config.run_dir.iterdir() if FILE not in path.name] == ["metrics.jsonl"]

    asyncio.run(body())


def test_a_run_that_starts_again_holds_its_folder_and_keeps_nothing_of_the_training_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(output_dir=tmp_path)
    (config.run_dir / "reward" / "v1").mkdir(parents=True)
    (config.run_dir / "metrics.jsonl").write_text("{}\n")

    class StageStandIn:
        def __init__(self, *_: object) -> None: ...

        async def run(self) -> None:
            names = {path.name for path in config.run_dir.iterdir()}
            assert names == {"lease.json", "config.yaml", "stages"}
            raise Planted

    monkeypatch.setattr(reinforcement, "Stages", StageStandIn)
    with pytest.raises(Planted):
        asyncio.run(run_with_restarts(config, OpenCluster, print, asyncio.Event()))  # type: ignore[arg-type]
    assert not (config.run_dir / FILE).exists()
