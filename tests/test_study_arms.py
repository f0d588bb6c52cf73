"""A study with an arm of every method, real processes: what each was given, and which runs must be the same."""

import json
import math
from pathlib import Path

import pytest
import yaml
from kill_and_resume import differences, finish, kill_at
from small_study import METHODS, SAME, metrics, told
from synthetic_runs import read_lines

pytestmark = pytest.mark.real


def test_every_arm_of_a_study_ends_with_its_figures(study_dir: Path) -> None:
    arms = json.loads((study_dir / "study.json").read_text())["arms"]
    assert arms.keys() >= {"frozen", "ocrm", "shuffled", *METHODS}
    finals = {arm: arms[arm]["seeds"]["1"] for arm in ("frozen", "ocrm", "shuffled", *METHODS)}
    assert {arm: figures["steps"] for arm, figures in finals.items()} == dict.fromkeys(finals, 6)
    assert all(isinstance(figures["gold_mean"], float) for figures in finals.values())


def test_corrections_that_learn_from_rollouts_get_them(study_dir: Path) -> None:
    for arm in ("relabel", "rlp-spg"):
        assert [row["num_prompts"] for row in told(study_dir, arm, "pairs_added")[:1]] == [16], arm
    relabelled = [row["num_pairs"] for row in told(study_dir, "relabel", "pairs_added")]
    assert 0 < relabelled[0] < relabelled[1]
    spreads = [row["reward_spread"] for row in told(study_dir, "metarm", "refit_finished")]
    assert spreads
    assert all(0.25 <= spread < 0.75 for spread in spreads)
    losses = [row["view_loss"] for row in told(study_dir, "rlp-uml", "refit_finished")]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)


def test_no_correction_of_any_arm_fails(study_dir: Path) -> None:
    refitting = ("ocrm", "shuffled", *METHODS.keys() - {"wpo"}, *SAME)
    for arm in refitting:
        assert told(study_dir, arm, "promoted"), arm
        assert not told(study_dir, arm, "correction_failed"), arm


def test_an_offline_arm_generates_nothing_but_what_is_measured(study_dir: Path) -> None:
    rows = metrics(study_dir, "wpo")
    assert [row["step"] for row in rows if row["gold_mean"] is not None] == [0, 2, 4, 6]
    assert all(row["rollout_tokens"] is None for row in rows)
    assert not told(study_dir, "wpo", "correction_started")


def test_weights_of_exponent_0_and_moves_of_length_0_give_the_trajectory_of_the_plain_refit(study_dir: Path) -> None:
    rows = {arm: metrics(study_dir, arm) for arm in SAME}
    for figure in ("reward_version", "reward_mean", "kl_sft", "loss", "grad_norm", "rollout_tokens", "proxy_mean"):
        known = {arm: [row[figure] for row in rows[arm] if row[figure] is not None] for arm in SAME}
        assert len(set(known["refit"])) > 1, figure
        for arm in ("exponent-0", "move-0"):
            assert known[arm] == known["refit"], figure


def test_a_run_that_is_killed_during_a_refit_and_resumed_equals_the_uninterrupted_one_bit_for_bit(
    study_dir: Path, tmp_path: Path
) -> None:
    uninterrupted = study_dir / "uninterrupted" / "seed-1"
    config = yaml.safe_load((uninterrupted / "config.yaml").read_text())
    config |= {"name": "killed", "output_dir": str(tmp_path), "lease": {"heartbeat_s": 0.5, "num_missed": 4}}
    checkpoint = tmp_path / "killed" / "checkpoints" / "step-4"
    assert kill_at(config, False, 5, lambda watch: watch.is_at("ratios_scored") and checkpoint.exists())
    finish(config, resume=True)
    assert list(differences(uninterrupted, tmp_path / "killed")) == []
    steps = [row["step"] for row in read_lines(tmp_path / "killed" / "metrics.jsonl")]
    assert (steps[:6], steps[-4:]) == ([0, 1, 2, 3, 4, 5], [5, 6, 7, 8])
    assert len(steps) > 9
