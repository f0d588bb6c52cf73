"""A study's table, picture and page: arms compared over seeds, from the run folders of a study folder."""

import json
import statistics
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from ocrm_ray.config import StudyConfig
from ocrm_ray.config_file import EARLY_STOPPING
from ocrm_ray.errors import mistake
from ocrm_ray.metrics import summary_of
from ocrm_ray.plots import draw_study, save
from ocrm_ray.report import figure_text, render
from ocrm_ray.run_files import Row, Run, correction_windows, read_run
from ocrm_ray.seed_statistics import mean_interval, paired_bootstrap
from ocrm_ray.whole_files import write_whole

COLUMNS = {
    "gold_mean": ("gold at end", 2, "last evaluation"),
    "gold_peak": ("gold peak", 2, "largest mean of three neighbouring evaluations"),
    "gold_drop_from_peak": ("drop", 2, "from the peak to the end, below 0 while gold still rises"),
    "gold_win_rate": ("win rate", 2, "by gold against the SFT model's responses, a tie counts half"),
    "proxy_mean": ("proxy", 2, "score of the live reward model, last evaluation"),
    "kl_sft": ("KL", 1, "from the SFT model, nats a response, last evaluation"),
    "rm_accuracy": ("RM accuracy", 3, "of the live reward model on pairs of the policy's own samples, last evaluation"),
    "ess_fraction": ("ESS", 3, "effective sample size of a correction's weights, mean, as a share of its pairs"),
    "wall_s": ("seconds", 0, "wall time"),
}
"""Of the study's table: a figure of ``study.json``, its title, digits and explanation."""
AVERAGED = ("gold_share_of_peak", "lag_steps", "steps", *COLUMNS)
HALVES = ("gold_mean_even", "gold_mean_odd")
Runs = Mapping[str, Mapping[int, Run]]


def write_study(study_dir: Path, plan: StudyConfig) -> Path:
    """Write ``study.json``, ``study.md``, ``study.png`` and ``study.html``; returns the page's path.

    Runs without a summary yet are named as missing. UserError where there is none at all.
    """
    runs = {
        arm: {seed: read_run(folder) for seed in plan.seeds_of(arm) if (folder := _finished(study_dir, arm, seed))}
        for arm in plan.arms
    }
    if not any(runs.values()):
        need = "finished ARM/seed-N/ run folders of the study's arms and seeds"
        raise mistake(str(study_dir), "none of the study's runs", need, "run `ocrm-ray study` first")
    study = summarise_study(plan, runs)
    write_whole(study_dir / "study.json", [json.dumps(study, indent=2, allow_nan=False) + "\n"])
    write_whole(study_dir / "study.md", [markdown_table(study)])
    save(draw_study({arm: list(of_arm.values()) for arm, of_arm in runs.items() if of_arm}), study_dir / "study.png")
    has_gold = any(run.has_gold for of_arm in runs.values() for run in of_arm.values())
    page = render(
        "study.html",
        study=study,
        has_gold=has_gold,
        columns=COLUMNS,
        titles=table_titles(study),
        rows=table_rows(study),
    )
    path = study_dir / "study.html"
    write_whole(path, [page])
    return path


def rewrite_study(study_dir: Path) -> Path:
    """``write_study`` of what the folder's own ``study.json`` says was planned."""
    study = json.loads((study_dir / "study.json").read_text(encoding="utf-8"))
    arms = {arm: figures["seeds_planned"] for arm, figures in study["arms"].items()}
    if study["early_stopping"] is not None:
        del arms[EARLY_STOPPING]
    named = {key: study[key] for key in ("name", "control", "early_stopping")}
    return write_study(study_dir, StudyConfig(base={}, arms={arm: {} for arm in arms}, arm_seeds=arms, **named))


def summarise_study(plan: StudyConfig, runs: Runs) -> dict[str, Any]:
    """``study.json``: per arm the figures of its seeds, means, deviations, 95 % intervals, and the control compared.

    What one seed cannot give is None.
    """
    figures = {arm: {seed: run_figures(run) for seed, run in found.items()} for arm, found in runs.items()}
    seeds = {arm: plan.seeds_of(arm) for arm in figures}
    if plan.early_stopping is not None:
        stopped = {seed: stopped_figures(run.evaluations) for seed, run in runs[plan.early_stopping].items()}
        figures[EARLY_STOPPING] = {seed: row for seed, row in stopped.items() if row is not None}
        seeds[EARLY_STOPPING] = seeds[plan.early_stopping]
    control = {} if plan.control is None else figures[plan.control]
    arms = {
        arm: {
            "seeds_planned": list(seeds[arm]),
            "missing_seeds": [seed for seed in seeds[arm] if seed not in rows],
            **_statistics(list(rows.values())),
            "against_control": None if arm == plan.control else compare(rows, control),
            "seeds": {str(seed): row for seed, row in rows.items()},
        }
        for arm, rows in figures.items()
    }
    return {"name": plan.name, "control": plan.control, "early_stopping": plan.early_stopping, "arms": arms}


