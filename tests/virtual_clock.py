"""An event loop whose clock jumps to the next timer: hours of waiting pass at once, in exact order."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class Deadlock(AssertionError):
    """Every task waits for another one, and no timer is left to wake any."""


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """``time()`` stands still while anything is ready to run, then jumps to the earliest timer."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":
        """At once: a thread would end at a time that no virtual clock knows."""
        done = self.create_future()
        done.set_result(func(*args))
        return done

    def _run_once(self) -> None:
        if not self._ready:
            live = [timer for timer in self._scheduled if not timer.cancelled()]
            if not live:
                raise Deadlock("nothing is ready and no timer is set")
            self._now = max(self._now, min(timer.when() for timer in live))
        super()._run_once()


def run_virtual(main: Coroutine[Any, Any, Any]) -> Any:
    """Run to the end on a fresh virtual clock."""
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(main)
