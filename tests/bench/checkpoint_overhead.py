"""What checkpoints cost the updates beside which they are written, on SmolLM2-135M:

    PYTHONPATH=. .venv/bin/python tests/bench/checkpoint_overhead.py --model SMOLLM2_DIR --prompts ALPACA.json
        [--updates 60] [--every 10]

One run with a checkpoint every so many updates. The update behind a checkpoint copies the state out, and those until
``checkpoint_saved`` share the cores with who writes it; all others have nothing to do with it. The excess of the first
over the median of the others, by the time of ``--every`` updates, is the overhead.
"""

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from against_trl import smollm2_launch
from measured_run import MeasuredRun, arguments, note, table


def windows(measured: MeasuredRun, every: int) -> list[tuple[int, list[float]]]:
    """For each checkpoint but one at the very end: its step, and the seconds of the updates that it may have slowed."""
    saved = {row["step"]: row["time_s"] for row in measured.run.events if row["event"] == "checkpoint_saved"}
    rows = [row for row in measured.run.metrics if row["step"] > 0]
    touched = {
        step: [row["step_s"] for row in rows if row["step"] > step and row["time_s"] - row["step_s"] < ended_s]
        for step, ended_s in saved.items()
        if step + every <= rows[-1]["step"]
    }
    return sorted(touched.items())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--every", type=int, default=10)
    options = parser.parse_args()
    options.model = options.model.resolve()
    with tempfile.TemporaryDirectory() as folder:
        launch = smollm2_launch(Path(folder), options)
        launch = replace(launch, overrides=launch.overrides | {"checkpoint.every": options.every})
        measured = launch.measure()
        found = windows(measured, options.every)
        slowed = {step + 1 + place for step, seconds in found for place in range(len(seconds))}
        clean = [row["step_s"] for row in measured.run.metrics if row["step"] > 2 and row["step"] not in slowed]
        usual_s = statistics.median(clean)
        rows: list[list[object]] = []
        for step, seconds in found:
            excess_s = sum(seconds) - len(seconds) * usual_s
            rows.append([step, len(seconds), sum(seconds), excess_s, f"{excess_s / (options.every * usual_s):.1%}"])
    table("checkpoints", [["behind update", "updates beside it", "their seconds", "excess s", "overhead"], *rows])
    shares = [float(str(row[-1]).rstrip("%")) for row in rows]
    note(f"median update {usual_s:.2f} s; overhead: mean {statistics.fmean(shares):.1f} %, each {shares}")


if __name__ == "__main__":
    main()
