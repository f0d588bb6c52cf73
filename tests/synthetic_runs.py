"""Writes run folders as a finished run would leave them, with figures that follow closed forms."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ocrm_ray.metrics import RunLog, StepRecord, summarise
from ocrm_ray.records import EvaluationReport


@dataclass(frozen=True)
class Shape:
    """What a synthetic run looks like; ``decline`` is how fast gold falls after its peak."""

    num_updates: int = 140
    every: int = 10
    gold: bool = True
    decline: float = 0.12
    correct: bool = True
    weighted: bool = True
    seed: int = 1
    summary: bool = True
    planned_updates: int | None = None


class Clock:
    """Seconds that only move when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def gold_at(step: int, shape: Shape) -> float:
    return 4.2 * (1 - math.exp(-step / 9)) - shape.decline * max(0, step - 60) * (1 + step / 140) / 2


def proxy_at(step: int) -> float:
    return 5.5 * (1 - math.exp(-step / 15)) + 0.012 * step


def kl_at(step: int, shape: Shape) -> float:
    return 2.5 * (1 - math.exp(-step / 12)) + shape.decline * 0.35 * step


def evaluation(step: int, shape: Shape, noise: np.random.Generator) -> EvaluationReport:
    gold = gold_at(step, shape) + 0.08 * noise.standard_normal()
    win_rate, accuracy = 1 / (1 + math.exp(-gold / 2)), 0.72 - 0.0009 * shape.decline * 8 * step
    of_gold = {
        "gold_mean": gold,
        "gold_mean_even": gold + 0.05,
        "gold_mean_odd": gold - 0.05,
        "gold_se": 0.06,
        "gold_win_rate": win_rate,
        "gold_win_rate_low": win_rate - 0.02,
        "gold_win_rate_high": win_rate + 0.03,
        "gold_win_rate_reference": win_rate - 0.1,
        "gold_win_rate_reference_low": win_rate - 0.12,
        "gold_win_rate_reference_high": win_rate - 0.07,
        "rm_accuracy": accuracy,
        "rm_accuracy_by_gap": [accuracy - 0.1, accuracy if step % 20 else None, accuracy + 0.1],
        "rm_pairs_by_gap": [85, 85, 86],
        "rm_pair_loss": 0.6 + 0.002 * step,
        "proxy_gold_spearman": 0.6 - 0.003 * step,
    }
    return EvaluationReport(
        step=step,
        policy_version=step,
        proxy_mean=proxy_at(step) + 0.05 * noise.standard_normal(),
        kl_sft=kl_at(step, shape) * (1 + 0.03 * noise.standard_normal()),
        response_tokens_mean=11.4,
        kl_sft_k3=kl_at(step, shape),
        kl_anchor=kl_at(step % 20, shape),
        kl_anchor_k3=1.1 * kl_at(step % 20, shape),
        reward_spread=0.4 - 0.0005 * step,
        proxy_length_correlation=0.1 + 0.002 * step,
        distinct_1=0.02 * math.exp(-step / 200),
        distinct_2=0.3 * math.exp(-step / 100),
        **(of_gold if shape.gold else {}),
    )


def record(step: int, clock: Clock, noise: np.random.Generator, in_flight: bool) -> StepRecord:
    step_s = 1.2 + 0.15 * abs(noise.standard_normal()) + (0.1 if in_flight else 0)
    clock.now += step_s
    idle = {"generation": 0.03, "policy": 0.55, "scoring": 0.5, "reward": 0.4 if in_flight else 0.85}
    return StepRecord(
        step=step,
        time_s=clock.now,
        policy_version=step,
        reward_version=step // 10,
        anchor_version=0,
        rollout_version_min=max(step - 2, 0),
        reward_mean=proxy_at(step),
        kl_sft=kl_at(step, Shape()),
        kl_anchor=kl_at(step, Shape()),
        rollout_tokens=int(1400 + 40 * noise.standard_normal()),
        step_s=step_s,
        logprob_gap=0.002,
        stage_s={"generate": 0.97 * step_s, "score": 0.3, "train": 0.5 + 0.05 * noise.random(), "publish": 0.08},
        idle_share={pool: min(1.0, share + 0.05 * noise.random()) for pool, share in idle.items()},
        loss=0.01,
        entropy=1.9,
    )


def write_run(run_dir: Path, shape: Shape) -> Path:
    """A run folder as the product writes it, through its own writers."""
    noise, clock = np.random.default_rng(shape.seed), Clock()
    run_dir.mkdir(parents=True)
    planned = shape.planned_updates or shape.num_updates
    (run_dir / "config.yaml").write_text(
        f"name: {run_dir.name}\npolicy:\n  num_updates: {planned}\n  algorithm: rloo\n"
    )
    with RunLog(run_dir, clock) as log:
        log.hold(0)
        write_evaluation(log, evaluation(0, shape, noise))
        for step in range(1, shape.num_updates + 1):
            phase = step % shape.every if shape.correct and step > shape.every else None
            if step % shape.every == 0:
                log.hold(step)
            log.step(record(step, clock, noise, in_flight=phase is not None and phase < 4))
            log.event("weights_published", policy_version=step, bytes=412_000, seconds=0.08, pause_s=0.036)
            if phase is not None:
                write_correction(log, step, phase, shape, clock)
            if step % shape.every == 0:
                write_evaluation(log, evaluation(step, shape, noise))
    if shape.summary:
        summarise(run_dir)
    return run_dir


def write_correction(log: RunLog, step: int, phase: int, shape: Shape, clock: Clock) -> None:
    """Ratios, refit and promotion spread over the four steps after a multiple of k."""
    snapshot = step - phase
    ess_fraction = 0.5 * math.exp(-(snapshot - 20) / 25)
    if phase == 0:
        log.event("correction_started", snapshot_version=step, strategy="ocrm")
    elif snapshot <= shape.every:
        return
    elif phase == 1 and shape.weighted:
        weights = {"ess_fraction": ess_fraction, "max_weight_share": 1e-4 / ess_fraction, "log_weight_std": 1.25}
        weights["length_correlation"] = 0.75 * ess_fraction
        log.event("ratios_scored", snapshot_version=snapshot, num_pairs=19_000, **weights)
    elif phase == 3:
        log.event("refit_finished", snapshot_version=snapshot, reward_version=snapshot // 10 - 1, refit_s=2.5)
    elif phase == 4:
        log.event(
            "promoted",
            reward_version=snapshot // 10 - 1,
            snapshot_version=snapshot,
            policy_version=step,
            ess_fraction=ess_fraction if shape.weighted else None,
            refit_s=5.2,
            lag_steps=4,
            num_rollouts_finished=64 + snapshot,
        )


def write_evaluation(log: RunLog, report: EvaluationReport) -> None:
    log.evaluation(report)
    log.samples(
        {
            "step": report.step,
            "prompt": f"river stone market {index}",
            "response": f"a fine stone by the river, said {report.step} times",
            "proxy": report.proxy_mean + index,
            "gold": None if report.gold_mean is None else report.gold_mean - index,
            "length": 12,
        }
        for index in range(3)
    )


def read_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
