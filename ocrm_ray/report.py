"""``report.html`` and ``plots/*.png`` of one run, rebuilt from the files in its folder and nothing else."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ocrm_ray.metrics import POOLS, summary_of
from ocrm_ray.plots import draw_run, save
from ocrm_ray.progress import duration_text
from ocrm_ray.run_files import Column, Row, Run, column, correction_windows, read_run

if TYPE_CHECKING:
    from jinja2 import Template

NOT_MEASURED = "n/a"
WAITS = ("rollout_wait_s", "straggler_wait_s", "correction_wait_s")
COUNTS = ("num_deferred_corrections", "num_reissued", "num_rescored_late")
REDUCTIONS: Mapping[str, Callable[[Column], Any]] = {
    "step_s": np.median, **dict.fromkeys((*WAITS, *COUNTS), np.sum), "logprob_gap": np.max
}  # fmt: skip
"""Columns of metrics.jsonl, and how each is reduced over the run."""


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
        measured=measured(run.metrics),
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


def measured(metrics: Sequence[Row]) -> dict[str, float]:
    """The columns of ``REDUCTIONS`` over the run, and each pool's mean idle share, as far as they were measured."""
    columns = {key: column(metrics, key) for key in REDUCTIONS}
    columns |= {pool: column(metrics, "idle_share", pool) for pool in POOLS}
    known = {key: values[np.isfinite(values)] for key, values in columns.items()}
    return {key: float(REDUCTIONS.get(key, np.mean)(values)) for key, values in known.items() if values.size}


def shown_samples(samples: Sequence[Row]) -> tuple[list[int], list[tuple[str, list[Row | None]]]]:
    """The first and the last evaluated step, and each prompt's sample at these; None where it has none."""
    steps = sorted({int(row["step"]) for row in samples})
    shown = sorted({*steps[:1], *steps[-1:]})
    found = {(row["prompt"], row["step"]): row for row in samples if row["step"] in shown}
    prompts = dict.fromkeys(prompt for prompt, _ in found)
    return shown, [(prompt, [found.get((prompt, step)) for step in shown]) for prompt in prompts]
