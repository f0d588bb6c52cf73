"""The picture of a study: every arm's gold and proxy, seeds thin and their mean thick."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ocrm_ray.plot_style import SERIES, EndLabel, dress, label_ends, new_figure
from ocrm_ray.plots import KL_LABEL, STEPS_LABEL, limit_steps, root
from ocrm_ray.run_files import Column, Run, column

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
"""Arms beyond the palette repeat its colours with another dash."""


def draw_study(arms: Mapping[str, Sequence[Run]]) -> "Figure":
    """[1, 3] panels: gold and proxy against updates, gold against the root of the KL (arms by colour); without gold the
    proxy's alone."""
    has_gold = any(run.has_gold for runs in arms.values() for run in runs)
    panels = [("proxy_mean", "step", "Proxy reward"), ("proxy_mean", "eval_kl_sft", "Proxy reward over distance")]
    if has_gold:
        panels = [
            ("gold_mean", "step", "Gold reward"),
            ("proxy_mean", "step", "Proxy reward"),
            ("gold_mean", "eval_kl_sft", "Gold reward over distance"),
        ]
    figure = new_figure(4.6 * len(panels), 3.7)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (y_key, x_key, title) in zip(grid, panels, strict=True):
        labels = []
        for index, (arm, runs) in enumerate(arms.items()):
            end = _draw_arm(axes, runs, (x_key, y_key), index)
            labels.append(EndLabel(*end, arm, SERIES[index % len(SERIES)]))
        by_step = x_key == "step"
        y_label = "gold reward" if y_key == "gold_mean" else "proxy reward (RM score)"
        dress(axes, title, STEPS_LABEL if by_step else KL_LABEL, y_label)
        if by_step:
            limit_steps(axes, np.array([label.x for label in labels]))
            label_ends(axes, labels)
    return figure


def mean_over_seeds(runs: Sequence[Run], keys: Sequence[str]) -> dict[str, Column]:
    """Means over the seeds of the steps that all of them evaluated: a column a key, and ``step``."""
    by_step = [{int(row["step"]): row for row in run.evaluations} for run in runs]
    steps = sorted(set.intersection(*(set(rows) for rows in by_step)))
    means = {key: np.mean([column([rows[step] for step in steps], key) for rows in by_step], axis=0) for key in keys}
    return means | {"step": np.array(steps, dtype=np.float64)}


def _draw_arm(axes: "Axes", runs: Sequence[Run], keys: tuple[str, str], index: int) -> tuple[float, float]:
    """Draw the arm's lines; returns where its mean ends."""
    color, dashes = SERIES[index % len(SERIES)], DASHES[index // len(SERIES) % len(DASHES)]
    x_key, y_key = keys
    if len(runs) > 1:
        for run in runs:
            x, y = (column(run.evaluations, key) for key in keys)
            axes.plot(root(x) if x_key == "eval_kl_sft" else x, y, color=color, linewidth=0.7, alpha=0.45)
    means = mean_over_seeds(runs, keys)
    x, y = means[x_key], means[y_key]
    x = root(x) if x_key == "eval_kl_sft" else x
    axes.plot(x, y, color=color, linewidth=2, linestyle=dashes)
    axes.plot(x[-1:], y[-1:], color=color, marker="o", markersize=4)
    return (float(x[-1]), float(y[-1])) if len(x) else (0.0, float("nan"))
