"""The product as a user runs it: one small study with real vLLM, DeepSpeed and Ray, then its files."""

import json
from pathlib import Path

import pytest
import yaml
from kill_and_resume import differences, finish, kill_at
from program import ocrm_ray
from synthetic_runs import read_lines

from ocrm_ray.praise import VOCABULARY

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


def events(study_dir: Path, arm: str) -> list[dict[str, object]]:
    return read_lines(study_dir / arm / "seed-3" / "events.jsonl")


@pytest.fixture(scope="module")
def study_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(STUDY | {"output_dir": str(folder / "runs")}))
    ocrm_ray("study", folder / "tiny.yaml")
    return folder / "runs" / "tiny"


def test_both_schedules_promote_corrections_with_their_lag(study_dir: Path) -> None:
    lags = {
        arm: [
            row["lag_steps"]
            for row in read_lines(study_dir / arm / "seed-3" / "events.jsonl")
            if row["event"] == "promoted"
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
        arm: [row["anchor_version"] for row in read_lines(study_dir / arm / "seed-3" / "metrics.jsonl")]
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
    rows = read_lines(study_dir / "overlapped" / "seed-3" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(9))
    assert [row["step"] for row in rows if row["gold_mean"] is not None] == [0, 4, 8]


def test_arms_share_their_stages_and_differ_in_nothing_before_rl(study_dir: Path) -> None:
    assert (study_dir / "shared" / "seed-3" / "reward" / "stage.json").exists()
    first = [read_lines(study_dir / arm / "seed-3" / "metrics.jsonl")[0] for arm in STUDY["arms"]]
    assert first[0]["gold_mean"] == first[1]["gold_mean"]
    assert first[0]["proxy_mean"] == pytest.approx(first[1]["proxy_mean"], abs=1e-6)


def test_the_last_policy_and_the_checkpoint_are_model_folders_that_answer(study_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in ("policy", "policy-best", "checkpoints/step-4"):
        path = study_dir / "paper" / "seed-3" / folder
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        prompt = tokenizer(
            read_lines(study_dir / "shared" / "seed-3" / "data" / "heldout.jsonl")[0]["text"], return_tensors="pt"
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
        for pair in read_lines(shared / "pairs" / "train.jsonl"):
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
    ocrm_ray("run", tmp_path / "ready.yaml")
    run_dir = tmp_path / "ready"
    promoted = [row for row in read_lines(run_dir / "events.jsonl") if row["event"] == "promoted"]
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
    steps = [row["step"] for row in read_lines(tmp_path / "killed" / "metrics.jsonl")]
    assert (steps[:6], steps[-4:]) == ([0, 1, 2, 3, 4, 5], [5, 6, 7, 8])
    assert len(steps) > 9
