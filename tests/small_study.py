"""One study of real processes with an arm of every kind, run once for all tests that look at what it left."""

from pathlib import Path
from typing import Any

import yaml
from program import ROOT, ocrm_ray
from synthetic_runs import read_lines

METHODS: dict[str, dict[str, Any]] = {
    "metarm": {"correction.strategy": "metarm"},
    "rlp-spg": {"correction.strategy": "rlp_spg", "correction.rlp_spg.clusterer": "encoder"},
    "rlp-uml": {"correction.strategy": "rlp_uml"},
    "relabel": {"correction.strategy": "relabel"},
    "wpo": {"correction.strategy": "none", "policy.algorithm": "wpo"},
}
LONGER = {"policy.num_updates": 8, "correction.every": 3, "checkpoint.every": 4, "evaluation.every": 4}
SCHEDULES: dict[str, dict[str, Any]] = {
    "overlapped": {"correction.promote_after": 2, **LONGER},
    "paper": {
        "policy.algorithm": "ppo",
        "policy.lr_schedule": "linear",
        "correction.promote_after": None,
        "correction.schedule": "blocking",
        "correction.kl_reference": "moving",
        "correction.critic_on_promote": "reinit",
        "correction.reset_optimizer": True,
        **LONGER,
    },
}
STILL = {
    "deterministic": True,
    "rollout.max_staleness": 0,
    "rollout.prompts_per_step": 4,
    "evaluation.num_prompts": 24,
    "pools.generation.max_running": 1,
}
BLOCKING = {"correction.promote_after": None, "correction.schedule": "blocking", "policy.num_updates": 4}
SAME: dict[str, dict[str, Any]] = {
    "refit": {"correction.strategy": "refit", **STILL, **BLOCKING},
    "exponent-0": {"correction.strategy": "ocrm", "correction.weights.m": 0.0, **STILL, **BLOCKING},
    "move-0": {"correction.strategy": "metarm", "correction.metarm.eta": 0.0, **STILL, **BLOCKING},
}
UNINTERRUPTED: dict[str, dict[str, Any]] = {
    "uninterrupted": {"correction.promote_after": 2, "correction.kl_reference": "moving", **STILL, **LONGER}
}
"""Its checkpoint has the correction of step 3 in flight; behind it there is another one."""
ARMS = SCHEDULES | METHODS | SAME | UNINTERRUPTED


def run_small_study(folder: Path) -> Path:
    """The quick study with these arms; returns its folder. Arms whose processes are alike come one after another."""
    study = yaml.safe_load((ROOT / "configs/study/quick.yaml").read_text())
    study["arms"] |= ARMS
    (folder / "quick.yaml").write_text(yaml.safe_dump(study | {"output_dir": str(folder)}, sort_keys=False))
    ocrm_ray("study", folder / "quick.yaml")
    return folder / "quick"


def told(study_dir: Path, arm: str, event: str) -> list[dict[str, Any]]:
    """The arm's events of that name."""
    return [row for row in read_lines(study_dir / arm / "seed-1" / "events.jsonl") if row["event"] == event]


def metrics(study_dir: Path, arm: str) -> list[dict[str, Any]]:
    """The arm's lines, a step each."""
    return read_lines(study_dir / arm / "seed-1" / "metrics.jsonl")
