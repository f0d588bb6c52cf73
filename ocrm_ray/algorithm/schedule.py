"""When a correction falls due, may be promoted, and must be waited for. Steps count policy updates from 1."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CorrectionSchedule:
    """The fixed rule: every k updates; promotion exactly ``promote_after``, or at most ``max_lag``, updates later."""

    every: int
    promote_after: int | None = None
    max_lag: int | None = None

    def is_due(self, step: int) -> bool:
        """A correction falls due after every k-th update."""
        return step % self.every == 0

    def may_promote(self, step: int, snapshot: int) -> bool:
        """Whether the refit for ``snapshot``, if it is ready, may go live after update ``step``."""
        return self.promote_after is None or step - snapshot >= self.promote_after

    def must_promote(self, step: int, snapshot: int) -> bool:
        """Whether training waits after update ``step`` until the refit for ``snapshot`` is live."""
        bound = self.promote_after if self.promote_after is not None else self.max_lag
        return bound is not None and step - snapshot >= bound


@dataclass(slots=True)
class CorrectionClock:
    """The schedule with its state: the snapshot in flight, and the flag for one that fell due meanwhile.

    At most one correction is in flight. What falls due meanwhile sets one flag and starts at the next promotion.
    """

    schedule: CorrectionSchedule
    snapshot: int | None = None
    is_pending: bool = False
    num_deferred: int = field(default=0)

    def should_start(self, step: int) -> bool:
        """Call once after each update and its promotion: whether a correction starts now."""
        due = self.schedule.is_due(step)
        if self.snapshot is not None:
            if due:
                self.is_pending = True
                self.num_deferred += 1
            return False
        return due or self.is_pending

    def start(self, step: int) -> None:
        assert self.snapshot is None, "at most one correction is in flight"
        self.snapshot, self.is_pending = step, False

    def may_promote(self, step: int) -> bool:
        return self.snapshot is not None and self.schedule.may_promote(step, self.snapshot)

    def must_promote(self, step: int) -> bool:
        return self.snapshot is not None and self.schedule.must_promote(step, self.snapshot)

    def finish(self, step: int) -> int:
        """The correction in flight is live; returns its lag, in updates since its snapshot."""
        assert self.snapshot is not None, "no correction is in flight"
        lag, self.snapshot = step - self.snapshot, None
        return lag
