"""The coordinator over fakes on a virtual clock: order, overlap, versions, failures; exact and instant."""

from pathlib import Path

import pytest
from fakes import FakeEvaluator, FakeGeneration, FakePolicy, FakePools, FakeReward, FakeScoring, tiny_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from virtual_runs import events, metrics, run

from ocrm_ray.config import Correction
from ocrm_ray.errors import StalledError
from ocrm_ray.judge import JudgeStatistics
from ocrm_ray.records import Rollout


def test_a_refit_that_never_ends_stalls_neither_steps_nor_rollouts(tmp_path: Path) -> None:
    never, frozen = FakePools(reward=FakeReward(refit_s=lambda n: float("inf"))), FakePools()
    with_refit_s = run(tiny_run(), never, tmp_path / "never")
    without_s = run(tiny_run(**{"correction.strategy": "none"}), frozen, tmp_path / "frozen")
    assert len(never.policy.updates) == 12
    assert with_refit_s == without_s
    assert [time for time, _ in never.generation.finished] == [time for time, _ in frozen.generation.finished]


def test_what_a_judge_was_asked_is_an_event_of_every_evaluation(tmp_path: Path) -> None:
    told = JudgeStatistics(9, 2, 0, 0, 3, 15, 1, 0, 1500, 15, 0.25)
    run(tiny_run(), FakePools(evaluator=FakeEvaluator(judge=told)), tmp_path)
    rows = events(tmp_path, "judged")
    assert [row["step"] for row in rows] == [0, 6, 12]
    assert rows[1].items() >= {"num_pairs": 9, "num_disagreements": 2, "num_retries": 1, "cost_usd": 0.25}.items()
    run(tiny_run(), FakePools(), tmp_path / "other")
    assert events(tmp_path / "other", "judged") == []


def test_max_lag_makes_training_wait_for_a_late_refit(tmp_path: Path) -> None:
    fakes = FakePools(reward=FakeReward(refit_s=lambda n: 100.0))
    run(tiny_run(**{"correction.max_lag": 2}), fakes, tmp_path)
    assert [row["lag_steps"] for row in events(tmp_path, "promoted")] == [2, 2]
    waits = {row["step"]: row["correction_wait_s"] for row in metrics(tmp_path) if row["correction_wait_s"]}
    assert set(waits) == {6, 10}
    assert all(wait > 90 for wait in waits.values())


@pytest.mark.parametrize("refit_s", [0.0, 50.0])
def test_promote_after_promotes_at_the_same_update_whatever_the_refit_takes(tmp_path: Path, refit_s: float) -> None:
    fakes = FakePools(reward=FakeReward(refit_s=lambda n: refit_s))
    run(tiny_run(**{"correction.promote_after": 3}), fakes, tmp_path)
    assert [(row["snapshot_version"], row["policy_version"]) for row in events(tmp_path, "promoted")] == [
        (4, 7),
        (8, 11),
    ]


def test_a_quick_refit_is_promoted_at_the_next_boundary_and_never_inside_an_update(tmp_path: Path) -> None:
    fakes = FakePools(reward=FakeReward(refit_s=lambda n: 0.01), scoring=FakeScoring(ratio_s=0.01))
    run(tiny_run(), fakes, tmp_path)
    assert [(identifier, version) for _, identifier, version in fakes.policy.commits] == [
        ("snapshot-4-1", 5),
        ("snapshot-8-1", 9),
    ]


def test_blocking_stops_rollouts_and_promotes_with_no_lag(tmp_path: Path) -> None:
    fakes = FakePools(reward=FakeReward(refit_s=lambda n: 40.0))
    run(tiny_run(**{"correction.schedule": "blocking", "rollout.max_staleness": 0}), fakes, tmp_path)
    assert [row["lag_steps"] for row in events(tmp_path, "promoted")] == [0, 0]
    started, promoted = events(tmp_path, "correction_started"), events(tmp_path, "promoted")
    for start, end in zip(started, promoted, strict=True):
        inside = [time for time, _ in fakes.generation.finished if start["time_s"] < time < end["time_s"]]
        assert not inside


def test_engines_that_share_the_trainers_gpus_sleep_during_updates_and_only_then(tmp_path: Path) -> None:
    fakes = FakePools()
    keys = {"pools.generation.sleeps": True, "rollout.max_staleness": 0, "evaluation.every": 3}
    run(tiny_run(**keys), fakes, tmp_path)
    slept = [time for interval in fakes.generation.asleep for time in interval]
    assert slept == pytest.approx([time for end, _ in fakes.policy.updates for time in (end - 1.0, end)])
    assert len(slept) == 2 * 12
    awake = FakePools()
    run(tiny_run(**{"rollout.max_staleness": 0}), awake, tmp_path / "awake")
    assert awake.generation.asleep == []


