"""Numerical guards: what each finding is told as, and what it ends."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import FakePolicy, FakePools, FakeReward, tiny_run
from virtual_runs import events, metrics, run

from ocrm_ray.config import Guards
from ocrm_ray.errors import RunError
from ocrm_ray.guards import RejectedError, RunGuards
from ocrm_ray.policy_learning import UpdateStatistics
from ocrm_ray.records import RefitReport, RefitRequest, Rollout, UpdateReport


class Told(list[dict[str, object]]):
    def __call__(self, event: str, **fields: object) -> None:
        assert event == "guard"
        self.append(fields)


class OddPolicy(FakePolicy):
    """Its third update has another report."""

    odd: dict[str, float]

    async def update(self, rollouts: list[Rollout]) -> UpdateReport:  # type: ignore[override]
        report = await super().update(rollouts)
        return replace(report, **self.odd) if report.version == 3 else report


def odd_fakes(**odd: float) -> FakePools:
    policy = OddPolicy()
    policy.odd = odd
    return FakePools(policy=policy)


def test_skipped_steps_are_counted_in_their_line_and_told_as_an_event(tmp_path: Path) -> None:
    run(tiny_run(), odd_fakes(num_skipped_steps=2), tmp_path)
    assert [row["num_skipped_steps"] for row in metrics(tmp_path)][1:5] == [0, 0, 2, 0]
    (event,) = events(tmp_path, "guard")
    told = {"guard": "gradient", "action": "skipped", "value": 2, "bound": 3, "policy_version": 3}
    assert event.items() >= told.items()


def test_statistics_leave_skipped_steps_out_of_their_means() -> None:
    statistics = UpdateStatistics()
    for norm in (1.0, math.nan, math.inf, 3.0):
        statistics.add_step(norm, grad_norm=norm)
    assert statistics.sums["grad_norm"] / statistics.weights["grad_norm"] == 2.0
    assert statistics.num_skipped_steps == 2


def test_a_kl_beyond_its_bound_ends_the_run_after_the_line_of_its_step(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"update 3: KL to the SFT model 8.5 nats a response, guards.max_kl 8:"):
        run(tiny_run(**{"guards.max_kl": 8.0}), odd_fakes(kl_sft=8.5), tmp_path)
    assert [row["step"] for row in metrics(tmp_path)] == [0, 1, 2, 3]
    (event,) = events(tmp_path, "guard")
    assert event.items() >= {"guard": "kl", "action": "stopped", "value": 8.5, "bound": 8.0}.items()


@pytest.mark.parametrize("bound", [None, 8.5])
def test_a_kl_at_its_bound_or_without_one_is_no_finding(tmp_path: Path, bound: float | None) -> None:
    run(tiny_run(**{"guards.max_kl": bound}), odd_fakes(kl_sft=8.5), tmp_path)
    assert events(tmp_path, "guard") == []


def test_a_kl_that_is_no_number_is_beyond_every_bound() -> None:
    report = UpdateReport(3, 0.0, 0.0, math.nan, 1.0, 0.0, 1.0, 0.0, 1.0)
    with pytest.raises(RunError):
        RunGuards(Guards(max_kl=1e9), Told()).check_update(report)


def test_a_sampler_that_differs_from_the_trainer_beyond_the_bound_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"update 3: .* 0.25 nats a token, guards.max_logprob_gap 0.2: "):
        run(tiny_run(**{"guards.max_logprob_gap": 0.2}), odd_fakes(logprob_gap=0.25), tmp_path)
    (event,) = events(tmp_path, "guard")
    assert event.items() >= {"guard": "logprob_gap", "action": "stopped", "value": 0.25, "bound": 0.2}.items()


def test_weights_of_a_small_effective_sample_are_reported_and_used(tmp_path: Path) -> None:
    fakes = FakePools()
    run(tiny_run(**{"guards.min_ess_fraction": 0.999}), fakes, tmp_path)
    found = [(row["guard"], row["action"], row["snapshot_version"]) for row in events(tmp_path, "guard")]
    assert found == [("ess", "reported", 4), ("ess", "reported", 8)]
    assert [row["value"] for row in events(tmp_path, "guard")] == [
        row["ess_fraction"] for row in events(tmp_path, "ratios_scored")
    ]
    assert [row["reward_version"] for row in events(tmp_path, "promoted")] == [1, 2]


@pytest.mark.parametrize(("accuracy", "is_rejected"), [(0.39, True), (0.41, False), (0.9, False), (math.nan, True)])
def test_a_refit_is_rejected_if_it_is_less_accurate_by_more_than_allowed(accuracy: float, is_rejected: bool) -> None:
    told, refit = Told(), RefitReport(1, Path(), 0.5, accuracy, 1.0)
    guards = RunGuards(Guards(max_accuracy_drop=0.3), told)
    guards.check_refit(4, refit, None)
    if is_rejected:
        with pytest.raises(RejectedError, match=r"first reward model's 0\.700"):
            guards.check_refit(4, refit, 0.7)
    else:
        guards.check_refit(4, refit, 0.7)
    assert len(told) == is_rejected


class CollapsedOnce(FakeReward):
    """Its first refit prefers what was rejected."""

    async def refit(self, request: RefitRequest) -> RefitReport:
        report = await super().refit(request)
        return replace(report, heldout_accuracy=0.3) if len(self.refits) == 1 else report


@pytest.mark.parametrize("on_failure", ["keep_old", "stop"])
def test_a_collapsed_refit_is_not_promoted_nor_tried_again_and_the_next_one_is(tmp_path: Path, on_failure: str) -> None:
    fakes = FakePools(reward=CollapsedOnce())
    run(tiny_run(**{"correction.on_failure": on_failure}), fakes, tmp_path)
    (event,) = events(tmp_path, "guard")
    told = {"guard": "accuracy", "action": "rejected", "value": 0.3, "snapshot_version": 4}
    assert event.items() >= told.items()
    assert event["bound"] == pytest.approx(0.72 - 0.3)
    failed = [(row["attempt"], row["action"]) for row in events(tmp_path, "correction_failed")]
    assert failed == [(1, "keep_old")]
    assert [(row["snapshot_version"], row["reward_version"]) for row in events(tmp_path, "promoted")] == [(8, 1)]
    assert np.unique([row["reward_version"] for row in metrics(tmp_path)[:9]]).tolist() == [0]
