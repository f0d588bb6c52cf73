"""A run without progress ends, and says what each pool is asked for."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ocrm_ray.errors import StalledError
from ocrm_ray.metrics import POOLS

OpenCall = tuple[str, str, float]
"""Pool, method, and since when."""


class OpenCalls:
    """Calls of the pools that have no answer yet. ``clock`` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._open: dict[object, OpenCall] = {}

    @contextmanager
    def call(self, pool: str, method: str) -> Iterator[None]:
        """The call is open while the body runs."""
        key = object()
        self._open[key] = pool, method, self._clock()
        try:
            yield
        finally:
            del self._open[key]

    def __str__(self) -> str:
        """``pool: 2 generate (for 31 s), 1 abort (for 2 s); ...``, the oldest call of each kind."""
        now, found = self._clock(), list(self._open.values())
        return "; ".join(
            f"{pool}: {', '.join(self._of_method(found, pool, now)) or 'nothing'}" for pool in (*POOLS, "evaluation")
        )

    @staticmethod
    def _of_method(found: list[OpenCall], pool: str, now: float) -> Iterator[str]:
        kinds = dict.fromkeys(method for of, method, _ in found if of == pool)
        for kind in kinds:
            seconds = [now - since for of, method, since in found if (of, method) == (pool, kind)]
            yield f"{len(seconds)} {kind} (for {max(seconds):.0f} s)"


class Watchdog:
    """``watch`` for the whole run; ``progress`` after every update."""

    def __init__(self, longest_s: float, calls: OpenCalls) -> None:
        self._longest_s = longest_s
        self._calls = calls
        self._progressed = asyncio.Event()

    def progress(self) -> None:
        """An update is done."""
        self._progressed.set()

    async def watch(self) -> None:
        """Raises StalledError where no update is done for too long."""
        while True:
            self._progressed.clear()
            try:
                async with asyncio.timeout(self._longest_s):
                    await self._progressed.wait()
            except TimeoutError:
                raise StalledError(
                    f"no update was done within {self._longest_s:g} s (deadlines.progress_s). What the pools are asked "
                    f"for: {self._calls}"
                ) from None


class StageWatch:
    """``see`` again and again how far a stage's trainer is: (steps done, of how many). ``clock`` gives seconds."""

    def __init__(self, stage: str, longest_s: float, clock: Callable[[], float]) -> None:
        self._stage, self._longest_s, self._clock = stage, longest_s, clock
        self._seen: tuple[int, int] | None = None
        self._since = clock()

    def see(self, progress: tuple[int, int]) -> None:
        """Raises StalledError where it has been the same for too long."""
        now = self._clock()
        if progress != self._seen:
            self._seen, self._since = progress, now
        elif now - self._since > self._longest_s:
            done, total = progress
            raise StalledError(
                f"stage {self._stage}: no step was done within {self._longest_s:g} s (deadlines.progress_s), "
                f"after {done} of {total}"
            )
