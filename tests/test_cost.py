"""The predicted step against its formulas, and against an earlier run's files."""

import json
import os
from pathlib import Path

import pytest

from ocrm_ray.config import Rehearsal, RunConfig
from ocrm_ray.cost import UTILISATION, StepCost, cost_lines, measured_cost, predicted_cost, rehearsed_cost, step_cost
from ocrm_ray.memory import NetworkSizes

SIZES = NetworkSizes(policy=10**9, reward=10**8, vocabulary=50)


def config_of(**sections: object) -> RunConfig:
    tree = {
        "name": "trial",
        "data": {"max_prompt_tokens": 100},
        "rollout": {"max_new_tokens": 28, "prompts_per_step": 8, "samples_per_prompt": 2},
    }
    return RunConfig.model_validate({**tree, **sections})


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)


def test_stages_follow_the_operation_counts() -> None:
    cost = predicted_cost(config_of(policy={"num_epochs": 2}), SIZES)
    tokens, speed = 16 * 128, UTILISATION * 50e9
    assert cost.stage_s == pytest.approx(
        {
            "generate": 0.05 + 2e9 * tokens / speed + 28 * 0.01,
            "score": 0.05 + 2e9 * tokens / speed,
            "train": 0.05 + 7 * 2e9 * tokens / speed,
            "publish": 0.05 + 4e9 / 0.2e9,
        }
    )
    assert cost.step_s == pytest.approx(max(cost.stage_s.values()))


def test_without_staleness_the_stages_follow_one_another() -> None:
    rollout = {"max_new_tokens": 28, "prompts_per_step": 8, "samples_per_prompt": 2, "max_staleness": 0}
    cost = predicted_cost(config_of(rollout=rollout), SIZES)
    assert cost.step_s == pytest.approx(sum(cost.stage_s.values()))


def test_a_moving_anchor_is_scored_beside_the_sft_model() -> None:
    still, moving = (
        predicted_cost(config_of(correction={"kl_reference": reference}), SIZES).stage_s["score"] - 0.05
        for reference in ("sft", "moving")
    )
    assert moving == pytest.approx(2 * still)


def test_threads_beyond_the_cores_do_not_help() -> None:
    def train_s(threads: int) -> float:
        return (
            predicted_cost(config_of(pools={"policy": {"threads_per_actor": threads}}), SIZES).stage_s["train"] - 0.05
        )

    assert train_s(2) == pytest.approx(train_s(1) / 2)
    assert train_s(64) == pytest.approx(train_s(1) / 4)


def test_pools_that_share_the_cores_are_no_faster_than_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    tokens, speed = 16 * 128, UTILISATION * 50e9
    cost = predicted_cost(config_of(pools={"policy": {"dtype": "bfloat16"}}), SIZES)
    work_s = (2e9 * tokens * (1 + 1 + 4 / 4) + 2e8 * tokens) / speed
    assert cost.step_s == pytest.approx(work_s)


def test_a_correction_costs_its_ratios_and_its_refit() -> None:
    sections = {"correction": {"num_pairs": 100}, "reward": {"num_calibration": 50}}
    cost = predicted_cost(config_of(**sections), SIZES)
    speed = UTILISATION * 50e9
    assert cost.ratio_s == pytest.approx(2e9 * 200 * 128 / speed)
    assert cost.refit_s == pytest.approx((6e8 * 200 * 128 + 2e8 * 50 * 128) / speed)
    unweighted = predicted_cost(config_of(correction={"num_pairs": 100, "strategy": "refit"}), SIZES)
    assert unweighted.ratio_s == 0
    assert predicted_cost(config_of(correction={"strategy": "none"}), SIZES).refit_s is None


def test_one_actor_of_a_pool_does_the_work_of_a_correction() -> None:
    costs = [
        predicted_cost(config_of(pools={"scoring": {"num_actors": num}, "reward": {"num_actors": num}}), SIZES)
        for num in (1, 4)
    ]
    assert (costs[0].ratio_s, costs[0].refit_s) == (costs[1].ratio_s, costs[1].refit_s)
    assert costs[0].stage_s["score"] > costs[1].stage_s["score"]


def test_a_refit_is_as_much_faster_as_it_has_ranks() -> None:
    costs = [predicted_cost(config_of(pools={"reward": {"num_refit_ranks": num}}), SIZES) for num in (1, 4)]
    assert costs[1].refit_s == pytest.approx((costs[0].refit_s or 0.0) / 4)
    assert (costs[0].ratio_s, costs[0].stage_s) == (costs[1].ratio_s, costs[1].stage_s)


def test_weights_between_whole_gpus_go_faster_than_through_files() -> None:
    pools = {"policy": {"gpus_per_actor": 1}, "generation": {"gpus_per_actor": 1}}
    by_nccl, by_files = (
        predicted_cost(config_of(pools=pools, publish={"transport": transport}), SIZES).stage_s["publish"]
        for transport in ("auto", "object_store")
    )
    assert (by_nccl, by_files) == (pytest.approx(0.05 + 4e9 / 5e9), pytest.approx(0.05 + 4e9 / 0.2e9))


COST = StepCost("assumed", {"generate": 1.0, "train": 2.0}, step_s=2.0, ratio_s=15.0, refit_s=10.0)
REMEDY = "lower correction.num_pairs, or give pools.scoring (ratios) and pools.reward (refit) more threads or GPUs"