def test_rollouts_finish_inside_every_correction_window_when_overlapped(tmp_path: Path) -> None:
    fakes = FakePools(reward=FakeReward(refit_s=lambda n: 2.0))
    run(tiny_run(), fakes, tmp_path)
    started, promoted = events(tmp_path, "correction_started"), events(tmp_path, "promoted")
    assert len(promoted) == 2
    for start, end in zip(started, promoted, strict=True):
        assert any(start["time_s"] < time < end["time_s"] for time, _ in fakes.generation.finished)


def test_the_ratios_are_those_of_the_snapshot_of_the_multiple_of_k(tmp_path: Path) -> None:
    fakes = FakePools(reward=FakeReward(refit_s=lambda n: 2.0))
    run(tiny_run(), fakes, tmp_path)
    assert fakes.scoring.snapshots == [4, 8]


def test_what_falls_due_during_a_correction_starts_at_the_next_promotion_and_is_counted(tmp_path: Path) -> None:
    fakes = FakePools(reward=FakeReward(refit_s=lambda n: 100.0))
    run(tiny_run(**{"correction.every": 2, "correction.promote_after": 5}), fakes, tmp_path)
    assert [row["snapshot_version"] for row in events(tmp_path, "correction_started")] == [2, 7]
    assert sum(row["num_deferred_corrections"] or 0 for row in metrics(tmp_path)) == 2 + 2


def test_a_moving_anchor_becomes_the_snapshot_that_the_reward_model_is_right_for(tmp_path: Path) -> None:
    fakes = FakePools()
    run(tiny_run(**{"correction.kl_reference": "moving"}), fakes, tmp_path)
    assert [row["anchor_version"] for row in events(tmp_path, "promoted")] == [4, 8]
    assert fakes.scoring.anchor_version == 8
    assert fakes.policy.anchor_version == 8


def test_none_is_a_null_correction_promoted_on_the_same_schedule(tmp_path: Path) -> None:
    keys = {"correction.kl_reference": "moving", "correction.promote_after": 2}
    frozen, ocrm = FakePools(), FakePools()
    run(tiny_run(**keys, **{"correction.strategy": "none"}), frozen, tmp_path / "none")
    run(tiny_run(**keys), ocrm, tmp_path / "ocrm")
    schedule = [
        [(row["snapshot_version"], row["policy_version"], row["anchor_version"]) for row in events(folder, "promoted")]
        for folder in (tmp_path / "none", tmp_path / "ocrm")
    ]
    assert schedule[0] == schedule[1] == [(4, 6, 4), (8, 10, 8)]
    assert not frozen.reward.refits
    assert frozen.policy.reward_version == 0


def test_the_queue_is_scored_by_the_candidate_before_it_goes_live(tmp_path: Path) -> None:
    fakes = FakePools(reward=FakeReward(refit_s=lambda n: 2.0), generation=FakeGeneration(seconds=lambda n: 0.2))
    run(tiny_run(**{"rollout.max_staleness": 2}), fakes, tmp_path)
    assert events(tmp_path, "promoted")
    assert sum(row["num_rescored_late"] or 0 for row in metrics(tmp_path)) == 0


