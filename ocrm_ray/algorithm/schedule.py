"""When a correction falls due, may be promoted, and must be waited for. Steps count policy updates from 1."""

from dataclasses import dataclass


@dataclass(slots=True)
class CorrectionClock:
    """The fixed rule and where it stands: a correction falls due after every k-th update (``every``).

    It is promoted exactly ``promote_after``, or at most ``max_lag``, updates after its snapshot. At most one is in
    flight (``snapshot``). What falls due meanwhile sets one flag and starts at the next promotion.
    """

    every: int
    promote_after: int | None = None
    max_lag: int | None = None
    snapshot: int | None = None
    is_pending: bool = False
    num_deferred: int = 0

    def should_start(self, step: int) -> bool:
        """Call once after each update and its promotion: whether a correction starts now."""
        is_due = step % self.every == 0
        if self.snapshot is not None and is_due:
            self.is_pending = True
            self.num_deferred += 1
        return self.snapshot is None and (is_due or self.is_pending)

    def start(self, step: int) -> None:
        assert self.snapshot is None, "at most one correction is in flight"
        self.snapshot, self.is_pending = step, False

    def may_promote(self, step: int) -> bool:
        """Whether the refit in flight, if it is ready, may go live after update ``step``."""
        return self.snapshot is not None and step - self.snapshot >= (self.promote_after or 0)

    def must_promote(self, step: int) -> bool:
        """Whether training waits after update ``step`` until the refit in flight is live."""
        bound = self.promote_after if self.promote_after is not None else self.max_lag
        return self.snapshot is not None and bound is not None and step - self.snapshot >= bound

    def finish(self, step: int) -> int:
        """The correction in flight is live; returns its lag, in updates since its snapshot."""
        assert self.snapshot is not None, "no correction is in flight"
        lag, self.snapshot = step - self.snapshot, None
        return lag
