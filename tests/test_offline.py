"""The offline baselines over fakes on a virtual clock: the same budget, evaluations and files, and no rollouts."""

from pathlib import Path

import numpy as np
import pytest
from fakes import FakePolicy, FakePools, tiny_run
from virtual_runs import NUM_PAIRS, events, metrics, run

OFFLINE = {"policy.algorithm": "dpo", "correction.strategy": "none", "policy.direct": {"pairs_per_step": 4}}


def test_every_training_pair_is_learned_once_an_epoch_in_a_new_order(tmp_path: Path) -> None:
    fakes = FakePools()
    run(tiny_run(**OFFLINE), fakes, tmp_path)
    batches = [indices.tolist() for indices, _ in fakes.policy.learned]
    assert [len(batch) for batch in batches] == [4, 4, 2] * 4
    epochs = [[*batches[start], *batches[start + 1], *batches[start + 2]] for start in range(0, 12, 3)]
    assert all(sorted(epoch) == list(range(NUM_PAIRS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_budget_may_end_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    fakes = FakePools()
    run(tiny_run(**OFFLINE, **{"policy.num_updates": 5}), fakes, tmp_path)
    assert [len(indices) for indices, _ in fakes.policy.learned] == [4, 4, 2, 4, 4]


def test_each_pair_comes_with_its_own_log_probs_under_who_wrote_it(tmp_path: Path) -> None:
    fakes = FakePools()
    run(tiny_run(**OFFLINE), fakes, tmp_path)
    for indices, anchor in fakes.policy.learned:
        np.testing.assert_array_equal(anchor, np.stack([2 * indices, 2 * indices + 1], axis=1))


@pytest.mark.parametrize("every", [6, 5])
def test_the_policy_is_measured_at_the_same_steps_as_online_each_at_its_exact_version(
    tmp_path: Path, every: int
) -> None:
    offline, online = FakePools(), FakePools()
    run(tiny_run(**OFFLINE, **{"evaluation.every": every}), offline, tmp_path / "offline")
    run(tiny_run(**{"evaluation.every": every}), online, tmp_path / "online")
    steps = sorted({*range(0, 12, every), 12})
    assert offline.evaluator.versions == online.evaluator.versions == {step: {step} for step in steps}


def test_weights_are_published_for_evaluations_alone_and_given_back(tmp_path: Path) -> None:
    fakes = FakePools()
    run(tiny_run(**OFFLINE), fakes, tmp_path)
    assert [row["policy_version"] for row in events(tmp_path, "weights_published")] == [6, 12]
    assert fakes.policy.exported == [12]


def test_nothing_is_rolled_out_corrected_or_promoted(tmp_path: Path) -> None:
    fakes = FakePools()
    run(tiny_run(**OFFLINE, **{"correction.kl_reference": "moving"}), fakes, tmp_path)
    assert fakes.generation.prompts == []
    assert fakes.policy.updates == []
    assert fakes.policy.commits == []
    assert fakes.reward.refits == []
    assert {row["event"] for row in events(tmp_path)} == {"weights_published", "probe_measured"}


def test_metrics_have_a_line_for_every_update_with_its_loss_and_its_evaluation(tmp_path: Path) -> None:
    fakes = FakePools()
    fakes.evaluator.gold = {0: 1.0, 6: 2.0, 12: 3.0}
    run(tiny_run(**OFFLINE), fakes, tmp_path)
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [row["policy_version"] for row in rows] == list(range(13))
    assert {row["step"]: row["gold_mean"] for row in rows if row["gold_mean"] is not None} == fakes.evaluator.gold
    for row in rows[1:]:
        assert (row["loss"], row["grad_norm"]) == (0.5, 2.0)
        assert (row["reward_version"], row["anchor_version"], row["kl_anchor"]) == (0, 0, None)
        assert row["stage_s"]["train"] == pytest.approx(1.0)  # type: ignore[index]


def test_the_last_policy_the_best_one_and_checkpoints_are_saved(tmp_path: Path) -> None:
    fakes = FakePools()
    fakes.evaluator.gold = {0: 9.0, 6: 4.0, 12: 2.0}
    run(tiny_run(**OFFLINE, **{"checkpoint.every": 5}), fakes, tmp_path)
    assert sorted(fakes.policy.saved) == [("policy", 12), ("policy-best", 6)]
    found = {path.name: (path / "version").read_text() for path in (tmp_path / "checkpoints").iterdir()}
    assert found == {"step-5": "5", "step-10": "10"}


def test_a_failing_update_ends_the_run_with_its_own_error(tmp_path: Path) -> None:
    def explode(number: int) -> float:
        if number == 3:
            raise RuntimeError("optimiser exploded")
        return 1.0

    with pytest.raises(RuntimeError, match="optimiser exploded"):
        run(tiny_run(**OFFLINE), FakePools(policy=FakePolicy(update_s=explode)), tmp_path)
