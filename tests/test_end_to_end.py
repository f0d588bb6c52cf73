"""The product as a user runs it: one small study with real vLLM, DeepSpeed and Ray, then its files."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from kill_and_resume import differences, finish, kill_at

from ocrm_ray.praise import VOCABULARY

ROOT = Path(__file__).parent.parent
STUDY = {
    "name": "tiny",
    "base": {
        "world": {"kind": "praise", "num_prompts": 400},
        "data": {"num_heldout": 48},
        "sft": {"num_epochs": 1},
        "pairs": {"num_pairs": 500},
        "reward": {"num_calibration": 128},
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 4, "max_new_tokens": 13},
        "policy": {"num_updates": 8},
        "correction": {"every": 3, "num_pairs": 300},
        "evaluation": {"every": 4, "num_prompts": 48, "num_pair_prompts": 16, "num_samples_saved": 4},
        "checkpoint": {"every": 4},
    },
    "arms": {
        "overlapped": {"correction.promote_after": 2},
        "paper": {
            "policy.algorithm": "ppo",
            "policy.lr_schedule": "linear",
            "correction.schedule": "blocking",
            "correction.kl_reference": "moving",
            "correction.critic_on_promote": "reinit",
            "correction.reset_optimizer": True,
        },
    },
    "seeds": [3],
}

pytestmark = pytest.mark.real


def jsonl(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(study_dir: Path, arm: str) -> list[dict[str, object]]:
    return jsonl(study_dir / arm / "seed-3" / "events.jsonl")


def shared_folders() -> set[Path]:
    """Of runs; other tests, which may go on beside this one, name theirs ``test``."""
    return {path for path in Path("/dev/shm").glob("ocrm-*") if not path.name.startswith("ocrm-test-")}


def ocrm_ray(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own; it must succeed and leave no shared or temporary file."""
    shared_before = shared_folders()
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:  # sockets have short paths
        done = subprocess.run(
            [sys.executable, "-m", "ocrm_ray", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": temporary},
            capture_output=True,
            text=True,
            timeout=900,
        )
        names = [path.name for path in Path(temporary).iterdir()]
        left = [name for name in names if not name.startswith("torchinductor_")]  # a cache that torch keeps
    assert done.returncode == 0, done.stdout + done.stderr
    assert shared_folders() <= shared_before
    assert left == []
    return done


@pytest.fixture(scope="module")
def study_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(STUDY | {"output_dir": str(folder / "runs")}))
    ocrm_ray("study", str(folder / "tiny.yaml"))
    return folder / "runs" / "tiny"


def test_both_schedules_promote_corrections_with_their_lag(study_dir: Path) -> None:
    lags = {
        arm: [
            row["lag_steps"] for row in jsonl(study_dir / arm / "seed-3" / "events.jsonl") if row["event"] == "promoted"
        ]
        for arm in STUDY["arms"]
    }
    assert lags == {"overlapped": [2, 2], "paper": [0, 0]}


def test_rollouts_finish_inside_every_overlapped_correction_window(study_dir: Path) -> None:
    rows = events(study_dir, "overlapped")
    promoted = [row for row in rows if row["event"] == "promoted"]
    assert promoted
    assert all(row["num_rollouts_finished"] > 0 for row in promoted)


def test_the_moving_anchor_is_the_snapshot_and_the_frozen_one_stays(study_dir: Path) -> None:
    anchors = {
        arm: [row["anchor_version"] for row in jsonl(study_dir / arm / "seed-3" / "metrics.jsonl")]
        for arm in STUDY["arms"]
    }
    assert set(anchors["overlapped"]) == {0}
    assert anchors["paper"] == [0, 0, 0, 3, 3, 3, 6, 6, 6]


def test_engine_and_trainer_agree_after_every_publish(study_dir: Path) -> None:
    for arm in STUDY["arms"]:
        rows = events(study_dir, arm)
        probes = [row for row in rows if row["event"] == "probe_measured"]
        assert probes
        assert all(probe["gap"] < 1e-4 for probe in probes)


def test_every_step_has_its_line_and_evaluations_have_gold(study_dir: Path) -> None:
    rows = jsonl(study_dir / "overlapped" / "seed-3" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(9))
    assert [row["step"] for row in rows if row["gold_mean"] is not None] == [0, 4, 8]


def test_arms_share_their_stages_and_differ_in_nothing_before_rl(study_dir: Path) -> None:
    assert (study_dir / "shared" / "seed-3" / "reward" / "stage.json").exists()
    first = [jsonl(study_dir / arm / "seed-3" / "metrics.jsonl")[0] for arm in STUDY["arms"]]
    assert first[0]["gold_mean"] == first[1]["gold_mean"]
    assert first[0]["proxy_mean"] == pytest.approx(first[1]["proxy_mean"], abs=1e-6)


