"""A study with an arm of every method, real processes: what each was given, and which arms must be the same."""

import json
import math
from pathlib import Path

import pytest
import yaml
from program import ROOT, ocrm_ray
from synthetic_runs import read_lines

pytestmark = pytest.mark.real

METHODS = {
    "metarm": {"correction.strategy": "metarm"},
    "rlp-spg": {"correction.strategy": "rlp_spg", "correction.rlp_spg.clusterer": "encoder"},
    "rlp-uml": {"correction.strategy": "rlp_uml"},
    "relabel": {"correction.strategy": "relabel"},
    "wpo": {"correction.strategy": "none", "policy.algorithm": "wpo"},
}
STILL = {
    "deterministic": True,
    "correction.promote_after": None,
    "correction.schedule": "blocking",
    "rollout.max_staleness": 0,
    "rollout.prompts_per_step": 4,
    "policy.num_updates": 4,
    "evaluation.num_prompts": 24,
    "pools.generation.max_running": 1,
}
SAME = {
    "refit": {"correction.strategy": "refit", **STILL},
    "exponent-0": {"correction.strategy": "ocrm", "correction.weights.m": 0.0, **STILL},
    "move-0": {"correction.strategy": "metarm", "correction.metarm.eta": 0.0, **STILL},
}


@pytest.fixture(scope="module")
def methods_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick study, with every method that learns from rollouts, an offline one and three arms that are the same."""
    folder = tmp_path_factory.mktemp("methods")
    study = yaml.safe_load((ROOT / "configs/study/quick.yaml").read_text())
    study["arms"] |= METHODS | SAME
    text = yaml.safe_dump(study | {"output_dir": str(folder)}, sort_keys=False)  # alike processes stay from arm to arm
    (folder / "quick.yaml").write_text(text)
    ocrm_ray("study", folder / "quick.yaml")
    return folder / "quick"


def told(methods_dir: Path, arm: str, event: str) -> list[dict[str, object]]:
    return [row for row in read_lines(methods_dir / arm / "seed-1" / "events.jsonl") if row["event"] == event]


def test_every_arm_of_a_study_ends_with_its_figures(methods_dir: Path) -> None:
    arms = json.loads((methods_dir / "study.json").read_text())["arms"]
    assert arms.keys() >= {"frozen", "ocrm", "shuffled", *METHODS}
    finals = {arm: arms[arm]["seeds"]["1"] for arm in ("frozen", "ocrm", "shuffled", *METHODS)}
    assert {arm: figures["steps"] for arm, figures in finals.items()} == dict.fromkeys(finals, 6)
    assert all(isinstance(figures["gold_mean"], float) for figures in finals.values())


def test_corrections_that_learn_from_rollouts_get_them(methods_dir: Path) -> None:
    for arm in ("relabel", "rlp-spg"):
        assert [row["num_prompts"] for row in told(methods_dir, arm, "pairs_added")[:1]] == [16], arm
    relabelled = [row["num_pairs"] for row in told(methods_dir, "relabel", "pairs_added")]
    assert 0 < relabelled[0] < relabelled[1]  # type: ignore[operator]
    spreads = [row["reward_spread"] for row in told(methods_dir, "metarm", "refit_finished")]
    assert spreads
    assert all(0.25 <= spread < 0.75 for spread in spreads)  # type: ignore[operator]
    losses = [row["view_loss"] for row in told(methods_dir, "rlp-uml", "refit_finished")]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)  # type: ignore[arg-type]


def test_no_correction_of_any_arm_fails(methods_dir: Path) -> None:
    refitting = ("ocrm", "shuffled", *METHODS.keys() - {"wpo"}, *SAME)
    for arm in refitting:
        assert told(methods_dir, arm, "promoted"), arm
        assert not told(methods_dir, arm, "correction_failed"), arm


def test_an_offline_arm_generates_nothing_but_what_is_measured(methods_dir: Path) -> None:
    rows = read_lines(methods_dir / "wpo/seed-1/metrics.jsonl")
    assert [row["step"] for row in rows if row["gold_mean"] is not None] == [0, 2, 4, 6]
    assert all(row["rollout_tokens"] is None for row in rows)
    assert not told(methods_dir, "wpo", "correction_started")


def test_weights_of_exponent_0_and_moves_of_length_0_give_the_trajectory_of_the_plain_refit(methods_dir: Path) -> None:
    rows = {arm: read_lines(methods_dir / arm / "seed-1" / "metrics.jsonl") for arm in SAME}
    for figure in ("reward_version", "reward_mean", "kl_sft", "loss", "grad_norm", "rollout_tokens", "proxy_mean"):
        known = {arm: [row[figure] for row in rows[arm] if row[figure] is not None] for arm in SAME}
        assert len(set(known["refit"])) > 1, figure
        for arm in ("exponent-0", "move-0"):
            assert known[arm] == known["refit"], figure
