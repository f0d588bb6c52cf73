"""A rehearsal's figures from hand-made files, and the configuration that it makes."""

from collections import Counter, defaultdict
from pathlib import Path

import pytest
from fakes import tiny_run

from ocrm_ray.config import RunConfig
from ocrm_ray.errors import UserError
from ocrm_ray.rehearsal import BACKGROUND, Figures, figure_lines, figures, prepared
from ocrm_ray.run_files import Run

SECTION = {
    "num_updates": 2,
    "engine_slots": 2,
    "generate": {"item_s": 1.0},
    "score": {"item_s": 0.5},
    "reward": {"item_s": 0.25},
    "train": {"item_s": 0.5},
    "refit_s": 3.0,
}


def config_of(**overrides: object) -> RunConfig:
    return tiny_run(**{"rehearsal": SECTION, "pools.generation.num_actors": 2, **overrides})


def row(step: int, time_s: float, step_s: float, **more: float) -> dict[str, object]:
    waits = dict.fromkeys(("rollout_wait_s", "straggler_wait_s", "publish_wait_s", "correction_wait_s"), 0.0)
    return {"step": step, "time_s": time_s, "step_s": step_s, "num_deferred_corrections": 0, **waits, **more}


def promotion(at: int, snapshot: int, reward_version: int) -> dict[str, object]:
    versions = {"policy_version": at, "snapshot_version": snapshot, "reward_version": reward_version}
    return {"event": "promoted", "lag_steps": at - snapshot, **versions}


def measured(config: RunConfig, events: list[dict[str, object]], num_ranks: int = 0) -> Figures:
    """Steps 6 and 7, from 10 to 20 s: the pipeline is full after 5 updates. So many ranks had an update of 4 s."""
    rows = [row(step, 2.0 * step, 2.0) for step in range(6)]
    rows += [row(6, 14.0, 4.0, rollout_wait_s=1.0), row(7, 20.0, 6.0, publish_wait_s=3.0, num_deferred_corrections=1)]
    rows += [row(8, 50.0, 30.0, correction_wait_s=30.0)]
    booked = defaultdict(list)
    booked["generation"] = [(9.0, 5.0), (13.0, 4.0), (19.0, 100.0), (2.0, 3.0)]  # 4 + 4 + 1 s in the window
    booked["scoring"] = [(11.0, 6.0)]
    booked["refit"] = [(0.0, 100.0)]
    booked["staleness"] = [(9.9, 5.0), (10.0, 0.0), (14.0, 1.0), (14.0, 1.0), (20.0, 7.0)] * max(1, num_ranks)
    booked["policy"] = [(11.0, 4.0)] * num_ranks
    return figures(config, Run(Path(), "", rows, events, []), booked)


def test_only_what_was_drawn_while_the_pipeline_was_full_counts() -> None:
    found = measured(prepared(config_of()), [])
    expected = {"generation": 9 / 4 / 2, "scoring": 6 / 2, "reward": 0, "policy": 0, "publish": 0, "ratios": 0}
    assert found.busy_s == pytest.approx(expected | {"refit": 10 / 2})
    assert found.step_s == 5.0
    assert (found.bottleneck, found.limit_s, found.efficiency) == ("scoring", 3.0, pytest.approx(0.6))
    assert list(found.wait_s.values()) == [0.5, 0.0, 1.5, 0.0]
    assert found.staleness == Counter({0: 1, 1: 2})
    assert found.num_deferred == 1


def test_ranks_that_train_together_are_as_many_workers_and_see_each_rollout_once() -> None:
    one, eight = (measured(prepared(config_of(**{"pools.policy.num_actors": number})), [], number) for number in (1, 8))
    assert one.busy_s["policy"] == 2.0
    assert eight == one


def test_lags_and_ages_are_those_of_the_measured_updates() -> None:
    events = [promotion(4, 2, 1), promotion(6, 4, 2), promotion(8, 6, 3)]
    found = measured(prepared(config_of()), events)
    assert found.lags == Counter({2: 1})
    assert found.ages == Counter({5 - 2: 1, 6 - 4: 1})
    null = measured(prepared(config_of()), [promotion(4, 2, 0)])
    assert (null.lags, null.ages) == (Counter(), Counter({5: 1, 6: 1}))


def test_the_figures_are_told() -> None:
    config = prepared(config_of())
    lines = figure_lines(config, measured(config, [promotion(6, 4, 2)]))
    assert lines[1].split() == ["generation", "4", "1.125", "78%"]
    assert lines[8:] == [
        "step: 5.00 s, predicted 2.00 s",
        "limit: 3.00 s (scoring); overlap efficiency 60.0%",
        "training waited, s/step: rollouts 0.500, stragglers among them 0.000, publishes 1.500, corrections 0.000",
        "rollouts by staleness: 0: 1, 1: 2",
        "corrections: (ratios 0.00 s + refit 3.00 s) / 1 refitter <= 4 steps of 5.00 s = 20 s: "
        "they keep up and nothing waits",
        "corrections by updates until promotion: 2: 1; 1 deferred",
        "updates by those since the live reward model's snapshot: 2: 1, 5: 1",
    ]


@pytest.mark.parametrize(("staleness", "num_updates"), [(0, 5 + 2 + 1), (1, 5 + 2 + 2), (4, 10 + 2 + 5)])
def test_updates_that_fill_and_empty_the_pipeline_are_added(staleness: int, num_updates: int) -> None:
    config = prepared(config_of(**{"rollout.max_staleness": staleness, "correction.num_pairs": 5}))
    assert config.policy.num_updates == config.checkpoint.every == config.evaluation.every == num_updates
    assert config.correction.num_pairs is None


def test_durations_of_an_earlier_run_give_its_stages_again(tmp_path: Path) -> None:
    pools = {f"pools.{pool}.num_actors": 3 for pool in ("generation", "scoring", "reward")}
    config = tiny_run(**pools, **{"output_dir": str(tmp_path), "correction.strategy": "none"})
    config.run_dir.mkdir()
    stages = '{"generate": 3.0, "score": 2.0, "train": 1.5, "publish": 0.25}'
    (config.run_dir / "metrics.jsonl").write_text(f'{{"step": 1, "time_s": 9.0, "step_s": 9.0, "stage_s": {stages}}}\n')
    section = prepared(config).rehearsal
    assert section is not None
    assert section.engine_slots == 2  # 4 prompts on 3 engines
    busy = {
        "generate": 4 * section.generate.mean_s(1) / (3 * section.engine_slots),
        "score": section.score.mean_s(4 / 3),
        "reward": section.reward.mean_s(4 / 3),
        "train": section.train.mean_s(4),
        "publish": section.publish_s,
    }
    assert busy == pytest.approx({"generate": 3.0, "score": 2.0, "reward": 2.0, "train": 1.5, "publish": 0.25})


def test_without_any_durations_the_section_is_asked_for(tmp_path: Path) -> None:
    config = tiny_run(**{"output_dir": str(tmp_path), "world": None, "sft.base": "org/name"})
    with pytest.raises(UserError, match=r"rehearsal: got nothing, need durations: .*: write that section"):
        prepared(config)


def test_background_work_limits_no_step() -> None:
    busy = {"policy": 1.0, "ratios": 5.0, "refit": 9.0}
    found = Figures(2.0, busy, {}, Counter(), Counter(), Counter(), 0)
    assert set(busy) > set(BACKGROUND)
    assert (found.bottleneck, found.limit_s) == ("policy", 1.0)