def run_figures(run: Run) -> dict[str, Any]:
    """The run's summary, the share of its gold peak that is left, and its corrections' mean ESS and lag."""
    summary = summary_of(run.metrics)
    peak, gold = summary["gold_peak"], summary["gold_mean"]
    promoted = [vars(window) for window in correction_windows(run) if window.outcome == "promoted"]
    known = {key: [row[key] for row in promoted if row[key] is not None] for key in ("ess_fraction", "lag_steps")}
    means = {key: statistics.fmean(values) if values else None for key, values in known.items()}
    return {
        **summary,
        "gold_share_of_peak": gold / peak if peak is not None and gold is not None and peak > 0 else None,
        "rm_accuracy": run.evaluations[-1].get("rm_accuracy") if run.evaluations else None,
        "corrections": len(promoted),
        **means,
    }


def stopped_figures(evaluations: Sequence[Row]) -> dict[str, Any] | None:
    """Gold of a run stopped at its gold peak; None where the halves of the prompts were not measured.

    The evaluation that is best on one half of the prompts gives the gold of the other half; both ways, averaged, and
    so are the other figures, as far as they are not chosen for.
    """
    known = [row for row in evaluations if all(row.get(half) is not None for half in HALVES)]
    if not known:
        return None
    chosen = [max(known, key=itemgetter(half)) for half in HALVES]
    told = [row[half] for row, half in zip(chosen, reversed(HALVES), strict=True)]
    rows = {"proxy_mean": "proxy_mean", "kl_sft": "eval_kl_sft", "steps": "step", "wall_s": "time_s"}
    measured = {key: [row[name] for row in chosen] for key, name in rows.items()}
    measured["rm_accuracy"] = [row.get("rm_accuracy") for row in chosen]
    means = {key: statistics.fmean(values) for key, values in measured.items() if None not in values}
    return {
        **dict.fromkeys(AVERAGED),
        **means,
        "gold_mean": statistics.fmean(told),
        "chosen": [r["step"] for r in chosen],
    }


def compare(rows: Mapping[int, Row], control: Mapping[int, Row]) -> dict[str, Any] | None:
    """Final gold less the control's, over the seeds that both have; None where there are none."""
    both = [seed for seed in rows if seed in control]
    pairs = [(rows[seed]["gold_mean"], control[seed]["gold_mean"]) for seed in both]
    differences = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    if not differences:
        return None
    interval, share_above = paired_bootstrap(differences) if len(differences) > 1 else (None, None)
    mean = statistics.fmean(differences)
    return {"num_seeds": len(differences), "mean": mean, "interval": interval, "share_above": share_above}


def _finished(study_dir: Path, arm: str, seed: int) -> Path | None:
    folder = study_dir / arm / f"seed-{seed}"
    return folder if (folder / "summary.json").is_file() else None


def _statistics(rows: Sequence[Row]) -> dict[str, Any]:
    known = {key: [row[key] for row in rows if row[key] is not None] for key in AVERAGED}
    return {
        "mean": {key: statistics.fmean(values) if values else None for key, values in known.items()},
        "sd": {key: statistics.stdev(values) if len(values) > 1 else None for key, values in known.items()},
        "interval": {key: mean_interval(values) for key, values in known.items()},
    }


def table_titles(study: Mapping[str, Any]) -> list[str]:
    """Of the columns of ``table_rows``."""
    against = [f"gold - {study['control']}", "above 0"] if study["control"] else []
    return ["arm", "seeds", *(title for title, *_ in COLUMNS.values()), *against]


def table_rows(study: Mapping[str, Any]) -> list[list[str]]:
    """A row an arm: its name, its seeds (``2 of 3`` where runs are missing), ``COLUMNS`` as mean ± half the interval.

    With a control also the difference from it with its interval, and the share of resamples above 0.
    """
    rows = []
    for arm, figures in study["arms"].items():
        num_found, num_all = len(figures["seeds"]), len(figures["seeds_planned"])
        cells = [str(num_all) if num_found == num_all else f"{num_found} of {num_all}"]
        for key, (_, digits, _) in COLUMNS.items():
            mean, interval = figures["mean"][key], figures["interval"][key]
            half = [] if interval is None else [(interval[1] - interval[0]) / 2]
            cells.append(" ± ".join(figure_text(None if v is None else float(v), digits) for v in (mean, *half)))
        rows.append([arm, *cells, *(_comparison_cells(figures["against_control"]) if study["control"] else [])])
    return rows


def _comparison_cells(against: Mapping[str, Any] | None) -> list[str]:
    if against is None:
        return ["", ""]
    if against["interval"] is None:
        return [f"{against['mean']:+.2f}", ""]
    low, high = against["interval"]
    return [f"{against['mean']:+.2f} ({low:+.2f} to {high:+.2f})", f"{against['share_above']:.1%}"]


def markdown_table(study: Mapping[str, Any]) -> str:
    """``study.json`` as a Markdown table."""
    titles, *rows = table_titles(study), *table_rows(study)
    marks = ["---", *["---:"] * (len(titles) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (titles, marks, *rows))


def study_table(study: Mapping[str, Any]) -> str:
    """``study.json`` as an aligned plain-text table."""
    rows = [table_titles(study), *table_rows(study)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row[1:], widths[1:])) for row in rows]
    return "\n".join(f"{row[0]:{widths[0]}}  {line}" for row, line in zip(rows, lines, strict=True))