@pytest.mark.parametrize(
    ("fakes", "message"),
    [
        (lambda: FakePools(policy=FakePolicy(fail_at=3)), "optimiser exploded"),
        (lambda: FakePools(generation=FakeGeneration(fail_at=9)), "engine fell over"),
    ],
)
def test_a_failing_task_ends_the_run_with_its_own_error(tmp_path: Path, fakes: object, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(tiny_run(), fakes(), tmp_path)  # type: ignore[operator]


def test_a_refit_keeps_the_reward_pool_busy_but_is_no_rollout_scoring(tmp_path: Path) -> None:
    fakes = FakePools(reward=FakeReward(refit_s=lambda n: float("inf")))
    run(tiny_run(), fakes, tmp_path)
    rows = metrics(tmp_path)[-3:-1]  # rollouts of two steps come together
    assert [row["idle_share"]["reward"] for row in rows] == pytest.approx([0.0, 0.0])  # type: ignore[index]
    assert sum(row["stage_s"]["score"] for row in rows) == pytest.approx(0.2)  # type: ignore[index, misc]


def test_an_evaluation_samples_one_exact_version(tmp_path: Path) -> None:
    fakes = FakePools(generation=FakeGeneration(seconds=lambda n: 3.0 if n % 5 else 9.0))
    run(tiny_run(), fakes, tmp_path)
    assert fakes.evaluator.versions == {0: {0}, 6: {6}, 12: {12}}


def test_an_evaluation_is_measured_against_the_anchor_as_well_as_the_sft_model(tmp_path: Path) -> None:
    fakes = FakePools(scoring=FakeScoring(logprob={"live": -0.25, "sft": -0.5}))
    run(tiny_run(), fakes, tmp_path)
    assert fakes.evaluator.references == {step: {"sft": {-0.5}, "anchor": {-0.25}} for step in (0, 6, 12)}


def test_the_policy_of_the_best_gold_is_kept_beside_the_last_one(tmp_path: Path) -> None:
    fakes = FakePools()
    fakes.evaluator.gold = {0: 9.0, 4: 1.0, 8: 3.0, 12: 2.0}
    run(tiny_run(**{"evaluation.every": 4}), fakes, tmp_path)
    best = [version for name, version in fakes.policy.saved if name == "policy-best"]
    assert best == [4, 8]
    assert ("policy", 12) in fakes.policy.saved


def test_generation_and_training_overlap(tmp_path: Path) -> None:
    fakes = FakePools(generation=FakeGeneration(seconds=lambda n: 2.0), policy=FakePolicy(update_s=lambda n: 2.0))
    sequential, overlapped = FakePools(), FakePools()
    for pools in (sequential, overlapped):
        pools.generation.seconds = fakes.generation.seconds
        pools.policy.update_s = fakes.policy.update_s
    without_s = run(tiny_run(**{"rollout.max_staleness": 0}), sequential, tmp_path / "0")
    with_s = run(tiny_run(**{"rollout.max_staleness": 1}), overlapped, tmp_path / "1")
    assert with_s < 0.7 * without_s


def test_a_publish_goes_on_beside_the_next_update(tmp_path: Path) -> None:
    fakes = FakePools(generation=FakeGeneration(publish_s=0.9))
    run(tiny_run(**{"rollout.max_staleness": 3, "evaluation.every": 100}), fakes, tmp_path)
    rows = metrics(tmp_path)[5:]
    assert [row["step_s"] for row in rows] == pytest.approx([1.0] * len(rows))
    assert [row["publish_wait_s"] for row in rows] == pytest.approx([0.0] * len(rows))
    assert [row["stage_s"]["publish"] for row in rows] == pytest.approx([0.9] * len(rows))  # type: ignore[index]


def test_a_publish_slower_than_an_update_is_waited_for_by_the_next_and_reported(tmp_path: Path) -> None:
    fakes = FakePools(generation=FakeGeneration(publish_s=3.0))
    run(tiny_run(**{"rollout.max_staleness": 3, "evaluation.every": 100}), fakes, tmp_path)
    rows = metrics(tmp_path)[5:]
    assert [row["step_s"] for row in rows] == pytest.approx([3.0] * len(rows))
    assert [row["publish_wait_s"] for row in rows] == pytest.approx([2.0] * len(rows))


def test_two_copies_of_the_weights_are_enough_where_nothing_holds_one(tmp_path: Path) -> None:
    fakes = FakePools(generation=FakeGeneration(publish_s=3.0))
    run(tiny_run(**{"correction.every": 100, "evaluation.every": 100}), fakes, tmp_path)
    assert fakes.policy.most_exported == 2


def test_a_moved_anchor_s_weights_are_kept_for_scorers_that_die_until_the_next_one_is_live(tmp_path: Path) -> None:
    fakes = FakePools()
    keys = {"correction.kl_reference": "moving", "correction.promote_after": 2, "evaluation.every": 100}
    run(tiny_run(**keys), fakes, tmp_path)
    assert [row["anchor_version"] for row in events(tmp_path, "promoted")] == [4, 8]
    assert fakes.policy.exported == [8, 12]


def test_a_run_without_progress_ends_and_says_what_each_pool_is_asked_for(tmp_path: Path) -> None:
    fakes = FakePools(policy=FakePolicy(update_s=lambda version: 1.0 if version < 3 else 1e6))
    with pytest.raises(StalledError) as caught:
        run(tiny_run(**{"deadlines.progress_s": 50.0, "correction.strategy": "none"}), fakes, tmp_path)
    assert [row["step"] for row in metrics(tmp_path)] == [0, 1, 2, 3]
    assert str(caught.value).endswith(
        "generation: nothing; policy: 1 update (for 50 s); scoring: nothing; reward: nothing; evaluation: nothing"
    )


def test_only_the_reward_is_scored_again_where_only_the_reward_model_changes(tmp_path: Path) -> None:
    fakes = FakePools()
    run(tiny_run(**{"evaluation.every": 100}), fakes, tmp_path)
    assert {model for model, _ in fakes.scoring.scored} == {"live", "sft"}
    once = 12 * 4 * 2 + 2 * (3 + 1)  # 12 steps, 4 prompts, 2 samples; two evaluations of 3 prompts, one sampled twice
    assert sum(number for model, number in fakes.scoring.scored if model == "sft") == once


def test_a_candidate_that_is_ready_early_scores_rollouts_only_before_its_promotion(tmp_path: Path) -> None:
    fakes = FakePools(reward=FakeReward(refit_s=lambda n: 0.1))
    run(tiny_run(**{"correction.promote_after": 3, "policy.num_updates": 8}), fakes, tmp_path)
    assert [row["policy_version"] for row in events(tmp_path, "promoted")] == [7]
    (commit_s, _, _) = fakes.policy.commits[0]
    staged = [time for time, slot in fakes.reward.scored if slot == "snapshot-4-1" and time < commit_s]
    assert staged
    assert min(staged) >= fakes.policy.updates[5][0]


def test_a_straggler_at_the_bound_is_waited_for_and_the_seconds_reported(tmp_path: Path) -> None:
    fakes = FakePools(generation=FakeGeneration(seconds=lambda n: 60.0 if n == 5 else 1.0))
    run(tiny_run(), fakes, tmp_path)
    assert not fakes.generation.aborted
    assert sum(row["straggler_wait_s"] or 0 for row in metrics(tmp_path)) > 50


def test_a_straggler_at_the_bound_is_reissued_and_counted(tmp_path: Path) -> None:
    fakes = FakePools(generation=FakeGeneration(seconds=lambda n: 1e6 if n == 5 else 1.0))
    total_s = run(tiny_run(**{"rollout.straggler": "reissue"}), fakes, tmp_path)
    assert total_s < 1000
    assert len(fakes.generation.aborted) == 1
    assert sum(row["num_reissued"] or 0 for row in metrics(tmp_path)) == 1


def test_newer_rollouts_never_push_stragglers_out_of_the_last_batches_that_they_fit_in(tmp_path: Path) -> None:
    fakes = FakePools(generation=FakeGeneration(seconds=lambda n: 50.0 if n in (1, 2) else 1.0))
    run(tiny_run(**{"rollout.prompts_per_step": 1, "rollout.max_staleness": 2}), fakes, tmp_path)
    trained = [batch[0] for _, batch in fakes.policy.updates]
    assert sorted(rollout.prompt.prompt_id for rollout in trained[:3]) == [0, 1, 2]
    assert [rollout.first_version for rollout in trained[:3]] == [0, 0, 0]


def test_every_prompt_is_trained_on_once_and_none_thrown_away(tmp_path: Path) -> None:
    fakes = FakePools(generation=FakeGeneration(seconds=lambda n: 1.0 + (n * 7919 % 13)))
    run(tiny_run(**{"rollout.max_staleness": 3, "evaluation.every": 100}), fakes, tmp_path)
    trained = [rollout.prompt.prompt_id for _, batch in fakes.policy.updates for rollout in batch]
    assert sorted(trained) == sorted(index % 50 for index in range(48))


def trained_before(fakes: FakePools, version: int, num_rollouts: int) -> list[Rollout]:
    batches = [batch for _, batch in fakes.policy.updates[:version]]
    return [rollout for batch in batches for rollout in batch][-num_rollouts:]


def varied_fakes() -> FakePools:
    """Of a prompt's two responses the second has more gold; no two prompts say the same."""
    respond = lambda number, sample: (number % 5 + 1, 6 * sample + 1, number + 10)  # noqa: E731
    return FakePools(generation=FakeGeneration(respond=respond), reward=FakeReward(refit_s=lambda n: 0.1))


@pytest.mark.parametrize("strategy", ["metarm", "rlp_uml"])
def test_a_refit_gets_all_responses_of_the_prompts_trained_on_last_before_its_snapshot(
    tmp_path: Path, strategy: str
) -> None:
    fakes = varied_fakes()
    run(tiny_run(**{"correction.strategy": strategy, "correction.rollout_prompts": 6}), fakes, tmp_path)
    assert len(fakes.reward.refits) == 2
    for version, request in zip((4, 8), fakes.reward.refits, strict=True):
        assert request.groups == tuple(rollout.sequences for rollout in trained_before(fakes, version, 6))
        assert (request.extra_pairs, request.weights) == ((), None)


def test_relabelled_pairs_of_every_refit_so_far_go_into_the_next(tmp_path: Path) -> None:
    fakes = varied_fakes()
    keys = {"correction.strategy": "relabel", "correction.rollout_prompts": 5, "pairs.labels": "argmax"}
    run(tiny_run(**keys), fakes, tmp_path)
    expected = [
        [(rollout.sequences[1], rollout.sequences[0]) for rollout in trained_before(fakes, version, 5)]
        for version in (4, 8)
    ]
    assert list(fakes.reward.refits[0].extra_pairs) == expected[0]
    assert list(fakes.reward.refits[1].extra_pairs) == expected[0] + expected[1]
    assert [row["num_pairs"] for row in events(tmp_path, "pairs_added")] == [5, 10]


def test_without_weights_the_pairs_are_not_scored_and_with_them_once_a_refit(tmp_path: Path) -> None:
    for strategy in STRATEGIES:
        fakes = varied_fakes()
        run(tiny_run(**{"correction.strategy": strategy}), fakes, tmp_path / strategy)
        is_weighted = Correction(strategy=strategy).scores_pairs  # type: ignore[arg-type]
        assert fakes.scoring.snapshots == ([4, 8] if is_weighted else [])
        assert [request.weights is not None for request in fakes.reward.refits] == [is_weighted] * len(
            fakes.reward.refits
        )


STRATEGIES = list(Correction.model_fields["strategy"].annotation.__args__)  # type: ignore[union-attr]
legal_runs = st.fixed_dictionaries(
    {
        "policy.num_updates": st.integers(1, 9),
        "rollout.prompts_per_step": st.integers(1, 5),
        "rollout.max_staleness": st.integers(0, 4),
        "rollout.straggler": st.sampled_from(["wait", "reissue"]),
        "correction.every": st.integers(1, 5),
        "correction.strategy": st.sampled_from(STRATEGIES),
        "correction.kl_reference": st.sampled_from(["moving", "sft"]),
        "evaluation.every": st.integers(1, 4),
        "evaluation.num_prompts": st.just(3),
    }
)
schedules = st.one_of(
    st.just({"correction.schedule": "blocking"}),
    st.fixed_dictionaries({"correction.promote_after": st.integers(1, 7)}),
    st.fixed_dictionaries({"correction.max_lag": st.integers(1, 7)}),
    st.just({}),
)


@given(
    keys=legal_runs,
    schedule=schedules,
    seconds=st.lists(st.floats(0, 20), min_size=1, max_size=6),
    speeds=st.tuples(*[st.floats(0, 10)] * 4),
    num_slots=st.integers(1, 8),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_legal_setting_deadlocks_or_passes_the_staleness_bound(
    tmp_path_factory: pytest.TempPathFactory,
    keys: dict[str, object],
    schedule: dict[str, object],
    seconds: list[float],
    speeds: tuple[float, float, float, float],
    num_slots: int,
) -> None:
    update_s, refit_s, publish_s, score_s = speeds
    fakes = FakePools(
        generation=FakeGeneration(lambda n: seconds[n % len(seconds)], num_slots, publish_s),
        policy=FakePolicy(update_s=lambda n: update_s),
        scoring=FakeScoring(score_s=score_s),
        reward=FakeReward(score_s=score_s, refit_s=lambda n: refit_s),
    )
    config = tiny_run(**keys, **schedule)
    run_dir = tmp_path_factory.mktemp("run")
    run(config, fakes, run_dir)
    assert len(fakes.policy.updates) == config.policy.num_updates
    for version, (_, batch) in enumerate(fakes.policy.updates):
        assert len(batch) == config.rollout.prompts_per_step
        assert min(rollout.first_version for rollout in batch) >= version - config.rollout.max_staleness
    lags = [row["lag_steps"] for row in events(run_dir, "promoted")]
    if "correction.promote_after" in schedule:
        assert set(lags) <= {schedule["correction.promote_after"]}
    if "correction.max_lag" in schedule:
        assert all(lag <= schedule["correction.max_lag"] for lag in lags)
