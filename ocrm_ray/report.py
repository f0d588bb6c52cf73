"""``report.html`` and ``plots/*.png`` of one run, rebuilt from the files in its folder and nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ocrm_ray.metrics import POOLS, STAGES, summary_of
from ocrm_ray.plot_style import save
from ocrm_ray.plots import draw_all
from ocrm_ray.progress import duration_text
from ocrm_ray.run_files import CorrectionWindow, Row, Run, column, correction_windows, read_run, tokens_per_s

if TYPE_CHECKING:
    from jinja2 import Template

NOT_MEASURED = "n/a"


@dataclass(frozen=True, slots=True)
class Fact:
    """A line of a table of figures; ``note`` says what the figure means."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class SampleSide:
    """One prompt's response at the first and at the last evaluation; None where one lacks it."""

    prompt: str
    first: Row | None
    last: Row | None


def write_report(run_dir: Path) -> Path:
    """Draw the pictures and write the page; returns its path. UserError where ``run_dir`` is no run folder."""
    run = read_run(run_dir)
    pictures = draw_all(run)
    for name, figure in pictures.items():
        save(figure, run_dir / "plots" / f"{name}.png")
    path = run_dir / "report.html"
    path.write_text(render_report(run, set(pictures)), encoding="utf-8")
    return path


def render_report(run: Run, pictures: set[str]) -> str:
    """The page, showing ``plots/NAME.png`` for the given names."""
    return load_template("report.html").render(report_context(run, pictures))


def load_template(name: str) -> "Template":
    """A page template: values are escaped, a missing one is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure_text
    environment.filters["duration"] = lambda seconds: NOT_MEASURED if seconds is None else duration_text(seconds)
    return environment.get_template(name)


def figure_text(value: float | None, digits: int = 3) -> str:
    """``3.142``, ``12,400`` for whole numbers, ``n/a`` for what was not measured."""
    if value is None or value != value:
        return NOT_MEASURED
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def report_context(run: Run, pictures: set[str]) -> dict[str, Any]:
    """What the template shows."""
    windows = correction_windows(run)
    summary = live_summary(run)
    first, last, sides = sample_sides(run.samples)
    return {
        "name": run.run_dir.resolve().name,
        "status": status(run),
        "has_gold": run.has_gold,
        "has_steps": bool(run.metrics),
        "summary": summary_facts(summary, len(run.evaluations)),
        "windows": windows,
        "headline": headline(run, windows),
        "correction_facts": correction_facts(run, windows),
        "machine": machine_facts(run),
        "pictures": pictures,
        "first_step": first,
        "last_step": last,
        "sides": sides,
        "config_text": run.config_text,
        "incidents": incidents(run.events),
    }


def live_summary(run: Run) -> Mapping[str, Any]:
    """``summary.json`` where it tells of the last step in metrics.jsonl; a run that goes on is summed up anew."""
    if run.saved_summary is not None and run.saved_summary.get("steps") == run.last_step:
        return run.saved_summary
    return summary_of(run.metrics)


def status(run: Run) -> str:
    """Whether the run is finished, in words."""
    planned = (run.config.get("policy") or {}).get("num_updates")
    if not run.metrics:
        return "No policy update yet."
    if planned is None:
        return f"{run.last_step} policy updates."
    if run.last_step >= planned:
        return f"Finished: {run.last_step} policy updates."
    return f"Unfinished: {run.last_step} of {planned} policy updates."


def summary_facts(summary: Mapping[str, Any], num_evaluations: int) -> list[Fact]:
    """``summary.json`` as a table; gold lines only where there is gold."""
    facts: list[Fact] = []
    if summary["gold_mean"] is not None:
        gold = f"{figure_text(summary['gold_mean'])} ± {figure_text(summary['gold_se'])}"
        peak_note = "largest mean of three neighbouring evaluations"
        facts += [
            Fact("Gold reward", gold, "last evaluation, mean ± standard error over held-out prompts"),
            Fact("Gold win rate", figure_text(summary["gold_win_rate"]), "against the SFT model, a tie counts half"),
            Fact("Gold peak", figure_text(summary["gold_peak"]), peak_note if num_evaluations >= 3 else "mean so far"),
            Fact("Gold drop from peak", figure_text(summary["gold_drop_from_peak"]), "peak less last evaluation"),
        ]
    facts += [
        Fact("Proxy reward", figure_text(summary["proxy_mean"]), "score of the live reward model, last evaluation"),
        Fact("KL from the SFT model", figure_text(summary["kl_sft"]), "nats a response, last evaluation"),
        Fact("Policy updates", figure_text(summary["steps"])),
        Fact("Wall time", duration_text(summary["wall_s"])),
    ]
    return facts


def headline(run: Run, windows: Sequence[CorrectionWindow]) -> str | None:
    """Whether rollouts went on while corrections were in flight, in one sentence."""
    during, otherwise = tokens_per_s(run, windows)
    if during is None or otherwise is None:
        return None
    return (
        f"While a correction was in flight, training consumed {during:,.0f} rollout tokens a second; "
        f"otherwise {otherwise:,.0f} (ratio {during / otherwise:.2f})."
    )


def correction_facts(run: Run, windows: Sequence[CorrectionWindow]) -> list[Fact]:
    """What corrections and staleness cost; sums over the run."""
    promoted = [window for window in windows if window.outcome == "promoted"]
    lags = [window.lag_steps for window in promoted if window.lag_steps is not None]
    facts = [Fact("Promoted", f"{len(promoted)} of {len(windows)}")] if windows else []
    if lags:
        facts.append(Fact("Lag", f"{np.mean(lags):.1f} updates", f"from snapshot to promotion; at most {max(lags)}"))
    waits = (
        ("correction_wait_s", "Training waited for corrections"),
        ("straggler_wait_s", "Training waited for stragglers"),
    )
    facts += [Fact(name, duration_text(total(run.metrics, key))) for key, name in waits if measured(run.metrics, key)]
    counts = (("num_deferred_corrections", "Corrections deferred"), ("num_reissued", "Rollouts issued again"))
    facts += [Fact(name, f"{total(run.metrics, key):.0f}") for key, name in counts if measured(run.metrics, key)]
    return facts


def machine_facts(run: Run) -> list[Fact]:
    """Step time, idle pools, publishes and the sampler's agreement with the trainer."""
    updates = [row for row in run.metrics if row.get("step_s") is not None]
    if not updates:
        return []
    facts = [Fact("Step", duration_text(float(np.median(column(updates, "step_s")))), "median")]
    stages = [
        f"{stage} {np.nanmedian(column(updates, 'stage_s', stage)):.2f} s"
        for stage in _known(updates, "stage_s", STAGES)
    ]
    facts.append(Fact("Stages", ", ".join(stages) or NOT_MEASURED, "median; they overlap"))
    idle = [
        f"{pool} {np.nanmean(column(updates, 'idle_share', pool)):.1%}" for pool in _known(updates, "idle_share", POOLS)
    ]
    facts.append(Fact("Idle", ", ".join(idle) or NOT_MEASURED, "mean share of wall time with no request in the pool"))
    published = [event for event in run.events if event["event"] == "weights_published"]
    if published:
        pause_ms = 1000 * np.nanmedian(column(published, "pause_s"))
        text = f"{len(published)} times, {np.nanmedian(column(published, 'bytes')) / 1e6:.1f} MB"
        facts.append(Fact("Weights published", text, f"generation stood still for {pause_ms:.0f} ms (median)"))
    gaps = column(updates, "logprob_gap")
    if np.isfinite(gaps).any():
        facts.append(
            Fact("Trainer against sampler", f"{np.nanmax(gaps):.4f} nats a token", "largest mean gap of a step")
        )
    return facts


