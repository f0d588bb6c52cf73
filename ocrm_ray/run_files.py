"""The files of a run folder: appends to JSON Lines, and reads everything back for reports.

Lines hold finite JSON only (NaN and infinities become null) and are flushed when written. A process killed while
writing leaves at most one torn line, the last, which is passed over. A resumed run starts again from an older step:
its lines replace those of the abandoned future.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ocrm_ray.data_files import BrokenLineError, json_rows
from ocrm_ray.errors import mistake

Row: TypeAlias = dict[str, Any]
Column: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """The files of one run folder; what is not there yet is empty."""

    run_dir: Path
    config_text: str
    metrics: Sequence[Row]
    events: Sequence[Row]
    samples: Sequence[Row]

    @property
    def evaluations(self) -> list[Row]:
        """Lines of the evaluated steps."""
        return [row for row in self.metrics if row.get("proxy_mean") is not None]

    @property
    def has_gold(self) -> bool:
        return any(row.get("gold_mean") is not None for row in self.metrics)


@dataclass
class CorrectionWindow:
    """One correction; times in seconds since the run's start, None for what did not happen."""

    started_s: float
    ended_s: float
    snapshot_version: int | None = None
    outcome: str = "in flight"  # or one of OUTCOMES
    scored_s: float | None = None
    refitted_s: float | None = None
    reward_version: int | None = None
    policy_version: int | None = None
    ess_fraction: float | None = None
    max_weight_share: float | None = None
    log_weight_std: float | None = None
    length_correlation: float | None = None
    lag_steps: int | None = None
    num_rollouts_finished: int | None = None

    def is_later_than(self, step: int) -> bool:
        """Whether it started, or was promoted, behind update ``step``."""
        return max(self.snapshot_version or 0, self.policy_version or 0) > step


PHASE_ENDS = {"ratios_scored": "scored_s", "refit_finished": "refitted_s"}
OUTCOMES = {"promoted": "promoted", "correction_failed": "failed", "resumed": "cut off"}
"""By the event that ends a correction; a run that is resumed has lost it."""


class JsonlWriter:
    """Appends objects to a JSON Lines file; a torn last line of a killed process is cut off first."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self.close = self._file.close

    def write(self, row: Mapping[str, object]) -> None:
        """Numpy numbers and arrays become Python's, paths text."""
        plain = json.dumps(dict(row), default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
        finite = json.loads(plain, parse_constant=lambda _: None)
        self._file.write(json.dumps(finite, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[Row]:
    """Rows of a JSON Lines file, [] where there is none. UserError for a broken line that is not the last."""
    content = path.read_bytes() if path.exists() else b""
    rows: list[Row] = []
    try:
        for row in json_rows(content.split(b"\n")):
            rows.append(row)
    except BrokenLineError as error:
        if error.line <= content.count(b"\n"):
            got = f"a line that is not JSON ({error.reason})"
            raise mistake(f"{path}:{error.line}", got, "one object a line", "repair the file") from error
    return rows


def last_time_s(*files: Iterable[Row]) -> float:
    """The largest ``time_s`` of all rows; 0 of none."""
    return max((float(row["time_s"]) for rows in files for row in rows), default=0.0)


def rewound(rows: Iterable[Row]) -> list[Row]:
    """Metrics in step order: a step that goes back (a resumed run) replaces what came after it."""
    kept: list[Row] = []
    for row in rows:
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def read_run(run_dir: Path) -> Run:
    """Everything that a report needs. UserError where ``run_dir`` is no run folder."""
    config_path, metrics_path = run_dir / "config.yaml", run_dir / "metrics.jsonl"
    if not config_path.is_file() and not metrics_path.is_file():
        got = "a folder without config.yaml and metrics.jsonl" if run_dir.is_dir() else "no such folder"
        raise mistake(str(run_dir), got, "a run folder", "name the folder that `ocrm-ray run` wrote")
    return Run(
        run_dir=run_dir,
        config_text=config_path.read_text(encoding="utf-8") if config_path.is_file() else "",
        metrics=rewound(read_jsonl(metrics_path)),
        events=read_jsonl(run_dir / "events.jsonl"),
        samples=read_jsonl(run_dir / "samples.jsonl"),
    )


def column(rows: Sequence[Row], key: str, part: str | None = None) -> Column:
    """[len(rows)] of a key, or of a part of a nested key such as ``stage_s``; null and absent become NaN."""
    values = [row.get(key) if part is None else (row.get(key) or {}).get(part) for row in rows]
    return np.array(values, dtype=np.float64)


def correction_windows(run: Run) -> list[CorrectionWindow]:
    """The run's corrections in order, without those that a resumed run did again.

    At most one is in flight, so an event belongs to the last one started.
    """
    windows: list[CorrectionWindow] = []
    for event in run.events:
        name, now = event["event"], float(event["time_s"])
        if name == "resumed":
            windows = [window for window in windows if not window.is_later_than(event["step"])]
        if name == "correction_started":
            end_s = last_time_s(run.metrics, run.events)
            windows.append(CorrectionWindow(now, end_s, event.get("snapshot_version")))
        elif windows and windows[-1].outcome == "in flight":
            told: Row = {PHASE_ENDS[name]: now} if name in PHASE_ENDS else {}
            told |= {"outcome": OUTCOMES[name], "ended_s": now} if name in OUTCOMES else {}
            tells = name in ("ratios_scored", "promoted")
            told |= {key: event[key] for key in vars(windows[-1]).keys() & event} if tells else {}
            vars(windows[-1]).update(told)
    return windows
