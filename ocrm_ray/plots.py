"""The pictures of a run and of a study, through matplotlib's object API: no state of pyplot is touched."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ocrm_ray.metrics import POOLS, STAGES
from ocrm_ray.run_files import Column, CorrectionWindow, Row, Run, column, correction_windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#B5528A", "#E69F00", "#56B4E9", "#1f2933")
"""Okabe and Ito's, told apart with any colour vision (pink a little darker, for thin lines)."""
LINES = [{"color": color, "linestyle": dash} for dash in ("-", "--", ":") for color in COLORS]
MUTED, SHADE = "#6b7785", "#eceff2"
STYLE = Path(__file__).parent / "templates" / "figures.mplstyle"
REWARDS = {"gold_mean": "gold reward", "proxy_mean": "proxy reward (RM score)"}
DISTANCES = {"step": "policy updates", "eval_kl_sft": "√KL from the SFT model (√nats)"}
PHASES = ("ratios", "refit", "staging and step boundary")
MAX_LABELLED = 30
WHOLE: Mapping[str, Any] = {"nbins": 8, "steps": [1, 2, 5, 10], "integer": True}
"""Ticks of updates and corrections."""
NUM_SMOOTHED = 9
X_LABELS = DISTANCES | {"snapshot_version": "policy version of the snapshot"}
BY_GAP = tuple(f"rm_accuracy_by_gap/{third}" for third in ("small", "middle", "large"))


class Panel(NamedTuple):
    """Curves (key, label, colour, dash) over ``x_key``; a unit with a % sign shows shares times 100."""

    title: str
    unit: str
    curves: tuple[tuple[str, str, str, str], ...]
    x_key: str = "step"
    y_scale: str = "linear"


BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, _ = COLORS
POLICY = (
    Panel(
        "KL of the policy",
        "nats a response",
        (
            ("eval_kl_sft", "from SFT, k1", BLUE, "-"),
            ("eval_kl_sft_k3", "from SFT, k3", BLUE, "--"),
            ("eval_kl_anchor", "from the anchor, k1", VERMILION, "-"),
            ("eval_kl_anchor_k3", "from the anchor, k3", VERMILION, "--"),
        ),
    ),
    Panel(
        "Gold win rate",
        "% of the prompts",
        (
            ("gold_win_rate", "against SFT", BLUE, "-"),
            ("gold_win_rate_reference", "against the references", GREEN, "-"),
        ),
    ),
    Panel(
        "Diversity of the responses",
        "distinct, % of all",
        (("distinct_1", "tokens", BLUE, "-"), ("distinct_2", "pairs of tokens", GREEN, "-")),
    ),
    Panel("Response length", "tokens", (("eval_response_tokens_mean", "", BLUE, "-"),)),
)
REWARD_MODEL = (
    Panel(
        "RM accuracy on on-policy pairs",
        "ordered as gold orders them (%)",
        (
            ("rm_accuracy", "all pairs", GREEN, "-"),
            (BY_GAP[0], "small gold difference", ORANGE, "--"),
            (BY_GAP[1], "middle", SKY, "--"),
            (BY_GAP[2], "large", BLUE, "--"),
        ),
    ),
    Panel(
        "RM loss and spread on on-policy pairs",
        "loss in nats; spread below 0.5",
        (("rm_pair_loss", "pair loss", VERMILION, "-"), ("reward_spread", "spread J", PINK, "-")),
    ),
    Panel(
        "Rank correlation of the proxy",
        "Spearman, over prompts",
        (("proxy_gold_spearman", "with gold", BLUE, "-"), ("proxy_length_correlation", "with length", ORANGE, "-")),
    ),
    Panel(
        "Weights of each correction",
        "%",
        (
            ("ess_fraction", "effective sample size, of the pairs", GREEN, "-"),
            ("max_weight_share", "largest weight, of the sum", VERMILION, "-"),
        ),
        x_key="snapshot_version",
        y_scale="log",
    ),
    Panel(
        "Log-weights of each correction",
        "deviation in nats; Spearman",
        (
            ("log_weight_std", "standard deviation", BLUE, "-"),
            ("length_correlation", "rank correlation with length", ORANGE, "-"),
        ),
        x_key="snapshot_version",
    ),
)


def draw_run(run: Run) -> "dict[str, Figure]":
    """Every picture that this run has data for, by name."""
    import matplotlib

    windows = correction_windows(run)
    updates = [row for row in run.metrics if row.get("step_s")]
    rollouts = [row for row in updates if row.get("rollout_tokens")]
    with matplotlib.rc_context(fname=STYLE):
        pictures = {
            "rewards": _draw_rewards({run.run_dir.name: [run]}, windows) if run.evaluations else None,
            "policy": _draw_panels(POLICY, run, windows),
            "reward_model": _draw_panels(REWARD_MODEL, run, windows),
            "corrections": _draw_corrections(rollouts, windows) if rollouts else None,
            "times": _draw_times(updates) if updates else None,
        }
    return {name: picture for name, picture in pictures.items() if picture}


