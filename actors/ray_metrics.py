"""The run's figures as Ray metrics: every node of the cluster offers them to Prometheus, as ``ray_ocrm_...``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from ray.util.metrics import Counter, Gauge

from ocrm_ray.metrics import EVALUATED, EVALUATION, STEP, StepRecord

RUN = "run"
"""Tag of every metric: the run's folder."""
PARTS = {"stage_s": "stage", "idle_share": "pool"}
"""Figures of a step that have a value for each stage or pool, and the tag that tells which."""


@dataclass(frozen=True)
class Figure:
    """One metric: which field of which ``kind`` of news (a step, an evaluation, an event) it shows.

    A gauge holds the last value, a counter (``is_count``) the sum; ``tag`` is that of ``PARTS``.
    """

    kind: str
    field: str
    name: str
    is_count: bool = False
    tag: str | None = None

    @property
    def exported(self) -> str:
        """Its name at Prometheus."""
        return f"ray_{self.name}{'_total' if self.is_count else ''}"


_STEP_COUNTS = ("rollout_tokens", "skipped_steps", "reissued", "rescored_late", "deferred_corrections")
_NO_NUMBERS = ("rollouts", "judge", "rm_accuracy_by_gap", "rm_pairs_by_gap")


def _of_step(field: str) -> Figure:
    name = field.removeprefix("num_")
    return Figure(STEP, field, f"ocrm_{name}", name in _STEP_COUNTS, PARTS.get(field))


FIGURES = (
    *(_of_step(f.name) for f in fields(StepRecord) if f.name not in _NO_NUMBERS),
    *(Figure(EVALUATION, field, f"ocrm_{column}") for field, column in EVALUATED.items() if field not in _NO_NUMBERS),
    *(Figure("promoted", field, f"ocrm_correction_{field}") for field in ("ess_fraction", "refit_s", "lag_steps")),
    *(Figure("weights_published", field, f"ocrm_weights_{field}") for field in ("seconds", "pause_s")),
    Figure("weights_published", "bytes", "ocrm_weights_bytes", is_count=True),
    Figure("*", "event", "ocrm_events", is_count=True, tag="event"),
)
"""All that a run exports; the last one counts every kind of event."""


class RunMetrics:
    """Exports one run's figures from the process that it is made in."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._by_kind: dict[str, list[tuple[Figure, Gauge | Counter]]] = {}
        for figure in FIGURES:
            metric = (Counter if figure.is_count else Gauge)(
                figure.name,
                description=f"{figure.field} of {figure.kind}",
                tag_keys=(RUN, figure.tag) if figure.tag else (RUN,),
            )
            self._by_kind.setdefault(figure.kind, []).append((figure, metric))

    def observe(self, kind: str, figures: Mapping[str, Any]) -> None:
        """Show what is known by now; values that are None or not finite change nothing."""
        for figure, metric in self._by_kind.get(kind, ()):
            value = figures.get(figure.field)
            parts = (value or {}) if figure.tag else {None: value}
            for part, number in parts.items():
                self._show(figure, metric, part, number)
        if kind not in (STEP, EVALUATION):
            self._show(*self._by_kind["*"][0], kind, 1)

    def _show(self, figure: Figure, metric: Gauge | Counter, part: str | None, value: Any) -> None:
        if not isinstance(value, int | float | np.number) or not math.isfinite(value):
            return
        tags = {RUN: self._run, **({figure.tag: part} if figure.tag else {})}
        if isinstance(metric, Gauge):
            metric.set(float(value), tags)
        elif value > 0:  # a counter refuses 0
            metric.inc(float(value), tags)