def incidents(events: Sequence[Row]) -> list[Row]:
    """Events that a reader should know of: deaths, restarts, failed corrections, resumes."""
    names = ("actor_died", "actor_restarted", "correction_failed", "resumed")
    return [
        {
            "time_s": float(event["time_s"]),
            "event": event["event"],
            "fields": ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("time_s", "event")),
        }
        for event in events
        if event["event"] in names
    ]


def sample_sides(samples: Sequence[Row]) -> tuple[int | None, int | None, list[SampleSide]]:
    """(first step, last step, prompts of both side by side)."""
    steps = sorted({int(row["step"]) for row in samples})
    if not steps:
        return None, None, []
    first, last = ({row["prompt"]: row for row in samples if row["step"] == step} for step in (steps[0], steps[-1]))
    if steps[0] == steps[-1]:
        return steps[0], None, [SampleSide(prompt, row, None) for prompt, row in first.items()]
    prompts = [*last, *(prompt for prompt in first if prompt not in last)]
    return steps[0], steps[-1], [SampleSide(prompt, first.get(prompt), last.get(prompt)) for prompt in prompts]


def total(rows: Sequence[Row], key: str) -> float:
    return float(np.nansum(column(rows, key)))


def measured(rows: Sequence[Row], key: str) -> bool:
    return any(row.get(key) is not None for row in rows)


def _known(rows: Sequence[Row], key: str, parts: Sequence[str]) -> list[str]:
    return [part for part in parts if np.isfinite(column(rows, key, part)).any()]
