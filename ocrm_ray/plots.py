"""The pictures of one run's report, each a function from the run's files to a matplotlib figure."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ocrm_ray.metrics import POOLS, STAGES
from ocrm_ray.plot_style import (
    BLUE,
    GOLD,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PINK,
    PROXY,
    SHADE,
    SKY,
    TEXT_SIZE,
    VERMILLION,
    EndLabel,
    dress,
    label_ends,
    new_figure,
)
from ocrm_ray.run_files import Column, CorrectionWindow, Row, Run, column, correction_windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEPS_LABEL = "policy updates"
KL_LABEL = "√KL from the SFT model (√nats)"
MAX_LABELLED_ROWS = 24
NUM_SMOOTHED = 9
STAGE_COLORS: Mapping[str, str] = {"generate": BLUE, "score": GREEN, "train": VERMILLION, "publish": PINK}
PHASES = (("ratios", ORANGE), ("refit", BLUE), ("staging and step boundary", SKY))


def draw_all(run: Run) -> dict[str, "Figure"]:
    """Every picture that this run has data for, by name."""
    windows = correction_windows(run)
    updates = [row for row in run.metrics if row.get("step_s") is not None]
    pictures: dict[str, Figure] = {}
    if run.evaluations:
        pictures["rewards"] = draw_rewards(run, windows)
    if _has_accuracy(run) or _weighted(windows):
        pictures["reward_model"] = draw_reward_model(run, windows)
    if updates:
        pictures["corrections"] = draw_corrections(run, windows)
        if any(row.get("idle_share") for row in updates):
            pictures["idle"] = draw_idle(updates)
        pictures["step_time"] = draw_step_time(updates)
    return pictures


def draw_rewards(run: Run, windows: Sequence[CorrectionWindow]) -> "Figure":
    """Gold (if any) above proxy, against updates and against the root of the KL: [1 or 2 rows, 2 columns]."""
    rows = run.evaluations
    measures = [("gold_mean", "gold reward", GOLD)] if run.has_gold else []
    measures.append(("proxy_mean", "proxy reward (RM score)", PROXY))
    figure = new_figure(9.5, 2.7 * len(measures) + 0.3)
    grid = figure.subplots(len(measures), 2, sharex="col", sharey="row", squeeze=False)
    steps, root_kl = column(rows, "step"), root(column(rows, "eval_kl_sft"))
    for (key, name, color), (by_step, by_kl) in zip(measures, grid, strict=True):
        values = column(rows, key)
        band = column(rows, "gold_se") if key == "gold_mean" else np.zeros_like(values)
        for axes, x in ((by_step, steps), (by_kl, root_kl)):
            axes.plot(x, values, color=color, linewidth=1.8, marker="o", markersize=3.5)
        by_step.fill_between(steps, values - band, values + band, color=color, alpha=0.2, linewidth=0)
        _mark_promotions(by_step, windows)
        is_last = axes is grid[-1][1]
        unit = f"{name}, mean ± s.e." if key == "gold_mean" else name
        title = name.split(" (")[0].capitalize()
        dress(by_step, f"{title} over the run", STEPS_LABEL if is_last else "", unit)
        dress(by_kl, f"{title} over distance", KL_LABEL if is_last else "")
        _mark_end(by_kl, root_kl, values, f"update {int(steps[-1])}")
    limit_steps(grid[0][0], steps)
    grid[0][1].set_xlim(-0.03 * max(np.nanmax(root_kl), 1), 1.03 * max(np.nanmax(root_kl), 1))
    if any(window.outcome == "promoted" for window in windows):
        _note(grid[0][0], "dotted: a reward model promoted", MUTED)
    return figure


def draw_reward_model(run: Run, windows: Sequence[CorrectionWindow]) -> "Figure":
    """Accuracy on on-policy pairs, and the effective sample size of each correction's weights: what was measured."""
    draws = [_draw_accuracy] if _has_accuracy(run) else []
    draws += [_draw_ess] if _weighted(windows) else []
    figure = new_figure(9.5, 2.9)
    for draw, axes in zip(draws, figure.subplots(1, len(draws), squeeze=False)[0], strict=True):
        draw(axes, run, windows)
        limit_steps(axes, column(run.metrics, "step"))
    return figure


