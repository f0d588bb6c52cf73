"""How every picture of ocrm-ray looks: palette, axes, labels at the ends of lines. Agg through the object API only."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN, PINK, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#B5528A", "#E69F00", "#56B4E9"
INK, MUTED, GRID, SHADE = "#1f2933", "#6b7785", "#e4e7eb", "#eceff2"
"""The coloured ones are Okabe and Ito's, told apart with any colour vision (pink a little darker, for thin lines)."""
SERIES = (BLUE, VERMILLION, GREEN, PINK, ORANGE, SKY, INK)
GOLD, PROXY = ORANGE, BLUE
TEXT_SIZE, TITLE_SIZE = 9, 10
DOTS_PER_INCH = 150


@dataclass(frozen=True, slots=True)
class EndLabel:
    """A line's name, to stand where the line ends (data coordinates)."""

    x: float
    y: float
    text: str
    color: str


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, inches; text and axes are laid out to fit it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def dress(axes: "Axes", title: str, x_label: str = "", y_label: str = "") -> None:
    """Light grid, two spines, title on the left."""
    axes.set_title(title, loc="left", fontsize=TITLE_SIZE, color=INK, fontweight="bold")
    axes.set_xlabel(x_label, fontsize=TEXT_SIZE, color=INK)
    axes.set_ylabel(y_label, fontsize=TEXT_SIZE, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(labelsize=TEXT_SIZE - 1, colors=MUTED, labelcolor=INK, length=3)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def label_ends(axes: "Axes", labels: Sequence[EndLabel]) -> None:
    """Write each label right of its line's end, moved apart where they would overlap; call with final limits."""
    low, high = axes.get_ylim()
    height_points = axes.get_window_extent().height * 72 / axes.figure.dpi
    gap = (TEXT_SIZE + 2.5) / max(height_points, 1.0)
    ordered = sorted((label for label in labels if label.y == label.y), key=lambda label: label.y)
    wanted = [(label.y - low) / (high - low) for label in ordered]
    x_transform = axes.get_xaxis_transform()
    for label, place in zip(ordered, spread(wanted, gap), strict=True):
        axes.annotate(
            label.text,
            (label.x, place),
            xycoords=x_transform,
            xytext=(7, 0),
            textcoords="offset points",
            color=label.color,
            fontsize=TEXT_SIZE,
            va="center",
            annotation_clip=False,
        )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places in [0, 1] at least ``gap`` apart, in the order of ``wanted`` (ascending), by least squares next to it."""
    groups: list[list[float]] = []  # of (place - rank * gap): the isotonic regression of these has no overlap
    for rank, place in enumerate(wanted):
        groups.append([place - rank * gap])
        while len(groups) > 1 and _mean(groups[-2]) > _mean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    highest = max(0.0, 1 - gap * (len(wanted) - 1))
    level = [min(max(_mean(group), 0.0), highest) for group in groups for _ in group]
    return [value + rank * gap for rank, value in enumerate(level)]


def save(figure: "Figure", path: Path) -> Path:
    """Write the PNG; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    return path


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
