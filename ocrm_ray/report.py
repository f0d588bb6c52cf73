"""``report.html`` and ``plots/*.png`` of one run, rebuilt from the files in its folder and nothing else."""

from collections.abc import Collection
from pathlib import Path
from statistics import fmean, median

from ocrm_ray.metrics import POOLS, summary_of
from ocrm_ray.plots import draw_run, save
from ocrm_ray.progress import duration_text
from ocrm_ray.run_files import Run, correction_windows, read_run
from ocrm_ray.whole_files import write_whole


def write_report(run_dir: Path) -> Path:
    """Draw the pictures and write the page; returns its path. UserError where ``run_dir`` is no run folder."""
    run = read_run(run_dir)
    pictures = draw_run(run)
    for name, figure in pictures.items():
        save(figure, run_dir / "plots" / f"{name}.png")
    path = run_dir / "report.html"
    write_whole(path, [render_report(run, pictures)])
    return path


def render_report(run: Run, pictures: Collection[str]) -> str:
    """The page, showing ``plots/NAME.png`` for the given names."""
    import yaml

    planned = (yaml.safe_load(run.config_text) or {}).get("policy", {}).get("num_updates", 0)
    summary, windows = summary_of(run.metrics), correction_windows(run)
    return render("report.html", run=run, planned=planned, pictures=pictures, summary=summary, windows=windows)


def render(template: str, **content: object) -> str:
    """A page from its template: values are escaped, a missing one is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(figure=figure_text, duration=duration_text)
    environment.globals.update(POOLS=POOLS, mean=fmean, median=median, sum=sum, max=max)
    return environment.get_template(template).render(content)


def figure_text(value: float | None, digits: int = 3) -> str:
    """``3.142``, ``12,400`` for whole numbers, ``n/a`` for what was not measured."""
    if value is None or value != value:
        return "n/a"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"