def draw_corrections(run: Run, windows: Sequence[CorrectionWindow]) -> "Figure":
    """Training's token rate over time, and below it each correction as a bar of its phases."""
    scale, unit = time_scale(run.end_s)
    rows_height = min(0.24 * len(windows), 3.5)
    figure = new_figure(9.5, 2.4 + (rows_height + 0.7 if windows else 0))
    if not windows:
        _draw_throughput(figure.subplots(), run, windows, scale)
        figure.axes[0].set_xlabel(f"time since the start ({unit})", fontsize=TEXT_SIZE, color=INK)
        return figure
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.7, rows_height + 0.3])
    _draw_throughput(above, run, windows, scale)
    for index, window in enumerate(windows):
        _draw_window(below, index, window, scale)
        if len(windows) <= MAX_LABELLED_ROWS:
            _label_window(below, index, window, scale, on_left=window.ended_s > run.end_s / 2)
    below.set_ylim(len(windows) - 0.4, -0.6)
    dress(below, "Corrections", f"time since the start ({unit})", "correction")
    below.set_yticks(range(len(windows)), [str(i + 1) for i in range(len(windows))])
    if len(windows) > MAX_LABELLED_ROWS:
        below.set_yticks([0, len(windows) - 1], ["1", str(len(windows))])
    below.grid(visible=False)
    handles = [below.barh(0, 0, color=color, label=name) for name, color in PHASES]
    below.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=TEXT_SIZE - 1
    )
    return figure


def draw_idle(updates: Sequence[Row]) -> "Figure":
    """Idle share of each pool, a panel each; the thick line is a running mean."""
    figure = new_figure(9.5, 2.3)
    steps = column(updates, "step")
    panels = figure.subplots(1, len(POOLS), sharey=True)
    for axes, pool in zip(panels, POOLS, strict=True):
        share = 100 * column(updates, "idle_share", pool)
        _plot_noisy(axes, steps, share, BLUE, np.mean)
        title = f"{pool.capitalize()}: mean {np.mean(share[np.isfinite(share)]):.0f} %"
        dress(axes, title, STEPS_LABEL, "idle (% of wall time)" if pool == POOLS[0] else "")
        axes.set_ylim(-3, 103)
        limit_steps(axes, steps)
    return figure


def draw_step_time(updates: Sequence[Row]) -> "Figure":
    """Seconds of each stage and of the whole step; stages overlap, so they need not add up to the step."""
    figure = new_figure(9.5, 2.9)
    axes = figure.subplots()
    steps = column(updates, "step")
    lines = [(stage, column(updates, "stage_s", stage), STAGE_COLORS[stage]) for stage in STAGES]
    lines.append(("whole step", column(updates, "step_s"), INK))
    labels = []
    for name, seconds, color in lines:
        smoothed = _plot_noisy(axes, steps, seconds, color)
        labels.append(EndLabel(float(steps[-1]), float(smoothed[-1]), name, color))
    axes.set_ylim(bottom=0)
    limit_steps(axes, steps)
    dress(axes, "Time of a step by stage", STEPS_LABEL, "seconds")
    label_ends(axes, labels)
    return figure


def root(kl: Column) -> Column:
    """Square root of a KL estimate; the estimate may be a little below 0 near the SFT model."""
    return np.sqrt(np.clip(kl, 0, None))


def running(centre: Callable[[Column], float], values: Column, width: int) -> Column:
    """``centre`` (mean or median) of ``width`` (odd) neighbours, fewer at the ends; NaN left out."""
    half = width // 2
    parts = (values[max(i - half, 0) : i + half + 1] for i in range(len(values)))
    finite = (part[np.isfinite(part)] for part in parts)
    return np.array([centre(part) if len(part) else np.nan for part in finite])


def limit_steps(axes: "Axes", steps: Column) -> None:
    """The whole run on the horizontal axis, from update 0, in whole numbers."""
    from matplotlib.ticker import MaxNLocator

    last = max(float(steps.max()), 1.0)
    axes.set_xlim(-0.02 * last, 1.02 * last)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))


def time_scale(end_s: float) -> tuple[float, str]:
    """Seconds of the unit that suits a run of this length, and its name."""
    if end_s < 600:
        return 1.0, "s"
    return (60.0, "min") if end_s < 5 * 3600 else (3600.0, "h")


def _draw_accuracy(axes: "Axes", run: Run, windows: Sequence[CorrectionWindow]) -> None:
    rows = run.evaluations
    accuracy = 100 * column(rows, "rm_accuracy")
    axes.plot(column(rows, "step"), accuracy, color=GREEN, linewidth=1.8, marker="o", markersize=3.5)
    axes.axhline(50, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "chance", (1, 50), xycoords=axes.get_yaxis_transform(), ha="right", va="bottom", color=MUTED,
        fontsize=TEXT_SIZE - 1,
    )  # fmt: skip
    _mark_promotions(axes, windows)
    dress(axes, "RM accuracy on on-policy pairs", STEPS_LABEL, "ordered as gold orders them (%)")


