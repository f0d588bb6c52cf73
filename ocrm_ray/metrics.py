"""What a run writes about itself while it goes on: metrics, events, samples, TensorBoard, and its summary.

On resume the files are appended to and time goes on from where they end; ``ocrm_ray.run_files`` reads them.
"""

import json
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from ocrm_ray.records import EvaluationReport
from ocrm_ray.run_files import JsonlWriter, Row, read_jsonl, rewound

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

T = TypeVar("T")
STAGES = ("generate", "score", "train", "publish")
POOLS = ("generation", "policy", "scoring", "reward")
NUM_PEAK_EVALUATIONS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One policy update; numbers of an update are None in the line of step 0, before the first.

    Times in seconds, KL in nats a response, ``*_share`` in [0, 1]. ``rollout_version_min``: policy version of the
    oldest token trained on; ``logprob_gap``: mean absolute difference of trainer and sampler, nats a token.
    """

    step: int
    time_s: float
    policy_version: int
    reward_version: int
    anchor_version: int
    rollout_version_min: int | None = None
    reward_mean: float | None = None
    kl_sft: float | None = None
    kl_anchor: float | None = None
    rollout_tokens: int | None = None
    step_s: float | None = None
    logprob_gap: float | None = None
    stage_s: Mapping[str, float] | None = None
    """Seconds of each of ``STAGES``."""
    idle_share: Mapping[str, float] | None = None
    """Share of wall time with no request in each of ``POOLS``, since the step before."""
    loss: float | None = None
    entropy: float | None = None
    clip_share: float | None = None
    grad_norm: float | None = None
    response_tokens_mean: float | None = None
    staleness_mean: float | None = None
    """Updates between a rollout's oldest token and its use."""
    rollout_wait_s: float | None = None
    """Seconds that training waited for rollouts, stragglers included."""
    correction_wait_s: float | None = None
    straggler_wait_s: float | None = None
    num_reissued: int | None = None
    """Rollouts aborted at the staleness bound and issued again, in this step."""
    num_rescored_late: int | None = None
    """Rollouts whose scores a promotion made stale and that were scored again on the critical path, in this step."""
    num_deferred_corrections: int | None = None
    """Corrections that fell due while one was in flight, in this step."""
    publish_pause_s: float | None = None
    """How long generation stood still for this step's publish."""
    probe_gap: float | None = None
    """Last probe of engine against trainer, nats a token."""

    def __post_init__(self) -> None:
        assert self.stage_s is None or set(self.stage_s) == set(STAGES), self.stage_s
        assert self.idle_share is None or set(self.idle_share) == set(POOLS), self.idle_share


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRecord:
    """One evaluation sample for people to read; ``length`` in tokens, EOS included."""

    step: int
    prompt: str
    response: str
    proxy: float
    gold: float | None
    length: int


class RunLog:
    """The writers of one run folder. ``clock`` gives seconds (monotonic; a virtual one in tests).

    A metrics line whose evaluation was announced by ``hold`` waits for it, and later lines wait behind it, so that
    the file is strictly in step order. ``close`` writes what still waits, without its evaluation.
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._run_dir = run_dir
        self._clock = clock
        self._started = clock() - _last_time_s(run_dir)
        self._metrics = JsonlWriter(run_dir / "metrics.jsonl")
        self._events = JsonlWriter(run_dir / "events.jsonl")
        self._samples = JsonlWriter(run_dir / "samples.jsonl")
        self._waiting: deque[StepRecord] = deque()
        self._held: set[int] = set()
        self._evaluations: dict[int, EvaluationReport] = {}
        self._last_step = -1
        self._last_written = -1
        self._board: SummaryWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def elapsed_s(self) -> float:
        """Seconds since the run's start; a resumed run goes on from the last time in its files."""
        return self._clock() - self._started

    def step(self, record: StepRecord) -> None:
        """Write the step's line, or keep it until its evaluation and those before it are there."""
        assert record.step > self._last_step, f"step {record.step} after step {self._last_step}"
        self._last_step = record.step
        self._waiting.append(record)
        self._write_ready()

    def hold(self, step: int) -> None:
        """Announce that ``step`` will get an evaluation; call it before the step's line is written.

        Step 0, before the first update, has no record of its own: holding it opens its line.
        """
        assert step > self._last_written, f"the line of step {step} is already written"
        self._open_untrained(step)
        if step not in self._evaluations:
            self._held.add(step)

    def evaluation(self, report: EvaluationReport) -> None:
        """Add an evaluation to its step's line."""
        assert report.step > self._last_written, f"the line of step {report.step} is already written"
        assert report.step not in self._evaluations, f"two evaluations of step {report.step}"
        self._evaluations[report.step] = report
        self._open_untrained(report.step)
        self._held.discard(report.step)
        self._write_ready()

    def event(self, name: str, **fields: object) -> None:
        self._events.write({"time_s": round(self.elapsed_s(), 6), "event": name, **fields})

    def samples(self, records: Iterable[SampleRecord]) -> None:
        for record in records:
            self._samples.write(asdict(record))

    def close(self) -> None:
        self._held.clear()
        self._write_ready()
        for writer in (self._metrics, self._events, self._samples):
            writer.close()
        if self._board is not None:
            self._board.close()

    def _open_untrained(self, step: int) -> None:
        if step == 0 and self._last_step < 0:
            self._last_step = 0
            time_s = round(self.elapsed_s(), 6)
            self._waiting.append(
                StepRecord(step=0, time_s=time_s, policy_version=0, reward_version=0, anchor_version=0)
            )

    def _write_ready(self) -> None:
        while self._waiting and self._waiting[0].step not in self._held:
            record = self._waiting.popleft()
            line = asdict(record) | _evaluation_fields(self._evaluations.pop(record.step, None))
            self._metrics.write(line)
            self._last_written = record.step
            self._write_board(record.step, line)

    def _write_board(self, step: int, line: Mapping[str, object]) -> None:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=step)
        for tag, value in _scalars(line):
            self._board.add_scalar(tag, value, step)
        self._board.flush()


