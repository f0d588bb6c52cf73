import asyncio
import itertools
import json
import math
import resource
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import Clock, read_lines

from ocrm_ray.metrics import BusyMeter, RunLog, StepRecord, gold_peak, summarise, summary_of
from ocrm_ray.records import EvaluationReport
from ocrm_ray.run_files import JsonlWriter, read_jsonl, rewound


def step(number: int, **fields: object) -> StepRecord:
    return StepRecord(
        step=number, time_s=10.0 * number, policy_version=number, reward_version=0, anchor_version=0, **fields
    )


def report(number: int, gold: float | None = None, **fields: object) -> EvaluationReport:
    return EvaluationReport(
        step=number,
        policy_version=number,
        proxy_mean=0.5,
        kl_sft=2.25,
        kl_sft_k3=2.5,
        kl_anchor=1.25,
        kl_anchor_k3=1.5,
        response_tokens_mean=9.0,
        gold_mean=gold,
        **fields,
    )


def steps_of(run_dir: Path) -> list[object]:
    return [row["step"] for row in read_lines(run_dir / "metrics.jsonl")]


def test_lines_after_a_held_step_wait_until_its_evaluation_is_there(tmp_path: Path) -> None:
    with RunLog(tmp_path, Clock()) as log:
        log.step(step(1))
        log.hold(2)
        log.step(step(2))
        log.step(step(3))
        assert steps_of(tmp_path) == [1]
        log.evaluation(report(2, gold=4.5))
        assert steps_of(tmp_path) == [1, 2, 3]
    assert [row["gold_mean"] for row in read_lines(tmp_path / "metrics.jsonl")] == [None, 4.5, None]


def test_an_observer_is_told_steps_evaluations_and_events_at_once_though_lines_wait(tmp_path: Path) -> None:
    told: list[tuple[object, ...]] = []
    with RunLog(tmp_path, Clock()) as log:
        log.observe = lambda kind, figures: told.append((kind, figures.get("step"), figures.get("gold_mean")))
        log.hold(1)
        log.step(step(1))
        log.step(step(2))
        log.event("promoted", step=2)
        assert steps_of(tmp_path) == []
        assert told == [("step", 1, None), ("step", 2, None), ("promoted", 2, None)]
        log.evaluation(report(1, gold=4.5))
    assert told[3:] == [("evaluation", 1, 4.5)]


def test_an_evaluation_that_comes_before_its_step_is_kept_for_it(tmp_path: Path) -> None:
    with RunLog(tmp_path, Clock()) as log:
        log.hold(1)
        log.evaluation(report(1, gold=1.5, gold_se=0.25, gold_win_rate=0.75, rm_accuracy=0.625))
        assert steps_of(tmp_path) == []
        log.step(step(1, kl_sft=1.75))
    (row,) = read_lines(tmp_path / "metrics.jsonl")
    measured = ("proxy_mean", "gold_mean", "gold_se", "gold_win_rate", "rm_accuracy", "eval_kl_sft")
    assert [row[key] for key in measured] == [0.5, 1.5, 0.25, 0.75, 0.625, 2.25]
    assert [row[f"eval_kl_{name}"] for name in ("sft_k3", "anchor", "anchor_k3")] == [2.5, 1.25, 1.5]
    assert (row["eval_response_tokens_mean"], row["kl_sft"], row["response_tokens_mean"]) == (9.0, 1.75, None)


def test_every_measure_of_an_evaluation_is_in_its_line(tmp_path: Path) -> None:
    names = [field.name for field in fields(EvaluationReport)]
    values = {name: float(number) for number, name in enumerate(names, start=100)} | {"step": 0, "policy_version": 0}
    values["rm_accuracy_by_gap"] = [0.5, None, 0.75]
    with RunLog(tmp_path, Clock()) as log:
        log.hold(0)
        log.evaluation(EvaluationReport(**values))
    (row,) = read_lines(tmp_path / "metrics.jsonl")
    for name in set(names) - {"seconds"}:
        key = f"eval_{name}" if name.startswith("kl_") or name == "response_tokens_mean" else name
        assert row[key] == values[name], name


def test_two_evaluations_in_the_wrong_order_still_give_lines_in_step_order(tmp_path: Path) -> None:
    with RunLog(tmp_path, Clock()) as log:
        for number in (1, 2, 3):
            if number != 2:
                log.hold(number)
            log.step(step(number))
        log.evaluation(report(3, gold=3.0))
        assert steps_of(tmp_path) == []
        log.evaluation(report(1, gold=1.0))
    assert [(row["step"], row["gold_mean"]) for row in read_lines(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, None),
        (3, 3.0),
    ]


def test_holding_step_0_opens_the_line_before_the_first_update(tmp_path: Path) -> None:
    with RunLog(tmp_path, Clock()) as log:
        log.hold(0)
        log.step(step(1))
        assert steps_of(tmp_path) == []
        log.evaluation(report(0, gold=-1.0))
    first, second = read_lines(tmp_path / "metrics.jsonl")
    assert (first["step"], first["policy_version"], first["gold_mean"], first["step_s"]) == (0, 0, -1.0, None)
    assert second["step"] == 1


