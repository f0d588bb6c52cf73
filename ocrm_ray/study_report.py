"""A study's table, picture and page: arms compared over seeds, from the run folders of a study folder."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ocrm_ray.errors import Problem, UserError
from ocrm_ray.plot_style import save
from ocrm_ray.report import NOT_MEASURED, figure_text, live_summary, load_template
from ocrm_ray.run_files import Run, correction_windows, read_run
from ocrm_ray.study_plot import draw_study

FIGURES = (
    "gold_peak",
    "gold_mean",
    "gold_share_of_peak",
    "gold_drop_from_peak",
    "gold_win_rate",
    "proxy_mean",
    "kl_sft",
    "ess_fraction",
    "lag_steps",
    "steps",
    "wall_s",
)
"""What is averaged over an arm's seeds."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the study's table: a figure of ``study.json`` and how it is shown."""

    title: str
    key: str
    digits: int
    explanation: str


COLUMNS = (
    Column("gold peak", "gold_peak", 2, "largest mean of three neighbouring evaluations"),
    Column("gold at end", "gold_mean", 2, "last evaluation"),
    Column("end/peak", "gold_share_of_peak", 2, "share of the peak that is left; not given for a peak of 0 or less"),
    Column("win rate", "gold_win_rate", 2, "by gold against the SFT model's responses, a tie counts half"),
    Column("proxy", "proxy_mean", 2, "score of the live reward model, last evaluation"),
    Column("KL", "kl_sft", 1, "from the SFT model, nats a response, last evaluation"),
    Column("ESS", "ess_fraction", 3, "effective sample size of a correction's weights, mean, as a share of its pairs"),
)


def write_study(study_dir: Path, arms: Sequence[str], seeds: Sequence[int]) -> Path:
    """Write ``study.json``, ``study.png`` and ``study.html``; returns the page's path.

    Runs that are not there yet are named as missing. UserError where there is none at all.
    """
    runs = {arm: {seed: run for seed in seeds if (run := _read(study_dir / arm / f"seed-{seed}"))} for arm in arms}
    if not any(runs.values()):
        need = "ARM/seed-N/ run folders of the study's arms and seeds"
        raise UserError([Problem(str(study_dir), "none of the study's runs", need, "run `ocrm-ray study` first")])
    study = summarise_study(study_dir.resolve().name, runs, seeds)
    (study_dir / "study.json").write_text(json.dumps(study, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    save(draw_study({arm: list(found.values()) for arm, found in runs.items() if found}), study_dir / "study.png")
    path = study_dir / "study.html"
    path.write_text(load_template("study.html").render(_context(study, runs)), encoding="utf-8")
    return path


def summarise_study(name: str, runs: Mapping[str, Mapping[int, Run]], seeds: Sequence[int]) -> dict[str, Any]:
    """``study.json``: per arm the summaries of its seeds, their means, and their standard deviations (None for one)."""
    arms: dict[str, Any] = {}
    for arm, found in runs.items():
        summaries = {str(seed): run_figures(run) for seed, run in found.items()}
        columns = {key: [row[key] for row in summaries.values() if row[key] is not None] for key in FIGURES}
        arms[arm] = {
            "num_seeds": len(found),
            "missing_seeds": [seed for seed in seeds if seed not in found],
            "mean": {key: statistics.fmean(values) if values else None for key, values in columns.items()},
            "sd": {key: statistics.stdev(values) if len(values) > 1 else None for key, values in columns.items()},
            "seeds": summaries,
        }
    return {"name": name, "seeds": list(seeds), "arms": arms}


def run_figures(run: Run) -> dict[str, Any]:
    """The run's summary, the share of its gold peak that is left, and its corrections' mean ESS and lag."""
    summary = live_summary(run)
    peak, gold = summary["gold_peak"], summary["gold_mean"]
    promoted = [window for window in correction_windows(run) if window.outcome == "promoted"]
    ess = [window.ess_fraction for window in promoted if window.ess_fraction is not None]
    lags = [window.lag_steps for window in promoted if window.lag_steps is not None]
    return {
        **summary,
        "gold_share_of_peak": gold / peak if peak is not None and gold is not None and peak > 0 else None,
        "corrections": len(promoted),
        "ess_fraction": statistics.fmean(ess) if ess else None,
        "lag_steps": statistics.fmean(lags) if lags else None,
    }


def study_table(study: Mapping[str, Any]) -> str:
    """``study.json`` as an aligned plain-text table, a line an arm; means over seeds, ± their standard deviation."""
    rows = [["arm", "seeds", *(column.title for column in COLUMNS)]]
    for arm, figures in study["arms"].items():
        rows.append([arm, seeds_text(figures), *(_cell(figures, column) for column in COLUMNS)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def seeds_text(figures: Mapping[str, Any]) -> str:
    """``3``, or ``2 of 3`` where runs are missing."""
    missing = len(figures["missing_seeds"])
    return f"{figures['num_seeds']} of {figures['num_seeds'] + missing}" if missing else str(figures["num_seeds"])


def _cell(figures: Mapping[str, Any], column: Column) -> str:
    mean, deviation = figures["mean"][column.key], figures["sd"][column.key]
    if mean is None:
        return NOT_MEASURED
    text = figure_text(float(mean), column.digits)
    return text if deviation is None else f"{text} ± {figure_text(deviation, column.digits)}"


def _read(run_dir: Path) -> Run | None:
    """The run, or None where it has not written a line yet."""
    return read_run(run_dir) if (run_dir / "metrics.jsonl").is_file() else None


def _context(study: Mapping[str, Any], runs: Mapping[str, Mapping[int, Run]]) -> dict[str, Any]:
    arms = study["arms"]
    return {
        "name": study["name"],
        "has_gold": any(figures["mean"]["gold_mean"] is not None for figures in arms.values()),
        "columns": COLUMNS,
        "rows": [(arm, seeds_text(row), [_cell(row, column) for column in COLUMNS]) for arm, row in arms.items()],
        "seed_rows": [
            {
                "arm": arm,
                "seed": seed,
                "report": f"{arm}/seed-{seed}/report.html" if (run.run_dir / "report.html").is_file() else None,
                "cells": [figure_text(arms[arm]["seeds"][str(seed)][column.key], column.digits) for column in COLUMNS],
                "steps": arms[arm]["seeds"][str(seed)]["steps"],
                "wall_s": arms[arm]["seeds"][str(seed)]["wall_s"],
            }
            for arm, found in runs.items()
            for seed, run in found.items()
        ],
        "missing": [(arm, seed) for arm, figures in arms.items() for seed in figures["missing_seeds"]],
    }
