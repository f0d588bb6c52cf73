"""A run folder is held by one run at a time, on any machine that sees it, by a heartbeat in a file.

Whether a holder is alive is told by whether its file changes while another run watches. No clocks of two machines are
compared, and no process ids or file locks are needed, which mean little on shared file systems and in containers.
"""

import asyncio
import json
import os
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ocrm_ray.config import Lease
from ocrm_ray.errors import RunError, UserError, mistake

FILE = "lease.json"


@asynccontextmanager
async def run_lease(folder: Path, settings: Lease) -> AsyncIterator[None]:
    """Inside, ``folder`` is held by this run; the file goes however the body ends.

    UserError: another run is alive there. RunError, and the body is cancelled: another run took this one for dead.
    """
    lease = RunLease(folder, settings)
    try:
        await lease.take()
        async with _kept(lease):
            yield
    finally:
        lease.release()


@asynccontextmanager
async def _kept(lease: "RunLease") -> AsyncIterator[None]:
    """Beats beside the body, from a thread: what blocks the event loop for a minute must not look like death."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    ended, lost = threading.Event(), list[RunError]()

    def end_run() -> None:
        if not ended.is_set():
            task.cancel()

    def keep() -> None:
        while not ended.wait(lease.settings.heartbeat_s):
            try:
                lease.beat()
            except OSError:  # a full disk, or a server that is away: a later heartbeat may get through
                continue
            except RunError as error:
                lost.append(error)
                loop.call_soon_threadsafe(end_run)
                return

    keeper = threading.Thread(target=keep, name="lease", daemon=True)
    keeper.start()
    try:
        yield
    except asyncio.CancelledError:
        if not lost:
            raise
        task.uncancel()
    finally:
        ended.set()
        keeper.join()
    if lost:
        raise lost[0]


@dataclass(eq=False)
class RunLease:
    """``lease.json`` of ``folder``: ``take``, then a ``beat`` every ``heartbeat_s``, then ``release``."""

    folder: Path
    settings: Lease
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep

    def __post_init__(self) -> None:
        self._path = self.folder / FILE
        self._token = secrets.token_hex(8)
        self._num_beats = 0

    async def take(self) -> None:
        """Hold the folder, at once where it is free, else once its heartbeat has stopped. UserError: it goes on."""
        while not self._create():
            if await self._is_abandoned():
                self._write()
                # of several runs that do so the last one has it; a holder that was only slow writes its own again
                await self.sleep(self.settings.heartbeat_s)
                if (found := self._read()) is not None and not self._is_ours(found):
                    raise self._refusal(found, self.settings.heartbeat_s)
                if found is not None:
                    return

    def beat(self) -> None:
        """Show that this run is alive. RunError: it does not hold the folder any more."""
        if (found := self._read()) is None or not self._is_ours(found):
            who = "its lease.json is gone" if found is None else f"a run on {_holder(found)} holds it now"
            raise RunError(
                f"this run has lost its folder {self.folder}: {who}. It was taken for dead, having shown no heartbeat "
                f"for a while ({self.settings.num_missed} x {self.settings.heartbeat_s:g} s): raise lease.num_missed"
            )
        self._write()

    def release(self) -> None:
        """Remove the file, if it is still this run's."""
        with suppress(OSError):
            if (found := self._read()) is not None and self._is_ours(found):
                self._path.unlink()

    async def _is_abandoned(self) -> bool:
        """Watch the holder: True if it shows no heartbeat, False if it has ended. UserError: it is alive."""
        first = self._read()
        # heartbeats are waited for one by one: while the file system stands still nobody is taken for dead
        wait_s = max(self.settings.heartbeat_s, _fields(first).get("heartbeat_s", 0.0))
        for number in range(1, self.settings.num_missed + 1):
            await self.sleep(wait_s)
            if (found := self._read()) is None:
                return False
            if found != first:
                raise self._refusal(found, number * wait_s)
        return True

    def _refusal(self, found: bytes, age_s: float) -> UserError:
        got = f"a run that is alive on {_holder(found)}: its last heartbeat came within {age_s:g} s"
        do = "wait until that run has ended, end it, or choose another name"
        return mistake(str(self.folder), got, "a folder that no run writes to", do)

    def _create(self) -> bool:
        try:
            with self._path.open("xb") as file:
                file.write(self._content())
        except FileExistsError:
            return False
        return True

    def _write(self) -> None:
        """Atomically, so that no reader finds half of it."""
        staged = self._path.with_name(f"{FILE}.{self._token}")
        try:
            staged.write_bytes(self._content())
            os.replace(staged, self._path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise

    def _content(self) -> bytes:
        self._num_beats += 1
        host, every_s = socket.gethostname(), self.settings.heartbeat_s
        fields = {"token": self._token, "host": host, "pid": os.getpid(), "heartbeat_s": every_s}
        return json.dumps(fields | {"num_beats": self._num_beats}).encode() + b"\n"

    def _read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def _is_ours(self, found: bytes) -> bool:
        return bool(_fields(found).get("token") == self._token)


def _fields(found: bytes | None) -> dict[str, Any]:
    """{} of a file that a run left torn when it died."""
    try:
        return dict(json.loads(found or b""))
    except (ValueError, TypeError):
        return {}


def _holder(found: bytes) -> str:
    fields = _fields(found)
    return f"{fields.get('host', 'an unknown machine')} (process {fields.get('pid', 'unknown')})"
