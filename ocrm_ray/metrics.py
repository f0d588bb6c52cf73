"""What a run writes about itself while it goes on: metrics, events, samples, TensorBoard, and its summary.

On resume the files are appended to and time goes on from where they end; ``ocrm_ray.run_files`` reads them.
"""

import json
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ocrm_ray.records import EvaluationReport
from ocrm_ray.run_files import JsonlWriter, Row, last_time_s, read_jsonl, read_run, rewound
from ocrm_ray.whole_files import write_whole

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

STAGES = ("generate", "score", "train", "publish")
POOLS = ("generation", "policy", "scoring", "reward")
STEP, EVALUATION = "step", "evaluation"
"""What an observer is told beside the events."""
Observer: TypeAlias = Callable[[str, Mapping[str, Any]], None]
"""``observe(kind, figures)``: STEP, EVALUATION or an event's name, as it is known."""
SUMMARISED = (
    *("gold_mean", "gold_se", "gold_win_rate", "gold_win_rate_low", "gold_win_rate_high"),
    *("gold_win_rate_reference", "rm_accuracy"),
)
NUM_PEAK_EVALUATIONS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One policy update; numbers of an update are None in the line of step 0, before the first.

    Times in seconds, KL in nats a response; counts are those of this step.
    """

    step: int
    time_s: float
    policy_version: int
    reward_version: int
    anchor_version: int
    rollout_version_min: int | None = None  # of the oldest token trained on
    rollouts: Sequence[int] | None = None  # trained on, by number: N-th prompt of all shuffled epochs, from 0
    reward_mean: float | None = None
    kl_sft: float | None = None
    kl_anchor: float | None = None
    rollout_tokens: int | None = None
    step_s: float | None = None
    logprob_gap: float | None = None  # mean absolute difference of trainer and sampler, nats a token
    stage_s: Mapping[str, float] | None = None  # of each of STAGES
    idle_share: Mapping[str, float] | None = None  # of wall time with no request in each of POOLS, since the last step
    loss: float | None = None
    entropy: float | None = None
    clip_share: float | None = None
    truncated_share: float | None = None  # loss tokens whose importance weight was cut at rollout.importance_cap
    value_loss: float | None = None  # of PPO's critic
    grad_norm: float | None = None
    num_skipped_steps: int | None = None  # optimiser steps whose gradients were not finite
    response_tokens_mean: float | None = None
    staleness_mean: float | None = None  # updates between a rollout's oldest token and its use
    rollout_wait_s: float | None = None  # training waited for rollouts, stragglers included
    correction_wait_s: float | None = None
    publish_wait_s: float | None = None  # for copying the weights out, and for the publish before if it still goes on
    straggler_wait_s: float | None = None
    num_reissued: int | None = None  # rollouts aborted at the staleness bound and issued again
    num_rescored_late: int | None = None  # rollouts that a promotion had scored again while training waited
    num_deferred_corrections: int | None = None  # fell due while one was in flight


_STEP_FIELDS = frozenset(f.name for f in fields(StepRecord))
EVALUATED = {
    f.name: f"eval_{f.name}" if f.name in _STEP_FIELDS or f.name.startswith("kl_") else f.name
    for f in fields(EvaluationReport)
    if f.name not in ("step", "policy_version", "seconds")
}
"""What a line has of its evaluation, and under which name; KL, and what the step measures too, as ``eval_...``."""


class RunLog(AbstractContextManager["RunLog"]):
    """The writers of one run folder. ``clock`` gives seconds (monotonic; a virtual one in tests).

    A metrics line whose evaluation was announced by ``hold`` waits for it, and later lines wait behind it, so that
    the file is strictly in step order. ``close`` writes what still waits, without its evaluation.
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.monotonic, last_step: int = -1) -> None:
        """``last_step``: that of the checkpoint from which the run goes on."""
        self._run_dir = run_dir
        self._clock = clock
        metrics, events, samples = (run_dir / f"{name}.jsonl" for name in ("metrics", "events", "samples"))
        lines = read_jsonl(metrics)
        self._started = clock() - last_time_s(lines, read_jsonl(events))
        gold = (row.get("gold_mean") for row in rewound(lines) if row["step"] <= last_step)
        self.best_gold = max((value for value in gold if value is not None), default=-math.inf)
        """Of the evaluations until ``last_step``."""
        self._metrics, self._events, self._samples = map(JsonlWriter, (metrics, events, samples))
        self._waiting: deque[StepRecord] = deque()
        self._evaluations: dict[int, EvaluationReport | None] = {}
        self.last_step = last_step
        self.observe: Observer = lambda kind, figures: None
        """Is told every step, evaluation and event at once, before it is written."""
        self._board: SummaryWriter | None = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def elapsed_s(self) -> float:
        """Seconds since the run's start; a resumed run goes on from the last time in its files."""
        return self._clock() - self._started

    def step(self, record: StepRecord) -> None:
        """Write the step's line, or keep it until its evaluation and those before it are there."""
        assert record.step > self.last_step, f"step {record.step} after step {self.last_step}"
        self.last_step = record.step
        self.observe(STEP, asdict(record))
        self._waiting.append(record)
        self._write_ready()

    def hold(self, step: int) -> None:
        """Announce, before the step's own line, that ``step`` will get an evaluation.

        Step 0, before the first update, has no record of its own: holding it opens its line.
        """
        assert step > self.last_step, f"step {step} was already recorded"
        self._evaluations[step] = None
        if step == 0:
            time_s = round(self.elapsed_s(), 6)
            self.step(StepRecord(step=0, time_s=time_s, policy_version=0, reward_version=0, anchor_version=0))

    def evaluation(self, report: EvaluationReport) -> None:
        """Add an announced evaluation to its step's line."""
        assert self._evaluations.get(report.step, report) is None, f"step {report.step} awaits no evaluation"
        self._evaluations[report.step] = report
        self.observe(EVALUATION, asdict(report))
        self._write_ready()

    def event(self, name: str, **fields: object) -> None:
        self.observe(name, fields)
        self._events.write({"time_s": round(self.elapsed_s(), 6), "event": name, **fields})

    def samples(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Evaluation samples for people to read: step, prompt, response, proxy, gold, length (tokens with EOS)."""
        for row in rows:
            self._samples.write(row)

    def close(self) -> None:
        self._write_ready(is_last=True)
        for writer in (self._metrics, self._events, self._samples, self._board):
            if writer is not None:
                writer.close()

    def _write_ready(self, is_last: bool = False) -> None:
        while self._waiting and (is_last or self._evaluations.get(self._waiting[0].step, True)):
            line = asdict(self._waiting.popleft())
            report = self._evaluations.pop(line["step"], None)
            line |= {column: getattr(report, name, None) for name, column in EVALUATED.items()}
            self._metrics.write(line)
            self._write_board(line["step"], line)

    def _write_board(self, step: int, line: Row) -> None:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=step)
        parts = {f"{key}/{part}": x for key in ("stage_s", "idle_share") for part, x in (line[key] or {}).items()}
        for tag, value in (line | parts).items():
            if isinstance(value, int | float | np.number) and math.isfinite(value):
                self._board.add_scalar(tag, value, step)
        self._board.flush()


class BusyMeter:
    """Requests in flight in one pool, and the share of time without any. ``clock`` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._num_in_flight = 0
        self._idle_s = 0.0
        self._window_start = self._counted_until = clock()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """``async with meter.request():`` counts one request while the body runs."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def idle_share_since_last(self) -> float:
        """Share of the time since the last call (or the start) without a request; after no time, 1 if idle now."""
        self._count(0)
        total_s = self._counted_until - self._window_start
        share = self._idle_s / total_s if total_s > 0 else float(self._num_in_flight == 0)
        self._window_start, self._idle_s = self._counted_until, 0.0
        return share

    def _count(self, change: int) -> None:
        now = self._clock()
        if self._num_in_flight == 0:
            self._idle_s += now - self._counted_until
        self._counted_until = now
        self._num_in_flight += change


def summarise(run_dir: Path) -> dict[str, Any]:
    """Write ``summary.json`` from ``metrics.jsonl`` and return it; see ``summary_of``."""
    summary = summary_of(read_run(run_dir).metrics)
    write_whole(run_dir / "summary.json", [json.dumps(summary, indent=2, allow_nan=False) + "\n"])
    return summary


def summary_of(metrics: Sequence[Row]) -> dict[str, Any]:
    """Figures of the last evaluation, and the gold peak before it.

    ``gold_drop_from_peak`` is the peak (``gold_peak``) less the last gold mean: negative while gold still rises.
    What was not measured is None.
    """
    evaluations = [row for row in metrics if row.get("proxy_mean") is not None]
    last = evaluations[-1] if evaluations else {}
    peak = gold_peak([row["gold_mean"] for row in evaluations if row.get("gold_mean") is not None])
    return {
        **{key: last.get(key) for key in SUMMARISED},
        "gold_peak": peak,
        "gold_drop_from_peak": None if peak is None or last.get("gold_mean") is None else peak - last["gold_mean"],
        "proxy_mean": last.get("proxy_mean"),
        "kl_sft": last.get("eval_kl_sft"),
        "steps": metrics[-1]["step"] if metrics else 0,
        "wall_s": metrics[-1]["time_s"] if metrics else 0.0,
    }


def gold_peak(gold: Sequence[float]) -> float | None:
    """Largest mean of three neighbouring evaluations; of all of them where there are fewer; None of none."""
    width = min(NUM_PEAK_EVALUATIONS, len(gold))
    means = [math.fsum(gold[i : i + width]) / width for i in range(len(gold) - width + 1)] if gold else []
    return max(means, default=None)