def test_the_last_policy_and_the_checkpoint_are_model_folders_that_answer(study_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in ("policy", "policy-best", "checkpoints/step-4"):
        path = study_dir / "paper" / "seed-3" / folder
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        prompt = tokenizer(
            jsonl(study_dir / "shared" / "seed-3" / "data" / "heldout.jsonl")[0]["text"], return_tensors="pt"
        )
        torch.manual_seed(0)
        answers = model.generate(**prompt, max_new_tokens=13, do_sample=True, num_return_sequences=8)
        texts = tokenizer.batch_decode(answers[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert set(" ".join(texts).split()) & set(VOCABULARY)


def test_the_study_ends_with_a_table_and_reports(study_dir: Path) -> None:
    assert set(json.loads((study_dir / "study.json").read_text())["arms"]) == set(STUDY["arms"])
    assert (study_dir / "study.html").stat().st_size > 1000
    assert (study_dir / "overlapped" / "seed-3" / "report.html").exists()


def test_ready_pairs_run_without_gold_on_two_engines(study_dir: Path, tmp_path: Path) -> None:
    shared = study_dir / "shared" / "seed-3"
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for pair in jsonl(shared / "pairs" / "train.jsonl"):
            texts = {side: pair[side]["text"] for side in ("chosen", "rejected")}  # type: ignore[index]
            file.write(json.dumps({"prompt": pair["prompt"], **texts}) + "\n")
    config = {
        "name": "ready",
        "output_dir": str(tmp_path),
        "data": {"prompts": {"path": str(shared / "world" / "prompts.jsonl")}, "num_heldout": 32},
        "sft": {"ready": str(shared / "sft")},
        "pairs": {"ready": {"path": str(tmp_path / "pairs.jsonl")}},
        "reward": {"num_calibration": 64},
        "rollout": {"prompts_per_step": 8, "max_new_tokens": 13, "max_staleness": 2, "straggler": "reissue"},
        "policy": {"algorithm": "grpo", "num_updates": 6, "kl_placement": "loss", "kl_estimator": "k3"},
        "correction": {"every": 2, "max_lag": 1, "rm_init": "sft", "kl_reference": "moving", "num_pairs": 200},
        "evaluation": {"every": 3, "num_prompts": 32, "num_pair_prompts": 8, "num_samples_saved": 2},
        "pools": {"generation": {"num_actors": 2, "kv_cache_gib": 0.25}},
    }
    config["data"]["max_prompt_tokens"] = 16  # type: ignore[index]
    (tmp_path / "ready.yaml").write_text(yaml.safe_dump(config))
    ocrm_ray("run", str(tmp_path / "ready.yaml"))
    run_dir = tmp_path / "ready"
    promoted = [row for row in jsonl(run_dir / "events.jsonl") if row["event"] == "promoted"]
    assert len(promoted) >= 2
    assert all(row["lag_steps"] == 1 for row in promoted)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["gold_mean"] is None
    assert summary["proxy_mean"] is not None
    assert "gold" in (run_dir / "report.html").read_text()


def test_a_run_that_is_killed_during_a_refit_and_resumed_equals_the_uninterrupted_one_bit_for_bit(
    study_dir: Path, tmp_path: Path
) -> None:
    base = {**STUDY["base"], "seed": 3, "deterministic": True, "lease": {"heartbeat_s": 0.5, "num_missed": 4}}  # type: ignore[dict-item]
    base |= {"output_dir": str(tmp_path), "stages_dir": str(study_dir / "shared" / "seed-3")}
    base["rollout"] = {**base["rollout"], "max_staleness": 0}
    base["correction"] = {**base["correction"], "promote_after": 2, "kl_reference": "moving"}
    base["pools"] = {"generation": {"max_running": 1, "kv_cache_gib": 0.25}}
    whole, killed = ({**base, "name": name} for name in ("whole", "killed"))
    finish(whole, resume=False)
    checkpoint = tmp_path / "killed" / "checkpoints" / "step-4"  # with the correction of step 3 in flight
    assert kill_at(killed, False, 5, lambda watch: watch.is_at("ratios_scored") and checkpoint.exists())
    finish(killed, resume=True)
    assert list(differences(tmp_path / "whole", tmp_path / "killed")) == []
    steps = [row["step"] for row in jsonl(tmp_path / "killed" / "metrics.jsonl")]
    assert (steps[:6], steps[-4:]) == ([0, 1, 2, 3, 4, 5], [5, 6, 7, 8])
    assert len(steps) > 9


METHODS = {
    "metarm": {"correction.strategy": "metarm"},
    "rlp-spg": {"correction.strategy": "rlp_spg", "correction.rlp_spg.clusterer": "encoder"},
    "rlp-uml": {"correction.strategy": "rlp_uml"},
    "relabel": {"correction.strategy": "relabel"},
    "wpo": {"correction.strategy": "none", "policy.algorithm": "wpo"},
}


@pytest.fixture(scope="module")
def methods_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick study, with an arm of every method that learns from rollouts, and an offline one."""
    folder = tmp_path_factory.mktemp("methods")
    study = yaml.safe_load((ROOT / "configs/study/quick.yaml").read_text())
    study["arms"] |= METHODS
    (folder / "quick.yaml").write_text(yaml.safe_dump(study | {"output_dir": str(folder)}))
    ocrm_ray("study", str(folder / "quick.yaml"))
    return folder / "quick"


def told(methods_dir: Path, arm: str, event: str) -> list[dict[str, object]]:
    return [row for row in jsonl(methods_dir / arm / "seed-1" / "events.jsonl") if row["event"] == event]


def test_every_arm_of_a_study_ends_with_its_figures(methods_dir: Path) -> None:
    arms = json.loads((methods_dir / "study.json").read_text())["arms"]
    assert arms.keys() >= {"frozen", "ocrm", "shuffled", *METHODS}
    finals = {arm: arms[arm]["seeds"]["1"] for arm in ("frozen", "ocrm", "shuffled", *METHODS)}
    assert {arm: figures["steps"] for arm, figures in finals.items()} == dict.fromkeys(finals, 6)
    assert all(isinstance(figures["gold_mean"], float) for figures in finals.values())


def test_corrections_that_learn_from_rollouts_get_them(methods_dir: Path) -> None:
    for arm in ("relabel", "rlp-spg"):
        assert all(row["num_prompts"] == 16 for row in told(methods_dir, arm, "pairs_added")[:1]), arm
    relabelled = [row["num_pairs"] for row in told(methods_dir, "relabel", "pairs_added")]
    assert 0 < relabelled[0] < relabelled[1]  # type: ignore[operator]
    assert all(0.25 <= row["reward_spread"] < 0.75 for row in told(methods_dir, "metarm", "refit_finished"))  # type: ignore[operator]
    assert all("view_loss" in row for row in told(methods_dir, "rlp-uml", "refit_finished"))


def test_an_offline_arm_generates_nothing_but_what_is_measured(methods_dir: Path) -> None:
    rows = jsonl(methods_dir / "wpo/seed-1/metrics.jsonl")
    assert [row["step"] for row in rows if row["gold_mean"] is not None] == [0, 2, 4, 6]
    assert all(row["rollout_tokens"] is None for row in rows)
    assert not told(methods_dir, "wpo", "correction_started")


SAME = {
    "refit": {"correction.strategy": "refit"},
    "ocrm": {"correction.strategy": "ocrm", "correction.weights.m": 0.0},
    "metarm": {"correction.strategy": "metarm", "correction.metarm.eta": 0.0},
}


def test_weights_of_exponent_0_and_moves_of_length_0_give_the_trajectory_of_the_plain_refit(tmp_path: Path) -> None:
    study = yaml.safe_load((ROOT / "configs/study/quick.yaml").read_text())
    base = study["base"] | {"correction": {"every": 2, "schedule": "blocking"}}
    base["rollout"] |= {"max_staleness": 0}
    plan = {"name": "same", "output_dir": str(tmp_path), "base": base, "arms": SAME}
    (tmp_path / "same.yaml").write_text(yaml.safe_dump(plan))
    ocrm_ray("study", str(tmp_path / "same.yaml"))
    rows = {arm: jsonl(tmp_path / "same" / arm / "seed-1" / "metrics.jsonl") for arm in SAME}
    for figure in ("reward_version", "reward_mean", "kl_sft", "loss", "grad_norm", "rollout_tokens", "proxy_mean"):
        known = {arm: [row[figure] for row in rows[arm] if row[figure] is not None] for arm in SAME}
        assert len(set(known["refit"])) > 1, figure
        for arm in ("ocrm", "metarm"):
            # to float tolerance: an engine batches its requests as they come, and sums depend on the batch
            assert known[arm] == pytest.approx(known["refit"], rel=1e-3, abs=1e-5), figure
