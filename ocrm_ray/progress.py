"""Live progress in the driver: a bar on a terminal, plain lines in a log (``ray job logs``)."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

PLAIN_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressState:
    """Where a run is: ``done`` of ``total`` ``unit`` of a stage, and the last figures known."""

    stage: str
    done: int = 0
    total: int | None = None
    """None where the end is not known."""
    unit: str = ""
    arm: str | None = None
    """Arm and seed, in a study."""
    proxy: float | None = None
    gold: float | None = None
    kl: float | None = None
    """From the SFT model, nats a response."""
    message: str = ""

    @property
    def title(self) -> str:
        return f"{self.arm} · {self.stage}" if self.arm else self.stage

    @property
    def count(self) -> str:
        """``40/140 updates``; nothing for a stage that does not count."""
        if self.total is None and not self.done:
            return ""
        return f"{self.done}/{self.total} {self.unit}" if self.total is not None else f"{self.done} {self.unit}"

    @property
    def figures(self) -> str:
        """Proxy, gold and KL as far as they are known, and the message."""
        named = (("proxy", self.proxy), ("gold", self.gold), ("KL", self.kl))
        parts = [f"{name} {value:.2f}" for name, value in named if value is not None]
        return "  ".join([*parts, self.message] if self.message else parts)


@dataclass(frozen=True, slots=True)
class Pace:
    """Where and when a stage was first seen: a resumed stage does not begin at 0."""

    first_done: int
    first_s: float

    def rate(self, state: ProgressState, now_s: float) -> float | None:
        """Units a second since the stage was first seen; None before there is one to count."""
        elapsed_s, progressed = now_s - self.first_s, state.done - self.first_done
        return progressed / elapsed_s if elapsed_s > 0 and progressed > 0 else None

    def left_s(self, state: ProgressState, now_s: float) -> float | None:
        """Seconds to the end of the stage at this rate."""
        rate = self.rate(state, now_s)
        return None if rate is None or state.total is None else max(state.total - state.done, 0) / rate


class ProgressDisplay:
    """``with ProgressDisplay() as display: display.update(state)``.

    On a terminal the stages stay as bars; elsewhere a line is written when a stage begins and ends, and at most every
    ``PLAIN_INTERVAL_S`` in between. Writes to standard error unless given a console. ``clock`` gives seconds.
    """

    def __init__(self, console: "Console | None" = None, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console

        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._start_s = clock()
        self._bars: Progress | None = _bars(self._console) if self._console.is_terminal else None
        self._task: TaskID | None = None
        self._state: ProgressState | None = None
        self._pace = Pace(0, self._start_s)
        self._shown: ProgressState | None = None
        self._shown_s = self._start_s

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
        elif self._state is not None and self._state != self._shown:
            self._write_line(self._state)

    def update(self, state: ProgressState) -> None:
        """Show a state; cheap enough for every step."""
        is_new = self._state is None or self._state.title != state.title
        if self._bars is not None:
            self._update_bar(self._bars, state, is_new)
            return
        if is_new:
            if self._state is not None and self._state != self._shown:
                self._write_line(self._state)
            self._pace = Pace(state.done, self._clock())
        self._state = state
        is_over = state.total is not None and state.done >= state.total and state != self._shown
        if is_new or is_over or self._clock() - self._shown_s >= PLAIN_INTERVAL_S:
            self._write_line(state)

    def line(self, state: ProgressState) -> str:
        """The plain line: time since the start, stage, count, rate, time left, figures."""
        now_s = self._clock()
        clock = f"[{clock_text(now_s - self._start_s)}]"
        parts = [clock, state.title, state.count, *self._speed(state, now_s), state.figures]
        return "  ".join(part.rstrip() for part in parts if part)

    def _speed(self, state: ProgressState, now_s: float) -> list[str]:
        rate, left_s = self._pace.rate(state, now_s), self._pace.left_s(state, now_s)
        parts = [] if rate is None else [rate_text(rate, state.unit)]
        return [*parts, f"{duration_text(left_s)} left"] if left_s else parts

    def _write_line(self, state: ProgressState) -> None:
        self._console.print(self.line(state), markup=False, highlight=False, soft_wrap=True)
        self._shown, self._shown_s = state, self._clock()

    def _update_bar(self, bars: "Progress", state: ProgressState, is_new: bool) -> None:
        if is_new:
            if self._task is not None:
                bars.stop_task(self._task)
            self._pace = Pace(state.done, self._clock())
            self._task = bars.add_task("", total=state.total, title=state.title, count="", speed="", figures="")
        self._state = state
        assert self._task is not None
        bars.update(
            self._task,
            completed=state.done,
            total=state.total,
            count=state.count,
            speed="  ".join(self._speed(state, self._clock())),
            figures=state.figures,
        )


def _bars(console: "Console") -> "Progress":
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.fields[title]}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}", markup=False),
        TextColumn("{task.fields[speed]}", style="dim", markup=False),
        TextColumn("{task.fields[figures]}", style="bold", markup=False),
        console=console,
    )


def rate_text(rate: float, unit: str) -> str:
    """``12.3 updates/s``, or per minute where it is slower than one a second."""
    return f"{rate:.1f} {unit}/s" if rate >= 1 else f"{rate * 60:.1f} {unit}/min"


def clock_text(seconds: float) -> str:
    """``mm:ss``, or ``h:mm:ss``."""
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{whole:02d}" if hours else f"{minutes:02d}:{whole:02d}"


def duration_text(seconds: float) -> str:
    """``8.4 s``, ``45 s``, ``3 min 20 s``, ``1 h 05 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes, whole = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {whole} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