def draw_study(arms: Mapping[str, Sequence[Run]]) -> "Figure":
    """Every arm's rewards: seeds thin, their mean thick."""
    import matplotlib

    with matplotlib.rc_context(fname=STYLE):
        return _draw_rewards(arms, ())


def save(figure: "Figure", path: Path) -> None:
    """Write the PNG; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def mean_over_seeds(runs: Sequence[Run]) -> list[Row]:
    """Mean evaluations, at the steps that all runs evaluated."""
    by_step = [{row["step"]: row for row in run.evaluations} for run in runs]
    shared = sorted(set(by_step[0]).intersection(*by_step))
    keys = [*DISTANCES, *REWARDS]
    return [{key: column([rows[step] for rows in by_step], key).mean() for key in keys} for step in shared]


def _panels(num_rows: int, num_columns: int, height: float, **options: Any) -> "tuple[Figure, Any]":
    """A figure of a page's width, ``height`` inches, and its axes [num_rows, num_columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, height))
    return figure, figure.subplots(num_rows, num_columns, squeeze=False, **options)


def _draw_rewards(arms: Mapping[str, Sequence[Run]], windows: Sequence[CorrectionWindow]) -> "Figure":
    """Gold (if any) and proxy against updates and against the root of the KL: [1 or 2, 2] panels, arms by colour."""
    has_gold = any(run.has_gold for runs in arms.values() for run in runs)
    rewards = [key for key in REWARDS if has_gold or key != "gold_mean"]
    figure, grid = _panels(len(rewards), len(DISTANCES), 0.3 + 2.7 * len(rewards), sharex="col", sharey="row")
    for axes, (y_key, x_key) in zip(grid.flat, product(rewards, DISTANCES), strict=True):
        for (arm, runs), line in zip(arms.items(), cycle(LINES), strict=False):
            _draw_arm(axes, runs, (x_key, y_key), {**line, "label": arm})
        axes.set(xlabel=DISTANCES[x_key], ylabel=REWARDS[y_key])
        axes.label_outer()
    for axes, window in product(grid[:, 0], windows):
        if window.policy_version is not None:
            axes.axvline(window.policy_version, color=MUTED, linewidth=0.6, linestyle=":", zorder=0)
    grid[-1, 0].locator_params("x", **WHOLE)
    if len(arms) > 1:
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(arms), 5))
    return figure


def _draw_arm(axes: "Axes", runs: Sequence[Run], keys: tuple[str, str], line: Mapping[str, Any]) -> None:
    thin = {"color": line["color"], "linewidth": 0.7, "alpha": 0.45}
    thick = {**line, "marker": "o", "markevery": [-1] if len(runs) > 1 else None}
    curves = [(run.evaluations, thin) for run in runs if len(runs) > 1]
    for rows, style in [*curves, (mean_over_seeds(runs), thick)]:
        x, y = (column(rows, key) for key in keys)
        if keys[0] == "eval_kl_sft":
            x = np.sqrt(x.clip(min=0))  # the estimate may be a little below 0 near the SFT model
        axes.plot(x, y, **style)
    if len(runs) == 1 and keys == ("step", "gold_mean"):
        error = column(runs[0].evaluations, "gold_se")
        axes.fill_between(x, y - error, y + error, color=line["color"], alpha=0.2, linewidth=0)


def _draw_panels(panels: Sequence[Panel], run: Run, windows: Sequence[CorrectionWindow]) -> "Figure | None":
    """Those of the panels that have something to show, two in a row; a ``_low`` and a ``_high`` become a band."""
    thirds = [dict(zip(BY_GAP, row.get("rm_accuracy_by_gap") or (), strict=False)) for row in run.evaluations]
    sources = {"step": [row | each for row, each in zip(run.evaluations, thirds, strict=True)]}
    sources["snapshot_version"] = [vars(window) for window in windows]
    known = {panel: [curve for curve in panel.curves if _is_known(sources[panel.x_key], curve[0])] for panel in panels}
    shown = [panel for panel in panels if known[panel]]
    if not shown:
        return None
    num_columns = min(len(shown), 2)
    num_rows = math.ceil(len(shown) / num_columns)
    figure, grid = _panels(num_rows, num_columns, 0.3 + 2.7 * num_rows)
    for axes, panel in zip(grid.flat, shown, strict=False):
        rows, factor = sources[panel.x_key], 100 if "%" in panel.unit else 1
        for key, label, color, dash in known[panel]:
            x, y, low, high = (column(rows, name) for name in (panel.x_key, key, f"{key}_low", f"{key}_high"))
            at = np.isfinite(y)
            width = 0.9 if key in BY_GAP else None
            axes.plot(x[at], factor * y[at], dash, color=color, marker="o", linewidth=width, markersize=3, label=label)
            axes.fill_between(x, factor * low, factor * high, color=color, alpha=0.15, linewidth=0)
        axes.set(title=panel.title, xlabel=X_LABELS[panel.x_key], ylabel=panel.unit, yscale=panel.y_scale)
        axes.locator_params("x", **WHOLE)
        if len(known[panel]) > 1:
            axes.legend(fontsize="small", handlelength=2.5, markerscale=0)
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    return figure