def _draw_ess(axes: "Axes", run: Run, windows: Sequence[CorrectionWindow]) -> None:
    weighted = _weighted(windows)
    shares = [100 * float(window.ess_fraction or 0) for window in weighted]
    snapshots = [float(window.snapshot_version or 0) for window in weighted]
    floor = min([*(share for share in shares if share > 0), 1.0]) / 2
    axes.vlines(snapshots, floor, shares, color=ORANGE, linewidth=1, alpha=0.6)
    axes.plot(snapshots, shares, color=ORANGE, linestyle="none", marker="o", markersize=5)
    axes.set_yscale("log")
    axes.set_ylim(floor, 140)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    dress(axes, "Effective sample size of each correction", "policy version of the snapshot", "ESS (% of the pairs)")


def _has_accuracy(run: Run) -> bool:
    return any(row.get("rm_accuracy") is not None for row in run.metrics)


def _weighted(windows: Sequence[CorrectionWindow]) -> list[CorrectionWindow]:
    return [window for window in windows if window.ess_fraction is not None]


def _plot_noisy(
    axes: "Axes", x: Column, y: Column, color: str, centre: Callable[[Column], float] = np.median
) -> Column:
    """The values thin, their running centre thick and returned. Few values are shown as they are."""
    smoothed = running(centre, y, NUM_SMOOTHED if len(y) > 3 * NUM_SMOOTHED else 1)
    axes.plot(x, y, color=color, linewidth=0.8, alpha=0.35, marker="o" if len(y) < 4 else None, markersize=4)
    axes.plot(x, smoothed, color=color, linewidth=1.8)
    return smoothed


def _mark_promotions(axes: "Axes", windows: Sequence[CorrectionWindow]) -> None:
    at = [window.policy_version for window in windows if window.policy_version is not None]
    for version in at:
        alpha = min(1.0, MAX_LABELLED_ROWS / len(at))
        axes.axvline(version, color=MUTED, linewidth=0.7, linestyle=(0, (1, 2)), zorder=0, alpha=alpha)


def _mark_end(axes: "Axes", x: Column, y: Column, text: str) -> None:
    axes.annotate(
        text, (x[-1], y[-1]), xytext=(5, 5), textcoords="offset points", color=MUTED, fontsize=TEXT_SIZE - 1.5,
        annotation_clip=False,
    )  # fmt: skip


def _note(axes: "Axes", text: str, color: str) -> None:
    axes.annotate(
        text, (1, 1), xycoords="axes fraction", xytext=(0, 5), textcoords="offset points", ha="right", color=color,
        fontsize=TEXT_SIZE - 1.5,
    )  # fmt: skip


def _draw_throughput(axes: "Axes", run: Run, windows: Sequence[CorrectionWindow], scale: float) -> None:
    rows = [row for row in run.metrics if row.get("step_s")]
    rate = column(rows, "rollout_tokens") / column(rows, "step_s")
    for window in windows:
        axes.axvspan(window.started_s / scale, window.ended_s / scale, color=SHADE, linewidth=0, zorder=0)
    _plot_noisy(axes, column(rows, "time_s") / scale, rate, INK)
    published = [float(event["time_s"]) / scale for event in run.events if event["event"] == "weights_published"]
    axes.plot(
        published, np.zeros(len(published)), color=PINK, linestyle="none", marker="|", markersize=5,
        markeredgewidth=0.7, clip_on=False, transform=axes.get_xaxis_transform(),
    )  # fmt: skip
    axes.set_ylim(bottom=0)
    title = "Rollout tokens trained on" + (" (shaded: a correction in flight)" if windows else "")
    dress(axes, title, "", "tokens / s")
    axes.set_xlim(0, 1.01 * run.end_s / scale)
    if published:
        _note(axes, "ticks: weights published", PINK)


def _draw_window(axes: "Axes", index: int, window: CorrectionWindow, scale: float) -> None:
    start = window.started_s
    for (_, color), end in zip(PHASES, (window.scored_s, window.refitted_s, window.ended_s), strict=True):
        if end is not None:
            axes.barh(index, (end - start) / scale, left=start / scale, height=0.62, color=color)
            start = end


def _label_window(axes: "Axes", index: int, window: CorrectionWindow, scale: float, on_left: bool) -> None:
    parts = [window.outcome] if window.outcome != "promoted" else []
    parts += [f"lag {window.lag_steps}"] if window.lag_steps is not None else []
    updates = "1 update" if window.num_updates == 1 else f"{window.num_updates} updates"
    parts.append(f"meanwhile {window.rollout_tokens:,} tokens in {updates}")
    axes.annotate(
        ", ".join(parts), ((window.started_s if on_left else window.ended_s) / scale, index),
        xytext=(-6 if on_left else 6, 0), textcoords="offset points", ha="right" if on_left else "left", va="center",
        fontsize=TEXT_SIZE - 1.5, color=MUTED, annotation_clip=False,
    )  # fmt: skip
