"""``report.html`` and ``plots/*.png`` of one run, rebuilt from the files in its folder and nothing else."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ocrm_ray.metrics import POOLS, summary_of
from ocrm_ray.plots import draw_run, save
from ocrm_ray.progress import duration_text
from ocrm_ray.run_files import Row, Run, column, correction_windows, read_run

if TYPE_CHECKING:
    from jinja2 import Template

Fact: TypeAlias = tuple[str, str, str]
"""Name, value, what the figure means."""

NOT_MEASURED = "n/a"
MEASURES = (
    ("step_s", np.median, "Step", "seconds, median"),
    ("rollout_wait_s", np.sum, "Training waited for rollouts", "seconds, stragglers included"),
    ("straggler_wait_s", np.sum, "Training waited for stragglers", "seconds"),
    ("correction_wait_s", np.sum, "Training waited for corrections", "seconds"),
    ("num_deferred_corrections", np.sum, "Corrections deferred", "fell due while one was in flight"),
    ("num_reissued", np.sum, "Rollouts issued again", "aborted at the staleness bound"),
    ("num_rescored_late", np.sum, "Rollouts scored again", "while training waited, after a promotion"),
    ("logprob_gap", np.max, "Trainer against sampler", "largest mean gap of a step, nats a token"),
)
"""Columns of metrics.jsonl, and how each is reduced over the run."""
INCIDENTS = ("actor_died", "actor_restarted", "correction_failed", "resumed")


def write_report(run_dir: Path) -> Path:
    """Draw the pictures and write the page; returns its path. UserError where ``run_dir`` is no run folder."""
    run = read_run(run_dir)
    pictures = draw_run(run)
    for name, figure in pictures.items():
        save(figure, run_dir / "plots" / f"{name}.png")
    path = run_dir / "report.html"
    path.write_text(render_report(run, pictures), encoding="utf-8")
    return path


def render_report(run: Run, pictures: Collection[str]) -> str:
    """The page, showing ``plots/NAME.png`` for the given names."""
    import yaml

    steps, samples = shown_samples(run.samples)
    return load_template("report.html").render(
        name=run.run_dir.resolve().name,
        run=run,
        planned=(yaml.safe_load(run.config_text) or {}).get("policy", {}).get("num_updates", 0),
        pictures=pictures,
        summary=summary_of(run.metrics),
        windows=correction_windows(run),
        machine=list(machine_facts(run.metrics)),
        incidents=[event for event in run.events if event["event"] in INCIDENTS],
        sample_steps=steps,
        samples=samples,
    )


def load_template(name: str) -> "Template":
    """A page template: values are escaped, a missing one is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(figure=figure_text, duration=duration_text)
    return environment.get_template(name)


def figure_text(value: float | None, digits: int = 3) -> str:
    """``3.142``, ``12,400`` for whole numbers, ``n/a`` for what was not measured."""
    if value is None or value != value:
        return NOT_MEASURED
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def machine_facts(metrics: Sequence[Row]) -> Iterator[Fact]:
    """Step time, waits, idle pools and the sampler's agreement with the trainer, as far as they were measured."""
    for key, reduce, name, note in MEASURES:
        values = column(metrics, key)
        if (known := values[np.isfinite(values)]).size:
            total = float(reduce(known))
            yield name, figure_text(int(total) if key.startswith("num_") else total), note
    for pool in POOLS:
        idle = column(metrics, "idle_share", pool)
        if np.isfinite(idle).any():
            yield f"Idle: {pool}", f"{np.nanmean(idle):.1%}", "mean share of wall time with no request in the pool"


def shown_samples(samples: Sequence[Row]) -> tuple[list[int], list[tuple[str, list[Row | None]]]]:
    """The first and the last evaluated step, and each prompt's sample at these; None where it has none."""
    steps = sorted({int(row["step"]) for row in samples})
    shown = sorted({*steps[:1], *steps[-1:]})
    found = {(row["prompt"], row["step"]): row for row in samples if row["step"] in shown}
    prompts = dict.fromkeys(prompt for prompt, _ in found)
    return shown, [(prompt, [found.get((prompt, step)) for step in shown]) for prompt in prompts]
