"""What ends a fit before RL that makes no steps; updates are watched in ``test_coordinator.py``."""

import pytest

from ocrm_ray.errors import StalledError
from ocrm_ray.watchdog import StageWatch


def test_a_fit_that_stands_still_for_longer_than_allowed_ends_and_one_that_is_slow_does_not() -> None:
    times = iter((0.0, 5.0, 9.0, 18.0, 27.0, 28.0, 28.5))
    watch = StageWatch("sft", 10.0, lambda: next(times))
    for done in (0, 0, 1, 1, 1):
        watch.see((done, 4))
    with pytest.raises(StalledError, match=r"stage sft: no step was done within 10 s .*, after 1 of 4"):
        watch.see((1, 4))
