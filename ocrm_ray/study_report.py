"""A study's table, picture and page: arms compared over seeds, from the run folders of a study folder."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ocrm_ray.errors import mistake
from ocrm_ray.metrics import summary_of
from ocrm_ray.plots import draw_study, save
from ocrm_ray.report import figure_text, render
from ocrm_ray.run_files import Run, correction_windows, read_run

COLUMNS = {
    "gold_peak": ("gold peak", 2, "largest mean of three neighbouring evaluations"),
    "gold_mean": ("gold at end", 2, "last evaluation"),
    "gold_share_of_peak": ("end/peak", 2, "share of the peak that is left; not given for a peak of 0 or less"),
    "gold_win_rate": ("win rate", 2, "by gold against the SFT model's responses, a tie counts half"),
    "proxy_mean": ("proxy", 2, "score of the live reward model, last evaluation"),
    "kl_sft": ("KL", 1, "from the SFT model, nats a response, last evaluation"),
    "ess_fraction": ("ESS", 3, "effective sample size of a correction's weights, mean, as a share of its pairs"),
    "wall_s": ("seconds", 0, "wall time"),
}
"""Of the study's table: a figure of ``study.json``, its title, digits and explanation."""
AVERAGED = ("gold_drop_from_peak", "lag_steps", "steps", *COLUMNS)


def write_study(study_dir: Path, arms: Sequence[str], seeds: Sequence[int]) -> Path:
    """Write ``study.json``, ``study.png`` and ``study.html``; returns the page's path.

    Runs that are not there yet are named as missing. UserError where there is none at all.
    """
    found = {arm: [s for s in seeds if (study_dir / arm / f"seed-{s}" / "metrics.jsonl").is_file()] for arm in arms}
    runs = {arm: {s: read_run(study_dir / arm / f"seed-{s}") for s in found[arm]} for arm in arms}
    if not any(runs.values()):
        need = "ARM/seed-N/ run folders of the study's arms and seeds"
        raise mistake(str(study_dir), "none of the study's runs", need, "run `ocrm-ray study` first")
    study = summarise_study(study_dir.resolve().name, runs, seeds)
    (study_dir / "study.json").write_text(json.dumps(study, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    save(draw_study({arm: list(of_arm.values()) for arm, of_arm in runs.items() if of_arm}), study_dir / "study.png")
    has_gold = any(run.has_gold for of_arm in runs.values() for run in of_arm.values())
    page = render("study.html", study=study, has_gold=has_gold, columns=COLUMNS, rows=table_rows(study))
    path = study_dir / "study.html"
    path.write_text(page, encoding="utf-8")
    return path


def summarise_study(name: str, runs: Mapping[str, Mapping[int, Run]], seeds: Sequence[int]) -> dict[str, Any]:
    """``study.json``: per arm the summaries of its seeds, their means, and their standard deviations (None for one)."""
    arms: dict[str, Any] = {}
    for arm, found in runs.items():
        summaries = {str(seed): run_figures(run) for seed, run in found.items()}
        known = {key: [row[key] for row in summaries.values() if row[key] is not None] for key in AVERAGED}
        arms[arm] = {
            "missing_seeds": [seed for seed in seeds if seed not in found],
            "mean": {key: statistics.fmean(values) if values else None for key, values in known.items()},
            "sd": {key: statistics.stdev(values) if len(values) > 1 else None for key, values in known.items()},
            "seeds": summaries,
        }
    return {"name": name, "seeds": list(seeds), "arms": arms}


def run_figures(run: Run) -> dict[str, Any]:
    """The run's summary, the share of its gold peak that is left, and its corrections' mean ESS and lag."""
    summary = summary_of(run.metrics)
    peak, gold = summary["gold_peak"], summary["gold_mean"]
    promoted = [vars(window) for window in correction_windows(run) if window.outcome == "promoted"]
    known = {key: [row[key] for row in promoted if row[key] is not None] for key in ("ess_fraction", "lag_steps")}
    means = {key: statistics.fmean(values) if values else None for key, values in known.items()}
    share = gold / peak if peak is not None and gold is not None and peak > 0 else None
    return {**summary, "gold_share_of_peak": share, "corrections": len(promoted), **means}


def table_rows(study: Mapping[str, Any]) -> list[list[str]]:
    """A row an arm: its name, its seeds (``2 of 3`` where runs are missing), and ``COLUMNS`` as mean ± deviation."""
    rows = []
    for arm, figures in study["arms"].items():
        num_found, num_all = len(figures["seeds"]), len(study["seeds"])
        cells = [str(num_all) if num_found == num_all else f"{num_found} of {num_all}"]
        for key, (_, digits, _) in COLUMNS.items():
            known = [value for value in (figures["mean"][key], figures["sd"][key]) if value is not None]
            cells.append(" ± ".join(figure_text(float(value), digits) for value in known) or figure_text(None))
        rows.append([arm, *cells])
    return rows


def study_table(study: Mapping[str, Any]) -> str:
    """``study.json`` as an aligned plain-text table."""
    rows = [["arm", "seeds", *(title for title, *_ in COLUMNS.values())], *table_rows(study)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row[1:], widths[1:])) for row in rows]
    return "\n".join(f"{row[0]:{widths[0]}}  {line}" for row, line in zip(rows, lines, strict=True))
