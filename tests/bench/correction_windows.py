"""Tokens generated per second while a correction is in flight against those outside, on the embedded model:

    PYTHONPATH=. .venv/bin/python tests/bench/correction_windows.py [--num-pairs 4000] [--corrections 12]

A first run measures the CPU seconds C of a correction (its background scorer and its refitter) and U of an update (all
other processes), and from them a k for which C <= k U / 5; a second run with that k is the measurement, and
its own C / (k U) is in the table. A window lasts from ``correction_started`` to ``promoted``; everything up to the end
of the first, which loads what a refit needs, is left out. Tokens of a step are taken as spread evenly over it.
"""

import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from measured_run import FEW_EVALUATIONS, Launch, MeasuredRun, arguments, embedded_config, table

from ocrm_ray.run_files import CorrectionWindow, Row, correction_windows

BACKGROUND = ("ratios", "refit")
"""Roles that only corrections use."""
LARGEST_SHARE = 0.2
MARGIN = 1.1
"""On k, since the two runs differ a little."""


@dataclass(frozen=True)
class Cost:
    """CPU seconds of a correction and of an update."""

    correction_s: float
    update_s: float

    def share(self, every: int) -> float:
        """A correction's CPU seconds by those of ``every`` updates."""
        return self.correction_s / (every * self.update_s)


def promoted(measured: MeasuredRun) -> list[CorrectionWindow]:
    """At least two. SystemExit where there are fewer."""
    windows = [window for window in correction_windows(measured.run) if window.outcome == "promoted"]
    if len(windows) < 2:
        sys.exit(f"{len(windows)} corrections were promoted: raise --corrections or k, or quiet the machine")
    return windows


def cost_of(measured: MeasuredRun) -> Cost:
    """Over everything from the end of the first window to that of the last."""
    first, *rest = promoted(measured)
    span = [measured.began_s + window.ended_s for window in (first, rest[-1])]
    background = float(measured.watch.cpu_s(span, BACKGROUND) @ [-1, 1])
    everything = float(measured.watch.cpu_s(span) @ [-1, 1])
    num_updates = sum(first.ended_s < row["time_s"] <= rest[-1].ended_s for row in measured.run.metrics)
    return Cost(background / len(rest), (everything - background) / num_updates)


def rates(rows: list[Row], windows: list[CorrectionWindow], since_s: float) -> tuple[list[float], list[float]]:
    """([tokens, seconds, updates] inside the windows, the same outside) of steps that begin after ``since_s``."""
    inside, outside = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    for row in rows:
        end, start = row["time_s"], row["time_s"] - (row["step_s"] or 0.0)
        if start < since_s or end == start:
            continue
        overlap = sum(max(0.0, min(end, w.ended_s) - max(start, w.started_s)) for w in windows) / (end - start)
        for part, share in ((inside, overlap), (outside, 1 - overlap)):
            for i, amount in enumerate((row["rollout_tokens"], end - start, 1.0)):
                part[i] += share * amount
    return inside, outside


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--num-pairs", type=int, default=4000, help="training pairs of a refit")
    parser.add_argument("--corrections", type=int, default=12, help="of the measurement, the first not counted")
    parser.add_argument("--trial-every", type=int, default=20, help="k of the first run")
    parser.add_argument("--every", type=int, default=None, help="k; default: from the first run")
    options = parser.parse_args()

    def run(name: str, every: int, num_corrections: int) -> MeasuredRun:
        changes = FEW_EVALUATIONS | {
            "policy.num_updates": every * (num_corrections + 1),
            "correction.every": every,
            "correction.num_pairs": options.num_pairs,
            "correction.promote_after": None,
        }
        # memory is not of interest here: looking at it costs CPU seconds
        return Launch(Path(folder), name, embedded_config(), changes, 10**9, options.stages).measure()

    with tempfile.TemporaryDirectory() as folder:
        trial = cost_of(run("trial", options.trial_every, 4))
        every = options.every or max(2, math.ceil(MARGIN * trial.share(1) / LARGEST_SHARE))
        measured = run("windows", every, options.corrections)
    cost, windows = cost_of(measured), promoted(measured)
    inside, outside = rates(list(measured.run.metrics), windows[1:], windows[0].ended_s)
    speed = [part[0] / part[1] for part in (inside, outside)]
    num_steps = inside[2] / (len(windows) - 1)
    table(
        f"{len(windows) - 1} overlapped corrections of {options.num_pairs} pairs, one every {every} updates",
        [
            ["", "inside windows", "outside", "inside / outside"],
            ["tokens/s", *speed, speed[0] / speed[1]],
            ["s an update", *(part[1] / part[2] for part in (inside, outside))],
            ["seconds", inside[1], outside[1]],
            ["updates", inside[2], outside[2]],
            ["updates a window", num_steps],
            ["CPU s of a correction", cost.correction_s, f"(first run {trial.correction_s:.3g})"],
            ["CPU s of an update", cost.update_s, f"(first run {trial.update_s:.3g})"],
            ["correction / k updates", cost.share(every), f"(at most {LARGEST_SHARE})"],
        ],
    )


if __name__ == "__main__":
    main()
