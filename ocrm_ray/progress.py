"""Live progress in the driver: a bar on a terminal, plain lines in a log (``ray job logs``)."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_INTERVAL_S = 10.0
SPEED_WINDOW_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressState:
    """Where a run is: ``done`` of ``total`` ``unit`` of a stage, and the last figures known."""

    stage: str
    done: int = 0
    total: int | None = None  # None for a stage that does not count
    unit: str = ""
    arm: str | None = None  # arm and seed, in a study
    proxy: float | None = None
    gold: float | None = None
    kl: float | None = None  # from the SFT model, nats a response
    note: str = ""  # what it waits for

    @property
    def title(self) -> str:
        return f"{self.arm} · {self.stage}" if self.arm else self.stage

    @property
    def count(self) -> str:
        return "" if self.total is None else f"{self.done}/{self.total} {self.unit}"

    @property
    def figures(self) -> str:
        """Proxy, gold and KL as far as they are known, and the note."""
        named = (("proxy", self.proxy), ("gold", self.gold), ("KL", self.kl))
        figures = [f"{name} {value:.2f}" for name, value in named if value is not None]
        return "  ".join([*figures, *([self.note] if self.note else [])])


def plain_console() -> "Console":
    """Standard error as one that is no terminal: several displays may write lines there."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, force_terminal=False)


class ProgressDisplay(AbstractContextManager["ProgressDisplay"]):
    """``with ProgressDisplay() as display: display.update(state)``.

    On a terminal the stages stay as bars; elsewhere a line is written when a stage begins and ends, and at most every
    ``PLAIN_INTERVAL_S`` in between. Writes to standard error unless given a console. ``clock`` gives seconds.
    """

    def __init__(self, console: "Console | None" = None, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._start_s = self._shown_s = clock()
        self._state = self._shown = ProgressState(stage="")
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}", markup=False),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}", style="bold", markup=False),
            console=self._console,
            get_time=clock,
            speed_estimate_period=SPEED_WINDOW_S,
            disable=not self._console.is_terminal,
        )

    def __exit__(self, *_: object) -> None:
        self._show_last()
        if not self._bars.disable:
            self._bars.stop()

    def update(self, state: ProgressState) -> None:
        """Show a state; cheap enough for every step."""
        is_new = state.title != self._state.title
        if is_new:
            self._bars.start()
            self._show_last()
            for task in self._bars.tasks[-1:]:  # a stage ends when the next begins
                self._bars.update(task.id, total=task.completed)
            self._bars.add_task(state.title, total=state.total, count="", figures="")
        self._state = state
        task_id = self._bars.task_ids[-1]
        self._bars.update(task_id, completed=state.done, total=state.total, count=state.count, figures=state.figures)
        if is_new or state.done == state.total or self._clock() - self._shown_s >= PLAIN_INTERVAL_S:
            self._show_last()

    def _show_last(self) -> None:
        """Write the plain line of the last state, unless it was: time since the start, stage, count, rate, figures."""
        if not self._bars.disable or self._state == self._shown:
            return
        state, task, now_s = self._state, self._bars.tasks[-1], self._clock()
        speed = task.speed and f"{task.speed:.3g} {state.unit}/s"
        left = task.time_remaining and f"{duration_text(task.time_remaining)} left"
        since_start = f"[{timedelta(seconds=int(now_s - self._start_s))}]"
        parts = filter(None, (since_start, state.title, state.count, speed, left, state.figures))
        self._console.print(*parts, sep="  ", markup=False, highlight=False, soft_wrap=True)
        self._shown, self._shown_s = state, now_s


def duration_text(seconds: float) -> str:
    """``8.4 s``, ``45 s``, ``3 min 20 s``, ``1 h 05 min``."""
    minutes, whole = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    return f"{minutes} min {whole} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
