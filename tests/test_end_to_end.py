"""The product as a user runs it, with real vLLM, DeepSpeed and Ray: what two schedules of a study left, and a run."""

import json
from pathlib import Path

import pytest
import yaml
from program import ocrm_ray
from small_study import ARMS, SCHEDULES, metrics, told
from synthetic_runs import read_lines

from ocrm_ray.praise import VOCABULARY

pytestmark = pytest.mark.real


def test_both_schedules_promote_corrections_with_their_lag(study_dir: Path) -> None:
    lags = {arm: [row["lag_steps"] for row in told(study_dir, arm, "promoted")] for arm in SCHEDULES}
    assert lags == {"overlapped": [2, 2], "paper": [0, 0]}


def test_rollouts_finish_inside_every_overlapped_correction_window(study_dir: Path) -> None:
    promoted = told(study_dir, "overlapped", "promoted")
    assert promoted
    assert all(row["num_rollouts_finished"] > 0 for row in promoted)


def test_the_moving_anchor_is_the_snapshot_and_the_frozen_one_stays(study_dir: Path) -> None:
    anchors = {arm: [row["anchor_version"] for row in metrics(study_dir, arm)] for arm in SCHEDULES}
    assert set(anchors["overlapped"]) == {0}
    assert anchors["paper"] == [0, 0, 0, 3, 3, 3, 6, 6, 6]


def test_engine_and_trainer_agree_after_every_publish(study_dir: Path) -> None:
    for arm in SCHEDULES:
        probes = told(study_dir, arm, "probe_measured")
        assert probes
        assert all(probe["gap"] < 1e-4 for probe in probes)


def test_every_step_has_its_line_and_evaluations_have_gold(study_dir: Path) -> None:
    rows = metrics(study_dir, "overlapped")
    assert [row["step"] for row in rows] == list(range(9))
    assert [row["step"] for row in rows if row["gold_mean"] is not None] == [0, 4, 8]


def test_arms_share_their_stages_and_differ_in_nothing_before_rl(study_dir: Path) -> None:
    assert (study_dir / "shared" / "seed-1" / "reward" / "stage.json").exists()
    first = [metrics(study_dir, arm)[0] for arm in SCHEDULES]
    assert first[0]["gold_mean"] == first[1]["gold_mean"]
    assert first[0]["proxy_mean"] == pytest.approx(first[1]["proxy_mean"], abs=1e-6)


def test_the_last_policy_and_the_checkpoint_are_model_folders_that_answer(study_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in ("policy", "policy-best", "checkpoints/step-4"):
        path = study_dir / "paper" / "seed-1" / folder
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        prompt = tokenizer(
            read_lines(study_dir / "shared" / "seed-1" / "data" / "heldout.jsonl")[0]["text"], return_tensors="pt"
        )
        torch.manual_seed(0)
        answers = model.generate(**prompt, max_new_tokens=13, do_sample=True, num_return_sequences=8)
        texts = tokenizer.batch_decode(answers[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert set(" ".join(texts).split()) & set(VOCABULARY)


def test_the_study_ends_with_a_table_and_reports(study_dir: Path) -> None:
    assert json.loads((study_dir / "study.json").read_text())["arms"].keys() >= ARMS.keys()
    assert (study_dir / "study.html").stat().st_size > 1000
    assert (study_dir / "overlapped" / "seed-1" / "report.html").exists()


def test_ready_pairs_run_without_gold_on_two_engines(study_dir: Path, tmp_path: Path) -> None:
    shared = study_dir / "shared" / "seed-1"
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
