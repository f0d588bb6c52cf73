"""Contradictions, and the checks of models, data, folders and machine: each with its exact message."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from model_files import NUM_PARAMETERS, write_model, write_reward_model, write_weights

from ocrm_ray import machine
from ocrm_ray.checks import contradictions, inspect, study_problems
from ocrm_ray.config import RunConfig
from ocrm_ray.config_file import dump_yaml, load_run_config, load_study_config
from ocrm_ray.errors import Problem
from ocrm_ray.inspection import network_sizes, occupied
from ocrm_ray.machine import GIB, NetworkSizes, memory_gib, num_gpus

WORLD = "name: trial\nworld: {}\nrollout: {max_new_tokens: 13}\n"
MODELS = """
name: trial
data: {prompts: {path: prompts.jsonl}, num_heldout: 2}
sft: {base: model}
gold: {kind: function, path: 'json:loads'}
rollout: {prompts_per_step: 2}
evaluation: {num_prompts: 2, num_pair_prompts: 2, num_samples_saved: 2}
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: an SFT model, a small reward model and six prompts; a machine of 4 CPUs and 32 GiB."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=32 * GIB))
    monkeypatch.setattr(machine, "num_gpus", lambda: 0)
    write_model(tmp_path / "model")
    write_reward_model(tmp_path / "rm", hidden_size=32)
    rows = [json.dumps({"prompt": f"p{number}", "output": "x"}) for number in range(6)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    return tmp_path


def config_of(text: str, *overrides: str) -> RunConfig:
    Path("c.yaml").write_text(text)
    return load_run_config(Path("c.yaml"), overrides)


def lines(problems: list[Problem]) -> list[str]:
    return [str(problem) for problem in problems]


def test_sound_configurations_have_no_problems() -> None:
    for text in (WORLD, MODELS):
        config = config_of(text)
        assert contradictions(config) == []
        assert inspect(config) == []


BIASED = "the importance ratio of truncated sampling is biased"
CONTRADICTIONS = {
    "sft.ready=a/b": 'sft.ready: got "a/b", need nothing beside world: remove it, or remove world',
    "pairs.ready.path=p.json": 'pairs.ready: got "p.json", need nothing beside world: remove it, or remove world',
    "gold={kind: function, path: 'a:b'}": 'gold: got "function", need nothing beside world: remove it, or remove world',
    "pairs.behaviour=unknown": 'pairs.behaviour: got "unknown", need sft, since the pairs are sampled from it: '
    "remove it, or set pairs.ready",
    "pairs.num_pairs=1 reward.num_calibration=1": "pairs.num_pairs: got 1, "
    "need at least 2, one of them held out: raise it",
    "pairs.num_pairs=2 pairs.heldout_share=0.9 reward.num_calibration=4": "pairs.heldout_share: got 0.9, "
    "need less than 1 - 1 / pairs.num_pairs (2): lower it: no pair is left to train on",
    "correction.num_pairs=19001": "correction.num_pairs: got 19001, need at most 19000, the training pairs: "
    "lower it, or raise pairs.num_pairs",
    "reward.num_calibration=40001": "reward.num_calibration: got 40001, "
    "need at most 40000, the responses of pairs.num_pairs 20000: lower it",
    "rollout.top_p=0.9": f"rollout.top_p: got 0.9 with strategy ocrm, need 1: {BIASED}: "
    "set it to 1, or use strategy refit",
    "rollout.top_k=5": f"rollout.top_k: got 5 with strategy ocrm, need 0: {BIASED}: set it to 0, or use strategy refit",
    "pairs.top_p=0.5": f"pairs.top_p: got 0.5 with strategy ocrm, need 1: {BIASED}: set it to 1, or use strategy refit",
    "pairs.top_k=3": f"pairs.top_k: got 3 with strategy ocrm, need 0: {BIASED}: set it to 0, or use strategy refit",
    "correction.promote_after=2 correction.max_lag=3": "correction.max_lag: got 3 beside promote_after 2, "
    "need one of the two: remove one",
    "correction.schedule=blocking correction.promote_after=2": "correction.promote_after: got 2 with schedule "
    "blocking, need nothing: a blocking correction is promoted before the next update: remove it",
    "correction.schedule=blocking correction.max_lag=2": "correction.max_lag: got 2 with schedule "
    "blocking, need nothing: a blocking correction is promoted before the next update: remove it",
    "correction.critic_on_promote=reinit": "correction.critic_on_promote: got reinit with policy.algorithm rloo, "
    "need keep: only ppo has a critic: set it to keep",
    "correction.rm_init=sft": "correction.rm_init: got sft with world, "
    "need base or previous: the world's reward model is smaller than its SFT model: change it",
    "rollout.samples_per_prompt=1": "rollout.samples_per_prompt: got 1, "
    "need at least 2 for rloo, which compares the samples of a prompt: raise it, or use ppo",
    "policy.num_minibatches=3": "policy.num_minibatches: got 3, need a divisor of the 128 samples of a step: "
    "change it, or rollout.prompts_per_step",
    "policy.num_minibatches=256": "policy.num_minibatches: got 256, need a divisor of the 128 samples of a step: "
    "change it, or rollout.prompts_per_step",
    "policy.num_minibatches=64 pools.policy.num_actors=4": "pools.policy.num_actors: got 4, "
    "need a divisor of the 2 samples of a minibatch: change it",
    "policy.kl_placement=loss": "policy.kl_estimator: got k1 with kl_placement loss, "
    "need k2 or k3: the gradient of k1 is zero on average: change it, or place it in the reward",
    "rollout.straggler=reissue rollout.max_staleness=0": "rollout.straggler: got reissue with max_staleness 0, "
    "need wait: a prompt issued again would be as late: change it, or raise max_staleness",
    "evaluation.num_prompts=1025": "evaluation.num_prompts: got 1025, need at most 1024, as data.num_heldout: "
    "lower it, or raise data.num_heldout",
    "evaluation.num_pair_prompts=1025": "evaluation.num_pair_prompts: got 1025, "
    "need at most 1024, as evaluation.num_prompts: lower it",
    "evaluation.num_samples_saved=1025": "evaluation.num_samples_saved: got 1025, "
    "need at most 1024, as evaluation.num_prompts: lower it",
    "world.num_prompts=116281": "world.num_prompts: got 116281, need at most 116280, all there are: lower it",
    "world.num_prompts=1055": "world.num_prompts: got 1055, "
    "need at least 1056: data.num_heldout 1024 and those of one step: raise it, or lower data.num_heldout",
    "world.policy_hidden_size=48": "world.policy_hidden_size: got 48, "
    "need a multiple of 32, the width of a head: change it",
    "world.reward_hidden_size=16": "world.reward_hidden_size: got 16, "
    "need a multiple of 32, the width of a head: change it",
    "rollout.max_new_tokens=12": "rollout.max_new_tokens: got 12, "
    "need 13 (its responses and EOS) to 60 (its models' context less the prompt) with world: change it",
    "rollout.max_new_tokens=61": "rollout.max_new_tokens: got 61, "
    "need 13 (its responses and EOS) to 60 (its models' context less the prompt) with world: change it",
    "data.chat_template=always": "data.chat_template: got always with world, "
    "need auto or never: the world's tokenizer has no chat template: change it",
    "pools.policy.gpus_per_actor=1.5": "pools.policy.gpus_per_actor: got 1.5, "
    "need a whole number, or a share of one GPU (Ray gives no other): change it",
    "pools.evaluation.num_actors=2": "pools.evaluation.num_actors: got 2, need 1: one actor evaluates: remove it",
}


@pytest.mark.parametrize("overrides", CONTRADICTIONS)
def test_a_contradiction_is_told(overrides: str) -> None:
    parts = [overrides] if "{" in overrides else overrides.split()
    assert lines(contradictions(config_of(WORLD, *parts))) == [CONTRADICTIONS[overrides]]


WITHOUT_WORLD = {
    "data.prompts=null": "data.prompts: got nothing, need prompts, or the embedded world: set it, or set world: {}",
    "sft.base=null": "sft: got neither ready nor base, need a model to start from: set sft.base or sft.ready",
    "sft.ready=model": 'sft.base: got "model", need nothing beside sft.ready: remove one of the two',
    "reward.ready=rm reward.base=rm": 'reward.base: got "rm", need nothing beside reward.ready: remove one of the two',
    "gold=null": "gold: got nothing, need a gold reward that labels the sampled pairs, or ready pairs: "
    "set gold or pairs.ready",
    "gold.path=nonsense": 'gold.path: got "nonsense", need package.module:function: correct the import path',
    "pairs.ready.path=p.json pairs.behaviour=unknown": "pairs.behaviour: got unknown with strategy ocrm, "
    "need the model that wrote the pairs: name it, set pairs.allow_unknown_behaviour: true, or use strategy refit",
}


@pytest.mark.parametrize("overrides", WITHOUT_WORLD)
def test_a_contradiction_without_the_world_is_told(overrides: str) -> None:
    assert lines(contradictions(config_of(MODELS, *overrides.split()))) == [WITHOUT_WORLD[overrides]]


@pytest.mark.parametrize(
    "overrides",
    [
        "rollout.top_p=0.9 correction.strategy=refit",
        "correction.rm_init=sft correction.strategy=none",
        "rollout.samples_per_prompt=1 policy.algorithm=ppo correction.critic_on_promote=reinit",
        "policy.kl_placement=loss policy.kl_estimator=k3",
        "policy.kl_placement=loss policy.kl_coefficient=0",
        "correction.promote_after=3",
        "pools.policy.gpus_per_actor=0.5 pools.reward.gpus_per_actor=2",
        "policy.num_minibatches=128",
        "rollout.straggler=reissue",
    ],
)
def test_what_only_looks_like_a_contradiction_passes(overrides: str) -> None:
    assert contradictions(config_of(WORLD, *overrides.split())) == []


def test_unknown_behaviour_passes_where_it_is_allowed() -> None:
    text = MODELS + "pairs: {ready: {path: p.json}, behaviour: unknown, allow_unknown_behaviour: true}"
    assert contradictions(config_of(text)) == []


def test_ready_pairs_need_no_gold_and_may_have_it() -> None:
    for overrides in (["pairs.ready.path=p.json", "gold=null"], ["pairs.ready.path=p.json"]):
        assert contradictions(config_of(MODELS, *overrides)) == []


def test_a_missing_model_is_told_and_a_hub_name_is_not_looked_up() -> None:
    need = "need a model folder or a Hub name org/name: correct the path"
    assert lines(inspect(config_of(MODELS, "sft.base=gone"))) == [f'sft.base: got "gone", which does not exist, {need}']
    assert lines(inspect(config_of(MODELS, "sft.base=prompts.jsonl"))) == [
        f'sft.base: got "prompts.jsonl", a file, {need}'
    ]
    assert inspect(config_of(MODELS, "sft.base=org/name")) == []


def test_a_name_below_a_folder_that_is_here_is_no_hub_name() -> None:
    assert lines(inspect(config_of(MODELS, "sft.base=model/gone"))) == [
        'sft.base: got "model/gone", which does not exist, need a model folder or a Hub name org/name: correct the path'
    ]


def test_pickle_weights_are_refused(workplace: Path) -> None:
    (workplace / "model" / "model.safetensors").rename(workplace / "model" / "pytorch_model.bin")
    assert lines(inspect(config_of(MODELS))) == [
        'sft.base: got "model" with pickle weights only, need safetensors weights (pickles can run code): '
        "convert them (load, then save_pretrained)"
    ]


def test_a_model_without_weights_tokenizer_or_config_is_told(workplace: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (workplace / "model" / name).unlink()
    assert lines(inspect(config_of(MODELS))) == [
        'sft.base: got "model" without a readable config.json, need a Hugging Face model folder: '
        "save the model there again",
        'sft.base: got "model" without a tokenizer, need tokenizer files beside the weights: save the tokenizer there',
        'sft.base: got "model" without weights, need *.safetensors beside config.json: save the model there again',
    ]


def test_weights_that_end_early_are_told(workplace: Path) -> None:
    write_weights(workplace / "model" / "model.safetensors", missing_bytes=1)
    assert lines(inspect(config_of(MODELS))) == [
        'sft.base: got "model" with model.safetensors missing or incomplete, '
        "need whole safetensors files: copy the folder again"
    ]


def test_a_missing_shard_is_told(workplace: Path) -> None:
    index = {"weight_map": {"weight": "model.safetensors", "other": "model-2.safetensors"}}
    (workplace / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert lines(inspect(config_of(MODELS))) == [
        'sft.base: got "model" with model-2.safetensors missing or incomplete, '
        "need whole safetensors files: copy the folder again"
    ]


def test_models_of_the_wrong_kind_are_told(workplace: Path) -> None:
    write_reward_model(workplace / "two", num_labels=2)
    assert lines(inspect(config_of(MODELS, "sft.base=rm"))) == [
        'sft.base: got "rm" with a LlamaForSequenceClassification, need a causal language model: choose another model'
    ]
    assert lines(inspect(config_of(MODELS, "reward.ready=model"))) == [
        'reward.ready: got "model" with a LlamaForCausalLM, need a sequence classifier: choose another model'
    ]
    assert lines(inspect(config_of(MODELS, "reward.ready=two"))) == [
        'reward.ready: got "two" with 2 labels, need one label (one score a response): choose a model with num_labels 1'
    ]
    assert lines(inspect(config_of(MODELS, "gold={kind: classifier, model: model}"))) == [
        'gold.model: got "model" with a LlamaForCausalLM, need a sequence classifier: choose another model'
    ]


def test_vocabularies_that_differ_are_told(workplace: Path) -> None:
    write_reward_model(workplace / "swapped", tokens=("b", "a"))
    write_reward_model(workplace / "larger", tokens=("a", "b", "c"))
    (write_reward_model(workplace / "mute", tokens=("a",)) / "tokenizer.json").unlink()
    need = "need the policy's vocabulary (token ids are passed on): choose a model of the same family"
    for name, got in (
        ("swapped", "2 of 2 token ids mean different tokens"),
        ("larger", "2 and 3 tokens"),
        ("mute", "2 and 1 tokens"),
    ):
        problems = inspect(config_of(MODELS, f"reward.base={name}"))
        assert lines(problems) == [f"reward.base: got another vocabulary, {got}, {need}"]


def test_the_refit_cannot_start_from_an_sft_model_of_another_shape() -> None:
    overrides = ["reward.base=rm", "correction.rm_init=sft"]
    assert lines(inspect(config_of(MODELS, *overrides))) == [
        "correction.rm_init: got sft, need base or previous: SFT and reward model differ (hidden_size 64 and 32): "
        "change it, or use a reward model of the same shape"
    ]
    assert inspect(config_of(MODELS, *overrides, "correction.strategy=none")) == []


def test_prompt_and_response_must_fit_the_context() -> None:
    assert inspect(config_of(MODELS, "rollout.max_new_tokens=512")) == []
    assert lines(inspect(config_of(MODELS, "rollout.max_new_tokens=513"))) == [
        "data.max_prompt_tokens: got 512 with rollout.max_new_tokens 513, need at most 1024 together, "
        "the context of sft.base: lower one of the two"
    ]


def test_data_that_is_missing_empty_broken_or_too_small_is_told(workplace: Path) -> None:
    (workplace / "empty.jsonl").write_text("")
    (workplace / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    for override, line in {
        "data.prompts.path=gone.jsonl": 'data.prompts.path: got "gone.jsonl", which does not exist, '
        "need a JSON, JSONL or Parquet file or a Hub name org/name: correct the path",
        "data.prompts.path=empty.jsonl": "data.prompts.path: got 'empty.jsonl', which has no rows, "
        "need at least one row: name a data set with rows",
        "data.prompts.path=broken.jsonl": "data.prompts.path: got 'broken.jsonl', broken at line 2: Expecting value, "
        "need a readable JSON, JSONL or Parquet file: repair the file",
        "data.num_heldout=5": "data.num_heldout: got 5 with 6 prompts in prompts.jsonl, "
        "need at most 4, so that one step's prompts are left: lower it, or add prompts",
        "data.prompts.limit=3": "data.num_heldout: got 2 with 3 prompts in prompts.jsonl, "
        "need at most 1, so that one step's prompts are left: lower it, or add prompts",
        "pairs.ready.path=gone.json": 'pairs.ready.path: got "gone.json", which does not exist, '
        "need a JSON, JSONL or Parquet file or a Hub name org/name: correct the path",
        "pairs.ready.path=prompts.jsonl": "pairs.ready.path: got columns prompt, output, need columns chosen and "
        "rejected, with prompt, messages or a shared beginning: rename the columns",
    }.items():
        assert lines(inspect(config_of(MODELS, override))) == [line]


def test_a_gold_function_is_looked_for_without_running_it(workplace: Path) -> None:
    (workplace / "mygold").mkdir()
    (workplace / "mygold" / "__init__.py").write_text("raise AssertionError('executed')")
    (workplace / "mygold" / "score.py").write_text("raise AssertionError('executed')")
    assert inspect(config_of(MODELS, "gold.path=mygold.score:f")) == []
    assert lines(inspect(config_of(MODELS, "gold.path=mygold.other:f"))) == [
        'gold.path: got "mygold.other:f", whose module mygold.other is not found, '
        "need a module of this environment or folder: correct it, or install it"
    ]


def test_output_folders_below_a_file_are_told() -> None:
    assert lines(inspect(config_of(WORLD, "output_dir=prompts.jsonl/x"))) == [
        'output_dir: got "prompts.jsonl/x", where prompts.jsonl is a file, need a folder: change it'
    ]


def test_output_folders_that_cannot_be_written_are_told(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    (workplace / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    assert lines(inspect(config_of(WORLD, "stages_dir=locked/x"))) == [
        'stages_dir: got "locked/x", which cannot be written, need a writable folder: change it'
    ]


def test_a_run_folder_of_other_stages_is_refused_and_one_of_other_rl_settings_is_not() -> None:
    config = config_of(WORLD)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(dump_yaml(config))
    assert inspect(config_of(WORLD, "policy.learning_rate=1", "reward.scale=calibration_std")) == []
    assert lines(inspect(config_of(WORLD, "pairs.temperature=0.5"))) == [
        'name: got "trial", whose folder runs/trial was made with pairs.temperature 1.0 (now 0.5), '
        "need a run folder of its own: choose another name, or change that back"
    ]


def test_a_run_folder_may_hold_the_same_paths_made_absolute(workplace: Path) -> None:
    config = config_of(MODELS)
    config.run_dir.mkdir(parents=True)
    absolute = load_run_config(Path("c.yaml"), [], cwd=workplace)
    (config.run_dir / "config.yaml").write_text(dump_yaml(absolute))
    assert inspect(config) == []


def test_a_run_folder_with_an_unreadable_configuration_is_refused() -> None:
    config = config_of(WORLD)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text("- 1")
    assert lines(inspect(config)) == [
        'name: got "trial", whose runs/trial/config.yaml cannot be read, '
        "need a run folder of this version, or a new one: choose another name"
    ]


def test_a_folder_is_occupied_once_it_has_training_steps() -> None:
    config = config_of(WORLD)
    config.run_dir.mkdir(parents=True)
    assert occupied(config) == []
    (config.run_dir / "metrics.jsonl").write_text('{"step": 0}\n')
    assert lines(occupied(config)) == [
        'name: got "trial", a run that has begun in runs/trial, need a new run folder: '
        "choose another name, or pass --resume"
    ]


def test_asking_for_more_than_the_machine_has_is_told() -> None:
    do = "lower cpus_per_actor or num_actors, or set RAY_ADDRESS to a cluster"
    gpu_do = "lower gpus_per_actor or num_actors, or set RAY_ADDRESS to a cluster"
    assert lines(inspect(config_of(WORLD, "pools.policy.cpus_per_actor=4"))) == [
        "pools: got 4.4 CPUs (generation 0.1, policy 4, scoring 0.1, reward 0.1, evaluation 0.1), "
        f"need at most 4 (this machine's): {do}"
    ]
    assert lines(inspect(config_of(WORLD, "pools.policy.gpus_per_actor=0.5", "pools.reward.gpus_per_actor=1"))) == [
        f"pools: got 1.5 GPUs (policy 0.5, reward 1), need at most 0 (this machine's): {gpu_do}"
    ]
    assert lines(inspect(config_of(WORLD, "pools.generation.kv_cache_gib=100"))) == [
        "pools: got about 105 GiB of memory (generation 102.5, policy 0.5, scoring 0.5, reward 0.5, evaluation 0.5, "
        "ray 0.5), need at most 32.0 GiB (this machine's): "
        "use smaller models, bfloat16, fewer actors, a smaller micro_batch_size or kv_cache_gib"
    ]


def test_a_cluster_is_not_measured_by_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "cluster:6379")
    assert inspect(config_of(WORLD, "pools.policy.cpus_per_actor=400", "pools.policy.gpus_per_actor=8")) == []


def test_gpus_are_counted_as_far_as_they_are_visible(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("0000:01", "0000:02"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    monkeypatch.setattr(machine, "_NVIDIA", tmp_path / "gpus")
    for visible, expected in ((None, 2), ("", 0), ("1", 1), ("0,1,2", 2), ("-1", 0)):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert num_gpus() == expected


def test_memory_follows_its_formula() -> None:
    overrides = ["pools.scoring.num_actors=2", "pools.scoring.dtype=bfloat16", "policy.algorithm=ppo"]
    config = config_of(WORLD, *overrides, "policy.micro_batch_size=10")
    memory = memory_gib(config, NetworkSizes(policy=GIB, reward=GIB // 2, vocabulary=1000))
    logits = 3 * 4 * 10 * 13 * 1000 / GIB
    assert memory == pytest.approx(
        {
            "generation": 2.5 + 2 * 4 + 1,
            "policy": 0.5 + 16 * 1.5 + logits,
            "scoring": 2 * (0.5 + 3 * 2),
            "reward": 0.5 + 3 * 4 * 0.5 + 16 * 0.5,
            "evaluation": 0.5,
            "ray": 0.5,
        }
    )


def test_network_sizes_are_read_from_weight_files() -> None:
    assert network_sizes(config_of(MODELS)) == NetworkSizes(NUM_PARAMETERS, NUM_PARAMETERS, vocabulary=2)
    assert network_sizes(config_of(MODELS, "sft.base=org/name")) is None


def test_the_worlds_sizes_are_those_of_its_models(tmp_path: Path) -> None:
    from ocrm_ray.praise import write_world

    config = config_of(WORLD, "world.num_prompts=4", "world.policy_hidden_size=128")
    assert config.world is not None
    write_world(tmp_path / "written", config.world, seed=0)
    sizes = network_sizes(config)
    assert sizes is not None
    for name, predicted in (("policy", sizes.policy), ("reward", sizes.reward)):
        content = (tmp_path / "written" / name / "model.safetensors").read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        counted = sum(math.prod(entry["shape"]) for key, entry in header.items() if key != "__metadata__")
        assert predicted == pytest.approx(counted, rel=0.01)


def test_a_study_tells_each_problem_once_with_its_arm() -> None:
    Path("s.yaml").write_text(
        "name: s\nseeds: [1, 2]\n"
        "base: {world: {}, rollout: {max_new_tokens: 13}, evaluation: {num_prompts: 2000}}\n"
        "arms: {a: {}, b: {correction.promote_after: 1, correction.max_lag: 1}, c: {pairs.temperature: 0.5}}"
    )
    assert lines(study_problems(load_study_config(Path("s.yaml"), []))) == [
        "base.evaluation.num_prompts: got 2000, need at most 1024, as data.num_heldout: "
        "lower it, or raise data.num_heldout",
        "arms.b.correction.max_lag: got 1 beside promote_after 1, need one of the two: remove one",
        "arms.c.pairs.temperature: got 0.5, need 1.0, as in the first arm: "
        "move it to base: the arms share the stages in runs/s/shared",
    ]