def test_close_writes_what_still_waits_for_an_evaluation(tmp_path: Path) -> None:
    with RunLog(tmp_path, Clock()) as log:
        log.hold(1)
        log.step(step(1))
        log.step(step(2))
    assert steps_of(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    "misuse",
    [
        lambda log: log.step(step(2)),
        lambda log: log.hold(2),
        lambda log: log.evaluation(report(2)),
        lambda log: log.evaluation(report(3)),
    ],
    ids=["same step again", "hold of a recorded step", "evaluation that nobody announced", "second evaluation"],
)
def test_lines_out_of_order_are_refused(tmp_path: Path, misuse: Callable[[RunLog], None]) -> None:
    with RunLog(tmp_path, Clock()) as log:
        log.step(step(2))
        log.hold(3)
        log.evaluation(report(3))
        with pytest.raises(AssertionError):
            misuse(log)


def test_nan_infinity_and_numpy_numbers_become_finite_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    with RunLog(tmp_path, Clock()) as log:
        stages = {"generate": math.nan, "score": 1.0, "train": np.float32(0.5), "publish": math.inf}
        log.step(step(1, kl_sft=math.nan, grad_norm=-math.inf, loss=np.float64(0.25), stage_s=stages))
        log.event(
            "promoted", ess=np.float32("nan"), pair=np.array([1.0, math.inf]), path=Path("reward/v1"), n=np.int64(3)
        )
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (row["kl_sft"], row["grad_norm"], row["loss"]) == (None, None, 0.25)
    assert row["stage_s"] == {"generate": None, "score": 1.0, "train": 0.5, "publish": None}
    event = json.loads((tmp_path / "events.jsonl").read_text(), parse_constant=refuse)
    assert (event["ess"], event["pair"], event["path"], event["n"]) == (None, [1.0, None], "reward/v1", 3)


def test_events_tell_seconds_since_the_start_and_a_resumed_run_goes_on_from_there(tmp_path: Path) -> None:
    clock = Clock()
    clock.now = 1000.0
    with RunLog(tmp_path, clock) as log:
        clock.now += 12.5
        log.event("correction_started", snapshot_version=10)
    later = Clock()
    later.now = 77.0
    with RunLog(tmp_path, later) as log:
        later.now += 2.0
        assert log.elapsed_s() == 14.5
        log.event("resumed")
    assert [(row["time_s"], row["event"]) for row in read_lines(tmp_path / "events.jsonl")] == [
        (12.5, "correction_started"),
        (14.5, "resumed"),
    ]


def test_a_torn_last_line_is_passed_over_by_readers_and_cut_off_by_the_next_writer(tmp_path: Path) -> None:
    with RunLog(tmp_path, Clock()) as log:
        log.step(step(1))
        log.step(step(2))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert [row["step"] for row in read_jsonl(path)] == [1]
    with RunLog(tmp_path, Clock()) as log:
        log.step(step(2))
    assert steps_of(tmp_path) == [1, 2]


def test_a_full_disk_ends_the_run_and_costs_at_most_the_line_that_did_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writer, limits = JsonlWriter(path), resource.getrlimit(resource.RLIMIT_FSIZE)
    numbers = itertools.count()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            [writer.write({"number": number, "text": "x" * 30}) for number in numbers]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    num_written = next(numbers) - 1
    assert 10 < num_written < 30
    assert path.stat().st_size == 1000
    again = JsonlWriter(path)
    again.write({"number": num_written})
    again.close()
    assert [row["number"] for row in read_jsonl(path)] == list(range(num_written + 1))