@pytest.mark.parametrize(
    ("correction", "line"),
    [
        (
            {"every": 13},
            "(ratios 15 s + refit 10 s) / 1 refitter <= 13 steps of 2.00 s = 26 s: they keep up and nothing waits",
        ),
        (
            {"every": 12},
            "(ratios 15 s + refit 10 s) / 1 refitter > 12 steps of 2.00 s = 24 s: they fall behind; "
            f"set correction.every to 13, or {REMEDY}",
        ),
        (
            {"every": 20, "promote_after": 5},
            "(ratios 15 s + refit 10 s) / 1 refitter > 5 steps of 2.00 s = 10 s: training waits 15 s for each; "
            f"set correction.promote_after to 13, or {REMEDY}",
        ),
        (
            {"every": 20, "schedule": "blocking"},
            "ratios 15 s + refit 10 s, for which the run stops every 20 updates (schedule blocking)",
        ),
        ({"strategy": "none"}, "none, the reward model stays as it is"),
    ],
)
def test_whether_corrections_keep_up_is_said(correction: dict[str, object], line: str) -> None:
    assert cost_lines(config_of(correction=correction), COST) == [
        "predicted step: 2.00 s (generate 1.00 s, train 2.00 s), assumed",
        "predicted run: 140 updates, 4 min 40 s without evaluations",
        f"corrections: {line}",
    ]


def test_an_earlier_run_is_measured(tmp_path: Path) -> None:
    config = config_of(output_dir=str(tmp_path))
    assert measured_cost(config) is None
    config.run_dir.mkdir()
    rows: list[dict[str, object]] = [{"step": 0, "time_s": 0.0}]
    rows += [
        {"step": step, "time_s": 9.0 * step, "step_s": 2.0 * step, "stage_s": {"generate": 1.0 * step, "train": None}}
        for step in (1, 2)
    ]
    (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    events = [("correction_started", 1.0), ("ratios_scored", 4.0), ("refit_finished", 9.0)]
    lines = [json.dumps({"time_s": time_s, "event": event}) + "\n" for event, time_s in events]
    (config.run_dir / "events.jsonl").write_text("".join(lines))
    assert measured_cost(config) == StepCost(
        f"measured over 2 steps in {config.run_dir}", {"generate": 1.5, "train": 0.0}, 3.0, ratio_s=3.0, refit_s=5.0
    )


REHEARSAL = {
    "generate": {"item_s": 6.0, "call_s": 2.0, "tail_share": 0.1, "tail_factor": 11.0},
    "engine_slots": 2,
    "score": {"item_s": 1.0, "call_s": 0.5},
    "reward": {"item_s": 0.5},
    "train": {"item_s": 2.0, "jitter": 0.7},
    "weights_gib": 3.0,
    "publish_gib_per_s": 2.0,
    "pause_s": 0.5,
    "ratio_s": 15.0,
    "refit_s": 10.0,
}
POOLS = {"generation": {"num_actors": 4}, "scoring": {"num_actors": 2}, "reward": {"num_actors": 2}}


def rehearsed(**sections: object) -> StepCost:
    cost = rehearsed_cost(config_of(rehearsal=REHEARSAL, pools=POOLS, **sections))
    assert cost is not None
    return cost


def test_a_rehearsals_stages_are_spread_over_their_workers() -> None:
    cost = rehearsed(correction={"strategy": "none"})
    assert cost.stage_s == pytest.approx(
        {"generate": 8 * 16.0 / 8 + 0.5, "score": 4.5, "reward": 2.0, "train": 16.0, "publish": 1.5}
    )
    assert cost.step_s == pytest.approx(16.5)
    fresh = {"prompts_per_step": 8, "max_staleness": 0}
    assert rehearsed(correction={"strategy": "none"}, rollout=fresh).step_s == pytest.approx(16.5 + 4.5 + 16 + 1.5)


def test_a_publish_takes_no_less_than_its_pause() -> None:
    assert [Rehearsal.model_validate(REHEARSAL | {"pause_s": pause_s}).publish_s for pause_s in (1.0, 2.0)] == [
        1.5,
        2.0,
    ]


def test_a_candidate_scores_the_queue_at_each_promotion() -> None:
    still, moving = (rehearsed(correction={"every": 4, "kl_reference": kind}).stage_s for kind in ("sft", "moving"))
    assert still["reward"] == moving["reward"] == pytest.approx(2.0 * (1 + 2 / 4))
    assert still["score"] == pytest.approx(0.5 + 4.0)
    assert moving["score"] == pytest.approx(0.5 + 4.0 * (1 + 1 / 4))


def test_durations_come_before_an_earlier_run_and_that_before_arithmetic(tmp_path: Path) -> None:
    config = config_of(output_dir=str(tmp_path))
    assert step_cost(config, None) is None
    assert step_cost(config, SIZES) == predicted_cost(config, SIZES)
    config.run_dir.mkdir()
    row = {"step": 1, "time_s": 2.0, "step_s": 2.0, "stage_s": {"train": 1.0}}
    (config.run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert step_cost(config, SIZES) == measured_cost(config)
    config = config_of(output_dir=str(tmp_path), rehearsal=REHEARSAL)
    assert step_cost(config, SIZES) == rehearsed_cost(config)


def test_a_rehearsal_that_falls_behind_says_what_to_change() -> None:
    config = config_of(rehearsal=REHEARSAL, pools=POOLS, correction={"every": 1})
    cost = rehearsed_cost(config)
    assert cost is not None
    assert cost_lines(config, cost)[2] == (
        "corrections: (ratios 15 s + refit 10 s) / 1 refitter > 1 steps of 16 s = 16 s: they fall behind; "
        f"set correction.every to 2, or {REMEDY}"
    )
    unweighted = rehearsed(correction={"every": 1, "strategy": "refit"})
    assert (unweighted.ratio_s, unweighted.refit_s) == (0.0, 10.0)