def _is_known(rows: Sequence[Row], key: str) -> bool:
    return bool(np.isfinite(column(rows, key)).any())


def _draw_corrections(updates: Sequence[Row], windows: Sequence[CorrectionWindow]) -> "Figure":
    """Training's token rate over time, and below it each correction as a bar of its phases."""
    heights = [2.4, 0.9 + 0.2 * min(len(windows), MAX_LABELLED)][: 2 if windows else 1]
    figure, grid = _panels(len(heights), 1, sum(heights), sharex=True, height_ratios=heights)
    rate = column(updates, "rollout_tokens") / column(updates, "step_s")
    _plot_noisy(grid[0, 0], column(updates, "time_s") / 60, rate, COLORS[-1])
    grid[0, 0].set(title="Rollout tokens trained on", ylabel="tokens / s", xlim=(0, None), ylim=(0, None))
    for window in windows:
        grid[0, 0].axvspan(window.started_s / 60, window.ended_s / 60, color=SHADE, linewidth=0, zorder=0)
    grid[-1, 0].set_xlabel("minutes since the start")
    if windows:
        _draw_timeline(grid[1, 0], windows)
    return figure


def _draw_timeline(axes: "Axes", windows: Sequence[CorrectionWindow]) -> None:
    numbers = np.arange(1, len(windows) + 1)
    times = np.array([(w.started_s, w.scored_s, w.refitted_s, w.ended_s) for w in windows], float).T
    reached = np.fmax.accumulate(times / 60)  # a phase that did not happen has no width
    for name, color, start, end in zip(PHASES, COLORS[4::-2], reached[:-1], reached[1:], strict=True):
        bars = axes.barh(numbers, end - start, left=start, height=0.6, color=color, label=name)
    if len(windows) <= MAX_LABELLED:
        lags = [w.outcome if w.lag_steps is None else f"lag {w.lag_steps}" for w in windows]
        axes.bar_label(bars, lags, padding=5, color=MUTED, fontsize="small")
    axes.set(title="Corrections", ylabel="correction", ylim=(len(windows) + 0.6, 0.4))
    axes.locator_params("y", **WHOLE)
    axes.grid(visible=False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(PHASES), borderaxespad=0)


def _draw_times(updates: Sequence[Row]) -> "Figure":
    """Seconds of each stage and of the whole step (stages overlap), and each pool's idle share."""
    seconds = {stage: column(updates, "stage_s", stage) for stage in STAGES} | {"step": column(updates, "step_s")}
    idle = {pool: 100 * column(updates, "idle_share", pool) for pool in POOLS}
    panels = (("Time of a step by stage", seconds, "s"), ("Idle: no request in the pool", idle, "%"))
    figure, grid = _panels(2, 1, 4.8, sharex=True)
    for axes, (title, lines, unit) in zip(grid[:, 0], panels, strict=True):
        for (name, values), color in zip(lines.items(), (*COLORS[:4], COLORS[-1]), strict=False):
            if np.isfinite(values).any():
                label = f"{name}: mean {np.nanmean(values):.3g} {unit}"
                _plot_noisy(axes, column(updates, "step"), values, color, label)
        axes.set(title=title, ylabel=f"{unit} (thick: running mean)", ylim=(0, None))
        if axes.lines:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    grid[-1, 0].set_xlabel(DISTANCES["step"])
    grid[-1, 0].locator_params("x", **WHOLE)
    return figure


def _plot_noisy(axes: "Axes", x: Column, y: Column, color: str, label: str = "") -> None:
    """The values thin, their running mean thick; few values as they are."""
    is_known = np.isfinite(y)
    x, y = x[is_known], y[is_known]
    window = np.ones(NUM_SMOOTHED if len(y) > 3 * NUM_SMOOTHED else 1)
    smoothed = np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")
    axes.plot(x, y, color=color, linewidth=0.8, alpha=0.35, marker="o" if len(y) < 4 else None)
    axes.plot(x, smoothed, color=color, label=label)
