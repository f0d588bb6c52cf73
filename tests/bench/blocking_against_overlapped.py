"""Corrections that stop everything against corrections beside rollouts and training, on the embedded model:

    PYTHONPATH=. .venv/bin/python tests/bench/blocking_against_overlapped.py [--updates 120] [--rounds 2]

Both schedules run in turns over the same stages, with the demo's correction (importance weighting, all pairs, every
10 updates) and no other setting between them; an overlapped refit goes live at the first step boundary after it is
ready. Rates are updates by wall seconds, corrections included, from the second correction on: the first one loads
what a refit needs.
"""

import statistics
import tempfile
from pathlib import Path

from measured_run import FEW_EVALUATIONS, Launch, arguments, embedded_config, mean_of, table, updates_per_s

from ocrm_ray.run_files import correction_windows

SCHEDULES = ("blocking", "overlapped")


def row_of(launch: Launch, round_number: int, schedule: str, every: int) -> list[object]:
    measured = launch.measure()
    rows = measured.steady(2 * every - 1)[:-1]  # whole periods, each with its correction; the last update has none
    windows = [w for w in correction_windows(measured.run)[1:] if w.outcome == "promoted"]
    durations = [w.ended_s - w.started_s for w in windows]
    lags = [w.lag_steps or 0 for w in windows]
    return [
        round_number,
        schedule,
        updates_per_s(rows),
        f"{sum(row['correction_wait_s'] for row in rows) / sum(row['step_s'] for row in rows):.1%}",
        mean_of(rows, "correction_wait_s") * every,
        mean_of(rows, "rollout_wait_s"),
        mean_of(rows, "idle_share", "generation"),
        mean_of(rows, "idle_share", "policy"),
        len(windows),
        statistics.fmean(durations) if windows else "none was promoted",
        statistics.fmean(lags) if windows else "",
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--every", type=int, default=10, help="k")
    parser.add_argument("--num-pairs", type=int, default=None, help="training pairs of a refit; default all")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    table_rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for round_number in range(1, options.rounds + 1):
            for schedule in SCHEDULES:
                changes = FEW_EVALUATIONS | {
                    "policy.num_updates": options.updates,
                    "correction.every": options.every,
                    "correction.num_pairs": options.num_pairs,
                    "correction.promote_after": None,
                    "correction.schedule": schedule,
                }
                name = f"{schedule}-{round_number}"
                launch = Launch(Path(folder), name, embedded_config(), changes, stages=options.stages)
                table_rows.append(row_of(launch, round_number, schedule, options.every))
    rates = {name: [row[2] for row in table_rows if row[1] == name] for name in SCHEDULES}
    best = {name: max(values) for name, values in rates.items()}
    header = ["round", "schedule", "updates/s", "waiting for corrections", "s in k updates", "rollout wait, s a step"]
    header += ["generation idle", "policy idle", "corrections", "s each", "lag, steps"]
    table(
        f"blocking against overlapped: {options.updates} embedded updates, a correction every {options.every}",
        [header, *table_rows, ["best", "overlapped / blocking", best["overlapped"] / best["blocking"]]],
    )


if __name__ == "__main__":
    main()
