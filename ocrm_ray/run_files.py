"""The files of a run folder: appends to JSON Lines, and reads everything back for reports.

Lines are flushed when written and hold finite JSON only (NaN and infinities become null).
A process killed while writing leaves at most one torn line, the last, which is passed over. A resumed run starts
again from an older step: its lines replace those of the abandoned future.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ocrm_ray.errors import Problem, UserError

Row: TypeAlias = dict[str, Any]
Column: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """The files of one run folder; what is not there yet is empty or None."""

    run_dir: Path
    config_text: str | None
    config: Mapping[str, Any]
    metrics: Sequence[Row]
    events: Sequence[Row]
    samples: Sequence[Row]
    saved_summary: Mapping[str, Any] | None

    @property
    def evaluations(self) -> list[Row]:
        """Lines of the evaluated steps."""
        return [row for row in self.metrics if row.get("proxy_mean") is not None]

    @property
    def has_gold(self) -> bool:
        return any(row.get("gold_mean") is not None for row in self.metrics)

    @property
    def last_step(self) -> int:
        """0 before the first update."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def end_s(self) -> float:
        """Seconds from the run's start to the last thing it wrote."""
        return max((float(row["time_s"]) for row in (*self.metrics, *self.events)), default=0.0)


@dataclass(frozen=True)
class CorrectionWindow:
    """One correction; times in seconds since the run's start, None for what did not happen."""

    started_s: float
    ended_s: float
    outcome: str = "in flight"
    """``promoted``, ``failed``, ``cut off`` (the run was resumed meanwhile) or ``in flight``."""
    scored_s: float | None = None
    refitted_s: float | None = None
    reward_version: int | None = None
    snapshot_version: int | None = None
    policy_version: int | None = None
    ess_fraction: float | None = None
    refit_s: float | None = None
    lag_steps: int | None = None
    num_updates: int = 0
    """Policy updates that finished inside the window."""
    rollout_tokens: int = 0
    """Tokens of the rollouts that those updates used."""


class JsonlWriter:
    """Appends objects to a JSON Lines file, each flushed; a torn last line of a killed process is cut off first."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                path.write_bytes(content[:whole])
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, object]) -> None:
        self._file.write(json.dumps(_finite(row), allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: Path) -> list[Row]:
    """Rows of a JSON Lines file, [] where there is none. UserError for a broken line that is not the last."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            problem = Problem(
                f"{path}:{number}", f"a line that is not JSON ({error.msg})", "one object a line", "repair the file"
            )
            raise UserError([problem]) from error
        rows.append(row)
    return rows


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
    import yaml

    config_path, metrics_path = run_dir / "config.yaml", run_dir / "metrics.jsonl"
    if not config_path.is_file() and not metrics_path.is_file():
        got = "a folder without config.yaml and metrics.jsonl" if run_dir.is_dir() else "no such folder"
        raise UserError([Problem(str(run_dir), got, "a run folder", "name the folder that `ocrm-ray run` wrote")])
    config_text = config_path.read_text(encoding="utf-8") if config_path.is_file() else None
    summary_path = run_dir / "summary.json"
    return Run(
        run_dir=run_dir,
        config_text=config_text,
        config=(yaml.safe_load(config_text) or {}) if config_text else {},
        metrics=rewound(read_jsonl(metrics_path)),
        events=read_jsonl(run_dir / "events.jsonl"),
        samples=read_jsonl(run_dir / "samples.jsonl"),
        saved_summary=json.loads(summary_path.read_text(encoding="utf-8")) if summary_path.is_file() else None,
    )


def column(rows: Sequence[Row], key: str, part: str | None = None) -> Column:
    """[len(rows)] of a key, or of a part of a nested key such as ``stage_s``; null and absent become NaN."""
    values = (row.get(key) if part is None else (row.get(key) or {}).get(part) for row in rows)
    return np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)


def correction_windows(run: Run) -> list[CorrectionWindow]:
    """The run's corrections in order. At most one is in flight, so events pair up by their order."""
    windows: list[CorrectionWindow] = []
    current: CorrectionWindow | None = None
    for event in run.events:
        name, now = event["event"], float(event["time_s"])
        if name == "correction_started":
            current = CorrectionWindow(started_s=now, ended_s=now, snapshot_version=event.get("snapshot_version"))
        elif name == "ratios_scored" and current is not None:
            current = replace(current, scored_s=now)
        elif name == "refit_finished" and current is not None:
            current = replace(current, refitted_s=now)
        elif name == "promoted":
            windows.append(_promoted(current or CorrectionWindow(started_s=now, ended_s=now), event))
            current = None
        elif name in ("correction_failed", "resumed") and current is not None:
            windows.append(
                replace(current, ended_s=now, outcome="failed" if name == "correction_failed" else "cut off")
            )
            current = None
    if current is not None:
        windows.append(replace(current, ended_s=run.end_s))
    return [_with_rollouts(window, run.metrics) for window in windows]


def _promoted(window: CorrectionWindow, event: Row) -> CorrectionWindow:
    return replace(
        window,
        ended_s=float(event["time_s"]),
        outcome="promoted",
        reward_version=event.get("reward_version"),
        snapshot_version=event.get("snapshot_version", window.snapshot_version),
        policy_version=event.get("policy_version"),
        ess_fraction=event.get("ess_fraction"),
        refit_s=event.get("refit_s"),
        lag_steps=event.get("lag_steps"),
    )


def _with_rollouts(window: CorrectionWindow, metrics: Sequence[Row]) -> CorrectionWindow:
    inside = [row for row in metrics if row.get("step_s") is not None and within(row, window)]
    tokens = sum(int(row.get("rollout_tokens") or 0) for row in inside)
    return replace(window, num_updates=len(inside), rollout_tokens=tokens)


def within(row: Row, window: CorrectionWindow) -> bool:
    """Whether a step ended inside a correction."""
    return window.started_s < float(row["time_s"]) <= window.ended_s


def tokens_per_s(run: Run, windows: Sequence[CorrectionWindow]) -> tuple[float | None, float | None]:
    """Rollout tokens a second of training: (while a correction was in flight, otherwise); None where no step was."""
    totals = {True: [0.0, 0.0], False: [0.0, 0.0]}
    for row in run.metrics:
        if row.get("step_s") and row.get("rollout_tokens") is not None:
            total = totals[any(within(row, window) for window in windows)]
            total[0] += float(row["rollout_tokens"])
            total[1] += float(row["step_s"])
    during, otherwise = (tokens / seconds if seconds else None for tokens, seconds in (totals[True], totals[False]))
    return during, otherwise


def _finite(value: object) -> object:
    """The same as JSON values: NaN and infinities None, numpy numbers and arrays as Python's."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