class BusyMeter:
    """Requests in flight in one pool, and the share of time without any. ``clock`` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._num_in_flight = 0
        self._idle_since: float | None = clock()
        self._window_start = clock()
        self._idle_s = 0.0

    @property
    def num_in_flight(self) -> int:
        return self._num_in_flight

    def request(self) -> "_Request":
        """``async with meter.request():`` counts one request while the body runs."""
        return _Request(self)

    async def watch(self, awaitable: Awaitable[T]) -> T:
        """Await, counted as one request."""
        async with self.request():
            return await awaitable

    def idle_share_since_last(self) -> float:
        """Share of the time since the last call (or the start) without a request; after no time, 1 if idle now."""
        now = self._clock()
        idle_s = self._idle_s + (now - self._idle_since if self._idle_since is not None else 0.0)
        total_s = now - self._window_start
        self._window_start, self._idle_s = now, 0.0
        if self._idle_since is None:
            return idle_s / total_s if total_s > 0 else 0.0
        self._idle_since = now
        return idle_s / total_s if total_s > 0 else 1.0

    def _enter(self) -> None:
        self._num_in_flight += 1
        if self._idle_since is not None:
            self._idle_s += self._clock() - self._idle_since
            self._idle_since = None

    def _leave(self) -> None:
        self._num_in_flight -= 1
        assert self._num_in_flight >= 0
        if self._num_in_flight == 0:
            self._idle_since = self._clock()


class _Request:
    def __init__(self, meter: BusyMeter) -> None:
        self._meter = meter

    async def __aenter__(self) -> None:
        self._meter._enter()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._meter._leave()


def summarise(run_dir: Path) -> dict[str, Any]:
    """Write ``summary.json`` from ``metrics.jsonl`` and return it; see ``summary_of``."""
    summary = summary_of(rewound(read_jsonl(run_dir / "metrics.jsonl")))
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    (run_dir / "summary.json").write_text(text, encoding="utf-8")
    return summary


def summary_of(metrics: Sequence[Row]) -> dict[str, Any]:
    """Figures of the last evaluation, and the gold peak before it.

    ``gold_drop_from_peak`` is the peak (``gold_peak``) less the last gold mean: negative while gold still rises.
    What was not measured is None.
    """
    evaluations = [row for row in metrics if row.get("proxy_mean") is not None]
    last = evaluations[-1] if evaluations else {}
    gold = [float(row["gold_mean"]) for row in evaluations if row.get("gold_mean") is not None]
    peak = gold_peak(gold)
    return {
        "gold_mean": last.get("gold_mean"),
        "gold_se": last.get("gold_se"),
        "gold_win_rate": last.get("gold_win_rate"),
        "gold_peak": peak,
        "gold_drop_from_peak": None if peak is None or last.get("gold_mean") is None else peak - last["gold_mean"],
        "proxy_mean": last.get("proxy_mean"),
        "kl_sft": last.get("eval_kl_sft"),
        "steps": metrics[-1]["step"] if metrics else 0,
        "wall_s": metrics[-1]["time_s"] if metrics else 0.0,
    }


def gold_peak(gold: Sequence[float]) -> float | None:
    """Largest mean of three neighbouring evaluations; of all of them where there are fewer; None of none."""
    if not gold:
        return None
    width = min(NUM_PEAK_EVALUATIONS, len(gold))
    return max(math.fsum(gold[i : i + width]) / width for i in range(len(gold) - width + 1))


def _evaluation_fields(report: EvaluationReport | None) -> dict[str, float | None]:
    return {
        "proxy_mean": report.proxy_mean if report else None,
        "gold_mean": report.gold_mean if report else None,
        "gold_se": report.gold_se if report else None,
        "gold_win_rate": report.gold_win_rate if report else None,
        "rm_accuracy": report.rm_accuracy if report else None,
        "eval_kl_sft": report.kl_sft if report else None,
        "eval_response_tokens_mean": report.response_tokens_mean if report else None,
    }


def _scalars(line: Mapping[str, object]) -> Iterable[tuple[str, float]]:
    for key, value in line.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}/{tag}", number) for tag, number in _scalars(value))
        elif value is not None and key != "step":
            assert isinstance(value, int | float | np.number), f"{key}: {value!r} is no number"
            if math.isfinite(value):
                yield key, float(value)


def _last_time_s(run_dir: Path) -> float:
    rows = (*read_jsonl(run_dir / "metrics.jsonl"), *read_jsonl(run_dir / "events.jsonl"))
    return max((float(row["time_s"]) for row in rows), default=0.0)
