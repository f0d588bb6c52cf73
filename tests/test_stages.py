"""The stages before RL over a cluster that needs no networks: what is done, skipped, and done again."""

import json
from pathlib import Path

import numpy as np
import pytest
from offline_stages import run_stages, tiny_config

from ocrm_ray import praise, stages
from ocrm_ray.preferences import read_pairs
from ocrm_ray.prompts import ShuffledEpochs, read_prompts
from ocrm_ray.stage_settings import stage_differences
from ocrm_ray.stages import StageFolder, Stages, stage_paths


def test_the_accuracy_of_the_first_reward_model_is_kept_and_that_of_a_ready_one_not_known(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    cluster = run_stages(config)
    assert Stages(config, cluster, lambda state: None).first_accuracy() == 0.71  # type: ignore[arg-type]
    ready = tiny_config(tmp_path, reward={"ready": "elsewhere"})
    assert Stages(ready, cluster, lambda state: None).first_accuracy() is None  # type: ignore[arg-type]


def test_every_stage_runs_once_in_order_and_is_skipped_the_second_time(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    assert run_stages(config).calls == ["sft", "gold", "reward", "logprobs"]
    again = run_stages(config)
    assert again.calls == []
    assert again.requests == []


def test_a_changed_setting_redoes_its_stage_and_those_after_it_but_none_before(tmp_path: Path) -> None:
    run_stages(tiny_config(tmp_path))
    changed = tiny_config(tmp_path, reward={"training": {"num_epochs": 2}})
    assert run_stages(changed).calls == ["reward"]
    changed = tiny_config(tmp_path, pairs={"num_pairs": 120, "labels": "bradley_terry"})
    assert run_stages(changed).calls == ["gold", "reward", "logprobs"]


@pytest.mark.parametrize(
    ("tree", "redone"),
    [
        ({"policy": {"max_grad_norm": 0.5}}, ["sft", "pairs", "reward", "logprobs"]),
        ({"sft": {"ready": "elsewhere"}, "policy": {"max_grad_norm": 0.5}}, []),
        ({"pools": {"generation": {"dtype": "bfloat16"}}}, ["pairs", "reward", "logprobs"]),
        ({"pools": {"scoring": {"dtype": "bfloat16"}}}, ["logprobs"]),
        ({"pools": {"reward": {"dtype": "bfloat16"}}}, ["reward"]),
        ({"reward": {"lora": {"rank": 2}}}, ["reward"]),
        ({"pairs": {"num_pairs": 120, "labels": "argmax", "allow_unknown_behaviour": True}}, []),
        ({"policy": {"num_updates": 3}, "reward": {"scale": "calibration_std"}}, []),
    ],
)
def test_a_stage_is_made_anew_for_just_those_settings_in_which_arms_that_share_it_may_not_differ(
    tmp_path: Path, tree: dict[str, dict[str, object]], redone: list[str]
) -> None:
    before = tiny_config(tmp_path, **{key: value for key, value in tree.items() if key == "sft"})
    after = tiny_config(tmp_path, **tree)
    whole = [Stages(config, None, lambda state: None) for config in (before, after)]  # type: ignore[arg-type]
    names = ("world", "data", "sft", "pairs", "reward", "logprobs")
    assert [name for name in names if len({of.folder(name).fingerprint for of in whole}) == 2] == redone
    assert bool(stage_differences(before, after)) == bool(redone)


def test_an_interrupted_stage_is_done_again_and_what_was_made_from_its_result(tmp_path: Path) -> None:
    ensemble = tiny_config(tmp_path, reward={"ensemble": {"num_members": 3}})
    run_stages(ensemble)
    config = tiny_config(tmp_path)
    run_stages(config)
    (config.stage_root / "pairs" / "stage.json").unlink()
    assert run_stages(config).calls == ["gold", "reward", "logprobs"]
    assert run_stages(ensemble).calls == ["reward"]


def test_what_is_behind_a_stage_is_not_done_before_the_stage_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path)
    run_stages(config)
    (config.stage_root / "pairs" / "train.jsonl").unlink()
    monkeypatch.setattr(stages, "write_pairs", lambda path, pairs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_stages(config)
    assert not (config.stage_root / "logprobs" / "stage.json").exists()
    assert (config.stage_root / "sft" / "stage.json").exists()


def test_a_data_file_with_other_content_under_the_same_name_is_read_again(tmp_path: Path) -> None:
    world = tmp_path / "world"
    praise.write_world(world, tiny_config(tmp_path).world, seed=5)  # type: ignore[arg-type]
    data, model = tmp_path / "prompts.jsonl", str(world / "policy")
    tree = {"world": None, "sft": {"ready": model}, "gold": {"kind": "function", "path": "ocrm_ray.praise:gold"}}
    tree |= {"reward": {"ready": model}, "data": {"prompts": {"path": str(data)}, "num_heldout": 10}}
    rows = (world / "prompts.jsonl").read_text().splitlines()
    data.write_text("\n".join(rows))
    config = tiny_config(tmp_path, **tree)
    assert run_stages(config).calls == ["gold", "logprobs"]
    assert run_stages(config).calls == []
    data.write_text("\n".join(rows[:-1]))
    assert run_stages(config).calls == ["gold", "logprobs"]
    assert len(read_prompts(config.stage_root / "data" / "prompts.jsonl")) == 49


def test_a_data_file_is_hashed_before_and_after_it_is_read_and_else_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    whole = stages.file_fingerprint
    monkeypatch.setattr(stages, "file_fingerprint", lambda name: hashed.append(name) or whole(name))
    world = tmp_path / "world"
    praise.write_world(world, tiny_config(tmp_path).world, seed=5)  # type: ignore[arg-type]
    data, model = str(world / "prompts.jsonl"), str(world / "policy")
    tree = {"world": None, "sft": {"ready": model}, "gold": {"kind": "function", "path": "ocrm_ray.praise:gold"}}
    for num_times in (2, 3):
        run_stages(tiny_config(tmp_path, **tree, data={"prompts": {"path": data}, "num_heldout": 10}))
        assert hashed.count(data) == num_times


def test_a_strategy_without_ratios_needs_no_log_probs(tmp_path: Path) -> None:
    assert "logprobs" not in run_stages(tiny_config(tmp_path, correction={"strategy": "none"})).calls


def test_an_offline_policy_and_the_placebo_need_log_probs_and_alignments_do_not(tmp_path: Path) -> None:
    offline = {"policy": {"algorithm": "dpo"}, "correction": {"strategy": "none"}}
    assert "logprobs" in run_stages(tiny_config(tmp_path / "dpo", **offline)).calls
    assert "logprobs" in run_stages(tiny_config(tmp_path / "b", correction={"strategy": "shuffled"})).calls
    assert "logprobs" not in run_stages(tiny_config(tmp_path / "c", correction={"strategy": "wpo_bt"})).calls


def test_an_ensemble_is_a_stage_of_its_own_beside_the_single_reward_model(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    run_stages(config)
    ensemble = tiny_config(tmp_path, reward={"ensemble": {"num_members": 3}})
    assert run_stages(ensemble).calls == ["reward"]
    assert stage_paths(ensemble).reward != stage_paths(config).reward
    assert run_stages(config).calls == []


def test_training_and_held_out_prompts_share_nothing_and_pairs_use_training_prompts_evenly(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    cluster = run_stages(config)
    training = read_prompts(config.stage_root / "data" / "prompts.jsonl")
    heldout = read_prompts(config.stage_root / "data" / "heldout.jsonl")
    assert (len(training), len(heldout)) == (50, 10)
    assert not {prompt.token_ids for prompt in training} & {prompt.token_ids for prompt in heldout}
    assert sorted(request.num_samples for request in cluster.requests) == [4] * 30 + [6] * 20
    assert {request.prompt.prompt_id for request in cluster.requests} == {prompt.prompt_id for prompt in training}


def test_no_two_samples_of_the_pairs_share_a_seed(tmp_path: Path) -> None:
    requests = run_stages(tiny_config(tmp_path)).requests
    seeds = [request.seed + index for request in requests for index in range(request.num_samples)]
    assert len(set(seeds)) == len(seeds) == 240


def test_the_training_pairs_are_counted_without_reading_them(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    cluster = run_stages(config)
    folder = config.stage_root / "pairs"
    num_pairs = len(read_pairs(folder / "train.jsonl"))
    (folder / "train.jsonl").unlink()
    assert Stages(config, cluster, lambda state: None).num_training_pairs() == num_pairs  # type: ignore[arg-type]


def test_argmax_labels_prefer_the_higher_gold(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    run_stages(config)
    pairs = read_pairs(config.stage_root / "pairs" / "train.jsonl")
    assert len(pairs) > 100
    for pair in pairs:
        scores = praise.gold([pair.prompt_text] * 2, [pair.chosen_text, pair.rejected_text], [None, None])
        assert scores == pytest.approx([pair.gold_chosen, pair.gold_rejected])
        assert scores[0] >= scores[1]


def test_cached_log_probs_come_back_as_they_were(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    cluster = run_stages(config)
    logprobs = Stages(config, cluster, lambda state: None).behaviour_logprobs()  # type: ignore[arg-type]
    num_pairs = len(read_pairs(config.stage_root / "pairs" / "train.jsonl"))
    assert np.array_equal(logprobs, np.arange(2 * num_pairs, dtype=np.float32).reshape(-1, 2))


def test_a_stage_is_done_only_with_the_same_inputs(tmp_path: Path) -> None:
    StageFolder(tmp_path / "pairs", {"seed": 1}).begin()
    StageFolder(tmp_path / "pairs", {"seed": 1}).finish(num_pairs=3)
    assert StageFolder(tmp_path / "pairs", {"seed": 1}).is_done
    assert not StageFolder(tmp_path / "pairs", {"seed": 2}).is_done
    assert json.loads((tmp_path / "pairs" / "stage.json").read_text())["num_pairs"] == 3


def test_another_seed_redraws_world_prompts_sft_pairs_labels_and_reward_model(tmp_path: Path) -> None:
    one, other = (tiny_config(tmp_path / str(seed), seed=seed) for seed in (5, 6))
    clusters = [run_stages(config) for config in (one, other)]
    assert clusters[0].calls == clusters[1].calls
    for name in ("world", "data", "sft", "pairs", "reward", "logprobs"):
        facts = [json.loads((config.stage_root / name / "stage.json").read_text()) for config in (one, other)]
        assert facts[0]["fingerprint"] != facts[1]["fingerprint"], name
    assert {r.seed for r in clusters[0].requests}.isdisjoint(r.seed for r in clusters[1].requests)
    for file in ("world/policy/model.safetensors", "world/reward/model.safetensors", "data/prompts.jsonl"):
        assert (one.stage_root / file).read_bytes() != (other.stage_root / file).read_bytes(), file
    pairs = [read_pairs(config.stage_root / "pairs" / "train.jsonl") for config in (one, other)]
    assert {pair.chosen for pair in pairs[0]}.isdisjoint(pair.chosen for pair in pairs[1])


def test_an_ensemble_shares_every_stage_but_its_own_reward_models(tmp_path: Path) -> None:
    shared = {"stages_dir": str(tmp_path / "shared")}
    single = tiny_config(tmp_path, **shared)
    run_stages(single)
    ensemble = tiny_config(tmp_path, **shared, reward={"ensemble": {"num_members": 4, "aggregate": "worst"}})
    assert run_stages(ensemble).calls == ["reward"]
    assert run_stages(single).calls == []


def test_an_epoch_holds_every_prompt_once_and_the_next_has_another_order(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    run_stages(config)
    prompts = read_prompts(config.stage_root / "data" / "prompts.jsonl")
    stream = iter(ShuffledEpochs(prompts, seed=3))
    first, second = ([next(stream).prompt_id for _ in prompts] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(prompt.prompt_id for prompt in prompts)
    assert first != second
