"""A long embedded run with many corrections: memory of each role, drift of the step time, and what is left behind:

    PYTHONPATH=. .venv/bin/python tests/bench/soak.py [--updates 1000] [--every 5]

After the run, and after a second one that Ctrl-C ends (SIGINT to the whole process group, as a terminal does), no
process of theirs may run and nothing that one of them had mapped may be in shared memory; exits with 1 where something
is left.
"""

import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measured_run import (
    ENDED_S,
    FEW_EVALUATIONS,
    Launch,
    MeasuredRun,
    Watch,
    arguments,
    embedded_config,
    note,
    table,
)

from ocrm_ray.run_files import read_jsonl

PARTS = (0.2, 0.6, 1.0)
"""Of the run: where memory is told."""
NUM_FIFTHS = 5
INTERRUPTED = 130


def left_behind(watch: Watch) -> str:
    """Processes and shared memory that outlive the program; empty where nothing does."""
    survivors = [f"{watch.seen[process].role} ({process.pid})" for process in watch.survivors(ENDED_S)]
    return ", ".join([*survivors, *watch.left_in_shared_memory()])


def interrupted(launch: Launch) -> tuple[Watch, int, float]:
    """(watch, exit status, seconds to the end) of a run that gets Ctrl-C in the midst of RL."""
    note(f"{launch.name}: ends by SIGINT")
    with launch.started() as (program, watch):
        while program.poll() is None and len(read_jsonl(launch.run_dir / "metrics.jsonl")) < 2:
            time.sleep(0.2)
        pressed = time.monotonic()
        os.killpg(program.pid, signal.SIGINT)
        status = program.wait(timeout=10 * ENDED_S)
    return watch, status, time.monotonic() - pressed


def memory_rows(measured: MeasuredRun) -> list[list[object]]:
    """MiB of PSS by role: the sample nearest to each part of the updates; growth from the first to the last."""
    steps = [row for row in measured.run.metrics if row["step"] > 0]
    moments = [measured.began_s + steps[int(part * len(steps)) - 1]["time_s"] for part in PARTS]
    taken = [sample for sample in measured.watch.samples if sample.pss and sample.time_s <= moments[-1]]
    chosen = [min(taken, key=lambda sample, moment=moment: abs(sample.time_s - moment)).pss for moment in moments]  # type: ignore[misc]
    rows: list[list[object]] = []
    for role in sorted(chosen[-1]):
        mib = [pss.get(role, 0) / 2**20 for pss in chosen]
        rows.append([f"PSS of {role}, MiB", *(f"{x:.1f}" for x in mib), f"{mib[-1] - mib[0]:+.1f}"])
    total = [sum(pss.values()) / 2**20 for pss in chosen]
    return [*rows, ["PSS of all, MiB", *(f"{x:.1f}" for x in total), f"{total[-1] - total[0]:+.1f}"]]


def time_rows(measured: MeasuredRun) -> list[list[object]]:
    steps = np.array([row["step_s"] for row in measured.run.metrics if row["step"] > 0])
    medians = [f"{statistics.median(fifth) * 1e3:.1f}" for fifth in np.array_split(steps, NUM_FIFTHS)]
    slope = float(np.polyfit(np.arange(len(steps)), steps, 1)[0])
    return [
        ["median step of each fifth, ms", *medians],
        ["slope of the step time, ms in 100 updates", f"{slope * 1e5:+.3f}"],
    ]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--every", type=int, default=5, help="k")
    parser.add_argument("--num-pairs", type=int, default=1000, help="training pairs of a refit")
    options = parser.parse_args()
    changes = FEW_EVALUATIONS | {
        "policy.num_updates": options.updates,
        "correction.every": options.every,
        "correction.num_pairs": options.num_pairs,
        "correction.promote_after": None,
    }
    with tempfile.TemporaryDirectory() as folder:
        measured = Launch(Path(folder), "soak", embedded_config(), changes, 6, options.stages).measure()
        left = left_behind(measured.watch)
        second = Launch(Path(folder), "interrupted", embedded_config(), changes, 4, options.stages)
        watch, status, end_s = interrupted(second)
        left_by_interrupt = left_behind(watch)
    promoted = [event for event in measured.run.events if event["event"] == "promoted"]
    table(
        f"soak: {options.updates} embedded updates, {len(promoted)} corrections of {options.num_pairs} pairs promoted",
        [
            ["", *(f"at {part:.0%}" for part in PARTS), "growth"],
            *memory_rows(measured),
            *time_rows(measured),
            [f"left after the end: {left or 'nothing'}"],
            [f"left after Ctrl-C: {left_by_interrupt or 'nothing'}; exit {status} after {end_s:.1f} s"],
        ],
    )
    return int(bool(left or left_by_interrupt) or status != INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