def test_a_summary_that_the_disk_has_no_room_for_is_not_there(tmp_path: Path) -> None:
    with RunLog(tmp_path, Clock()) as log:
        log.step(step(1))
    (tmp_path / "summary.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        summarise(tmp_path)
    assert not (tmp_path / "summary.json").exists()


def test_a_whole_last_line_counts_even_without_its_newline(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_resumed_runs_lines_replace_those_of_the_abandoned_future() -> None:
    rows = [{"step": s, "run": run} for run, s in ((1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (2, 4))]
    assert rewound(rows) == [{"step": 1, "run": 1}, *({"step": s, "run": 2} for s in (2, 3, 4))]


def test_tensorboard_holds_the_numbers_of_the_lines(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    idle = {"generation": 0.125, "policy": 0.5, "scoring": 0.5, "reward": 0.5}
    with RunLog(tmp_path, Clock()) as log:
        log.hold(2)
        log.step(step(1, loss=0.75, idle_share=idle, kl_sft=math.nan))
        log.step(step(2, loss=0.5, idle_share=idle))
        log.evaluation(report(2, gold=3.5))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(point.step, point.value) for point in board.Scalars("loss")] == [(1, 0.75), (2, 0.5)]
    assert [point.value for point in board.Scalars("idle_share/generation")] == [0.125, 0.125]
    assert [(point.step, point.value) for point in board.Scalars("gold_mean")] == [(2, 3.5)]
    assert "kl_sft" not in board.Tags()["scalars"]


def test_samples_are_written_as_they_are(tmp_path: Path) -> None:
    rows = [{"step": 3, "prompt": "a\nb", "response": "c ✓", "proxy": 1.5, "gold": None, "length": 4}]
    with RunLog(tmp_path, Clock()) as log:
        log.samples(rows)
    assert read_lines(tmp_path / "samples.jsonl") == rows


def test_idle_share_is_exact_for_overlapping_requests_on_a_virtual_clock() -> None:
    clock = Clock()
    meter = BusyMeter(clock)

    async def overlapping() -> None:
        clock.now = 2.0  # idle 0-2
        async with meter.request():
            clock.now = 3.0
            async with meter.request():
                clock.now = 5.0
            clock.now = 6.0
        clock.now = 8.0  # idle 6-8
        assert meter.idle_share_since_last() == pytest.approx(4 / 8)
        async with meter.request():
            clock.now = 9.0
            assert meter.idle_share_since_last() == 0.0  # a request spans the boundary
            clock.now = 10.0
        clock.now = 13.0  # idle 10-13
        assert meter.idle_share_since_last() == pytest.approx(3 / 4)
        async with meter.request():
            async with meter.request():
                clock.now = 14.0
            clock.now = 17.0
            assert meter.idle_share_since_last() == 0.0  # the first of two is still in flight

    asyncio.run(overlapping())


def test_a_request_that_fails_ends_its_count() -> None:
    clock = Clock()
    meter = BusyMeter(clock)

    async def failing() -> None:
        async with meter.request():
            clock.now = 3.0
            raise ValueError("lost")

    with pytest.raises(ValueError, match="lost"):
        asyncio.run(failing())
    clock.now = 4.0
    assert meter.idle_share_since_last() == pytest.approx(1 / 4)


def test_idle_share_of_no_time_says_what_is_the_case_now() -> None:
    clock = Clock()
    meter = BusyMeter(clock)

    async def busy() -> float:
        async with meter.request():
            return meter.idle_share_since_last()

    assert meter.idle_share_since_last() == 1.0
    assert asyncio.run(busy()) == 0.0


@pytest.mark.parametrize(
    ("gold", "peak"),
    [
        ([0.0, 3.0, 9.0, 3.0, 4.0, 5.0], 16 / 3),  # (9 + 3 + 4) / 3, not the single 9
        ([2.0, 4.0], 3.0),
        ([-5.0], -5.0),
        ([-5.0, -4.0, -3.0, -9.0], -4.0),
        ([], None),
    ],
)
def test_the_peak_is_the_largest_mean_of_three_neighbouring_evaluations(gold: list[float], peak: float | None) -> None:
    found = gold_peak(gold)
    assert found is None if peak is None else found == pytest.approx(peak, rel=1e-12)


def test_the_summary_holds_the_last_evaluation_the_peak_and_the_drop(tmp_path: Path) -> None:
    interval = {"gold_win_rate_low": 0.5, "gold_win_rate_high": 0.7}
    win_rates = {"gold_win_rate": 0.6, **interval, "gold_win_rate_reference": 0.25}
    with RunLog(tmp_path, Clock()) as log:
        for number, gold in ((0, 0.0), (2, 3.0), (4, 6.0), (6, 3.0), (8, 1.0)):
            log.hold(number)
            if number:
                log.step(step(number - 1))
                log.step(step(number))
            log.evaluation(report(number, gold=gold, gold_se=0.1, **win_rates, rm_accuracy=0.625))
        log.step(step(9))
    summary = summarise(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary == {
        "gold_mean": 1.0,
        "gold_se": 0.1,
        "gold_win_rate": 0.6,
        "gold_win_rate_low": 0.5,
        "gold_win_rate_high": 0.7,
        "gold_win_rate_reference": 0.25,
        "rm_accuracy": 0.625,
        "gold_peak": 4.0,
        "gold_drop_from_peak": 3.0,
        "proxy_mean": 0.5,
        "kl_sft": 2.25,
        "steps": 9,
        "wall_s": 90.0,
    }


def test_the_summary_of_a_run_without_gold_has_null_gold_and_the_rest() -> None:
    summary = summary_of([{"step": 4, "time_s": 8.0, "proxy_mean": 1.5, "gold_mean": None, "eval_kl_sft": 0.5}])
    assert [summary[key] for key in summary if key.startswith(("gold", "rm"))] == [None] * 9
    assert (summary["proxy_mean"], summary["kl_sft"], summary["steps"], summary["wall_s"]) == (1.5, 0.5, 4, 8.0)
