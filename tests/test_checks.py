"""Contradictions, and the checks of models, data, folders and machine: each with its exact message."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from model_files import NUM_PARAMETERS, write_model, write_reward_model, write_weights

from ocrm_ray.checks import contradictions, inspect, study_problems
from ocrm_ray.config import RunConfig
from ocrm_ray.config_file import dump_yaml, load_run_config, load_study_config, study_runs
from ocrm_ray.errors import Problem
from ocrm_ray.inspection import network_sizes, occupied
from ocrm_ray.machine import GIB, NetworkSizes, memory_gib
from ocrm_ray.stage_settings import stage_settings

WORLD = "name: trial\nworld: {}\n"
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
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
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


BIASED = "with correction.strategy ocrm: the ratio of truncated sampling is biased"
BLOCKING = "need nothing with schedule blocking: it promotes before the next update: remove it"
BESIDE_WORLD = "need nothing beside world: remove it, or remove world"
ANOTHER_POOL = "need another pool, with a placement group of its own: name another"
WHOLE_GPUS = "need at most 1, or a whole number of GPUs of an engine: change it, and num_actors"
DETERMINISTIC = "deterministic=true pools.generation.max_running=1 rollout.max_staleness=0 correction.promote_after=3"
CONTRADICTIONS = {
    "sft.ready=a/b": f'sft.ready: got "a/b", {BESIDE_WORLD}',
    "pairs.ready.path=p.json": 'pairs.ready: got {"path": "p.json", "split": "train", "limit": null, "on_b..., '
    f"{BESIDE_WORLD}",
    "gold={kind: function, path: 'a:b'}": f'gold: got {{"kind": "function", "path": "a:b"}}, {BESIDE_WORLD}',
    "pairs.behaviour=unknown": 'pairs.behaviour: got "unknown", need sft, since the pairs are sampled from it: '
    "remove it, or set pairs.ready",
    "pairs.num_pairs=2 pairs.heldout_share=0.9 reward.num_calibration=4": "pairs.num_pairs: got 2, need a pair to "
    "train on beside those held out (pairs.heldout_share 0.9): raise it, or lower pairs.heldout_share",
    "correction.num_pairs=19001": "correction.num_pairs: got 19001, need at most 19000, the training pairs: "
    "lower it, or raise pairs.num_pairs",
    "reward.num_calibration=40001": "reward.num_calibration: got 40001, "
    "need at most 40000, the responses of pairs.num_pairs 20000: lower it",
    "rollout.top_p=0.9": f"rollout.top_p: got 0.9, need 1 {BIASED}: set it to 1, or use strategy refit",
    "rollout.top_k=5": f"rollout.top_k: got 5, need 0 {BIASED}: set it to 0, or use strategy refit",
    "pairs.top_p=0.5": f"pairs.top_p: got 0.5, need 1 {BIASED}: set it to 1, or use strategy refit",
    "pairs.top_k=3": f"pairs.top_k: got 3, need 0 {BIASED}: set it to 0, or use strategy refit",
    "correction.promote_after=2 correction.max_lag=3": "correction.max_lag: got 3, "
    "need nothing beside correction.promote_after 2: remove one of the two",
    "correction.schedule=blocking correction.promote_after=2": f"correction.promote_after: got 2, {BLOCKING}",
    "correction.schedule=blocking correction.max_lag=2": f"correction.max_lag: got 2, {BLOCKING}",
    "correction.critic_on_promote=reinit": 'correction.critic_on_promote: got "reinit", '
    "need keep: only ppo has a critic: set it to keep",
    "correction.rm_init=sft": 'correction.rm_init: got "sft", '
    "need base or previous: the world's reward model is smaller than its SFT model: change it",
    "rollout.samples_per_prompt=1": "rollout.samples_per_prompt: got 1, "
    "need at least 2 for rloo, which compares the samples of a prompt: raise it, or use ppo",
    "rollout.samples_per_prompt=1 policy.algorithm=grpo": "rollout.samples_per_prompt: got 1, "
    "need at least 2 for grpo, which compares the samples of a prompt: raise it, or use ppo",
    "policy.num_minibatches=3": "policy.num_minibatches: got 3, need a divisor of the 128 samples of a step: "
    "change it, or rollout.prompts_per_step",
    "policy.num_minibatches=256": "policy.num_minibatches: got 256, need a divisor of the 128 samples of a step: "
    "change it, or rollout.prompts_per_step",
    "pools.policy.num_actors=2 pools.policy.gpus_per_actor=0.5": "pools.policy.gpus_per_actor: got 0.5, "
    "need 0 or 1: several ranks cannot share a GPU: change it",
    "pools.reward.num_refit_ranks=2 pools.reward.gpus_per_actor=0.5": "pools.reward.gpus_per_actor: got 0.5, "
    "need 0 or 1: several ranks cannot share a GPU: change it",
    "policy.offload=optimizer": "policy.zero_stage: got 0, need at least 1 with policy.offload optimizer: "
    "raise it, or change policy.offload",
    "policy.offload=all policy.zero_stage=2": "policy.zero_stage: got 2, need at least 3 with policy.offload all: "
    "raise it, or change policy.offload",
    "policy.offload=optimizer policy.zero_stage=1 pools.reward.refit_zero_stage=0": "pools.reward.refit_zero_stage: "
    "got 0, need at least 1 with policy.offload optimizer: raise it, or change policy.offload",
    "policy.deepspeed={bf16: {}, zero_optimization: {stage: 2}}": "policy.deepspeed: got "
    '{"bf16": {}, "zero_optimization": {"stage": 2}}, '
    "need nothing about bf16, zero_optimization.stage: other settings say it: remove it",
    "policy.kl_placement=loss": 'policy.kl_estimator: got "k1", '
    "need k2 or k3 with kl_placement loss: the gradient of k1 is zero on average: change it, or place it in the reward",
    "rollout.straggler=reissue rollout.max_staleness=0": 'rollout.straggler: got "reissue", '
    "need wait with max_staleness 0: a prompt issued again would be as late: change it, or raise max_staleness",
    "evaluation.num_prompts=1025": "evaluation.num_prompts: got 1025, need at most 1024, as data.num_heldout: "
    "lower it, or raise data.num_heldout",
    "evaluation.num_pair_prompts=1025": "evaluation.num_pair_prompts: got 1025, "
    "need at most 1024, as evaluation.num_prompts: lower it",
    "evaluation.num_samples_saved=1025": "evaluation.num_samples_saved: got 1025, "
    "need at most 1024, as evaluation.num_prompts: lower it",
    "world.num_prompts=1055": "world.num_prompts: got 1055, "
    "need 1056 (data.num_heldout and those of one step) to 116280 (all there are): change it, or data.num_heldout",
    "world.num_prompts=116281": "world.num_prompts: got 116281, "
    "need 1056 (data.num_heldout and those of one step) to 116280 (all there are): change it, or data.num_heldout",
    "world.reward_hidden_size=20": "world.reward_hidden_size: got 20, "
    "need a multiple of 32, the width of a head: change it",
    "world.policy_hidden_size=48": "world.policy_hidden_size: got 48, "
    "need a multiple of 32, the width of a head: change it",
    "rollout.max_new_tokens=12": "rollout.max_new_tokens: got 12, "
    "need 13 (its responses and EOS) to 124 (its models' context less the prompt) with world: change it",
    "rollout.max_new_tokens=125": "rollout.max_new_tokens: got 125, "
    "need 13 (its responses and EOS) to 124 (its models' context less the prompt) with world: change it",
    "correction.strategy=metarm rollout.samples_per_prompt=1 policy.algorithm=ppo": "rollout.samples_per_prompt: "
    "got 1, need at least 2: correction.strategy metarm learns from what a prompt's responses differ in: "
    "raise it, or use another strategy",
    "correction.strategy=relabel rollout.samples_per_prompt=1 policy.algorithm=ppo": "rollout.samples_per_prompt: "
    "got 1, need at least 2: correction.strategy relabel learns from what a prompt's responses differ in: "
    "raise it, or use another strategy",
    "correction.strategy=metarm policy.zero_stage=3": "policy.zero_stage: got 3, "
    "need 0 to 2 with correction.strategy metarm: lower it",
    "correction.strategy=metarm pools.reward.refit_zero_stage=3": "pools.reward.refit_zero_stage: got 3, "
    "need 0 to 2 with correction.strategy metarm: lower it",
    "correction.strategy=rlp_uml policy.zero_stage=3": "policy.zero_stage: got 3, "
    "need 0 to 2 with correction.strategy rlp_uml: lower it",
    "correction.rlp_spg.clusterer=nli": "correction.rlp_spg.model: got nothing, "
    "need a model for clusterer nli: name it, or use another clusterer",
    "correction.rlp_spg.model=a/b": 'correction.rlp_spg.model: got "a/b", '
    "need nothing with clusterer exact: remove it, or change the clusterer",
    "policy.algorithm=dpo": 'correction.strategy: got "ocrm", '
    "need none with policy.algorithm dpo: it uses no reward model: set it to none",
    "policy.algorithm=wpo correction.strategy=refit": 'correction.strategy: got "refit", '
    "need none with policy.algorithm wpo: it uses no reward model: set it to none",
    "reward.ensemble.aggregate=mean_minus_variance": "reward.ensemble.num_members: got 1, "
    "need at least 2: one member has no variance: raise it, or change the aggregate",
    "correction.strategy=shuffled rollout.top_p=0.9": f"rollout.top_p: got 0.9, "
    f"need 1 {BIASED.replace('ocrm', 'shuffled')}: set it to 1, or use strategy refit",
    "pools.policy.colocate_with=policy": f'pools.policy.colocate_with: got "policy", {ANOTHER_POOL}',
    "pools.policy.colocate_with=reward pools.reward.colocate_with=scoring": "pools.policy.colocate_with: "
    f'got "reward", {ANOTHER_POOL}',
    "pools.policy.colocate_with=reward pools.policy.strategy=spread": 'pools.policy.strategy: got "spread", '
    "need pack beside colocate_with: the strategy of reward counts: remove it",
    "pools.policy.resources.GPU=1": 'pools.policy.resources: got {"GPU": 1.0}, need custom resources: '
    "use cpus_per_actor and gpus_per_actor for others",
    "pools.reward.labels.zone=in()": 'pools.reward.labels: got {"zone": "in()"}, '
    "need VALUE, !VALUE, in(A,B) or !in(A,B) for each: correct it",
    "pools.scoring.gpus_per_actor=2": f"pools.scoring.gpus_per_actor: got 2.0, {WHOLE_GPUS}",
    "pools.generation.gpus_per_actor=1.5": f"pools.generation.gpus_per_actor: got 1.5, {WHOLE_GPUS}",
    "pools.generation.sleeps=true rollout.max_staleness=0": "pools.generation.sleeps: got true, "
    "need false without GPUs: an engine on CPU keeps its memory: set it to false",
    "pools.generation.sleeps=true pools.generation.gpus_per_actor=1": "rollout.max_staleness: got 1, "
    "need 0 with pools.generation.sleeps: a sleeping engine samples nothing ahead: "
    "set it to 0, or pools.generation.sleeps to false",
    "pools.generation.sleeps=true pools.generation.gpus_per_actor=1 rollout.max_staleness=0 policy.algorithm=wpo "
    "correction.strategy=none": "pools.generation.sleeps: got true, "
    "need false with wpo: nobody waits for its samples: set it to false",
    "pools.evaluation.num_actors=2": "pools.evaluation.num_actors: got 2, need 1: one actor evaluates: remove it",
    f"{DETERMINISTIC} pools.reward.dtype=bfloat16": 'pools.reward.dtype: got "bfloat16", '
    "need float32 with deterministic: true: change it",
    f"{DETERMINISTIC} pools.policy.gpus_per_actor=1": "pools.policy.gpus_per_actor: got 1.0, "
    "need 0 with deterministic: true: on GPUs the order of sums varies: set it to 0",
    f"{DETERMINISTIC} pools.generation.max_running=2": "pools.generation.max_running: got 2, "
    "need 1 with deterministic: true: what is decoded together changes its rounding: set it to 1",
    f"{DETERMINISTIC} rollout.max_staleness=1": "rollout.max_staleness: got 1, "
    "need 0 with deterministic: true: else timing decides which rollouts a step takes: set it to 0",
    f"{DETERMINISTIC} correction.promote_after=null": "correction.promote_after: got nothing, "
    "need a number of updates with deterministic: true: else timing decides when a refit goes live: "
    "set it, or set correction.schedule: blocking",
    f"{DETERMINISTIC} correction.promote_after=null correction.max_lag=2": "correction.promote_after: got nothing, "
    "need a number of updates with deterministic: true: else timing decides when a refit goes live: "
    "set it in place of correction.max_lag, or set correction.schedule: blocking",
}


def test_everything_that_determinism_needs_is_told_at_once() -> None:
    told = contradictions(config_of(WORLD, "deterministic=true", "rollout.straggler=reissue"))
    assert [problem.path for problem in told] == [
        "pools.generation.max_running",
        "rollout.max_staleness",
        "rollout.straggler",
        "correction.promote_after",
    ]
    assert told[2].need == "wait with deterministic: true"


@pytest.mark.parametrize("overrides", CONTRADICTIONS)
def test_a_contradiction_is_told(overrides: str) -> None:
    parts = [overrides] if "{" in overrides else overrides.split()
    assert lines(contradictions(config_of(WORLD, *parts))) == [CONTRADICTIONS[overrides]]


WITHOUT_WORLD = {
    "data.prompts=null": "data.prompts: got nothing, need prompts, or the embedded world: set it, or set world: {}",
    "sft.base=null": "sft.base: got nothing, need a model to start from: set it, or sft.ready",
    "sft.ready=model": 'sft.base: got "model", need nothing beside sft.ready: remove one of the two',
    "reward.ready=rm reward.base=rm": 'reward.base: got "rm", need nothing beside reward.ready: remove one of the two',
    "gold=null": "gold: got nothing, need a gold reward that labels the sampled pairs, or ready pairs: "
    "set gold or pairs.ready",
    "pairs.ready.path=p.json pairs.behaviour=unknown": 'pairs.behaviour: got "unknown", '
    "need the model that wrote the pairs, for correction.strategy ocrm: "
    "name it, set pairs.allow_unknown_behaviour: true, or use strategy refit",
    "gold=null pairs.ready.path=p.json correction.strategy=relabel": 'correction.strategy: got "relabel", '
    "need a gold reward for fresh labels: set gold, or use another strategy",
    "pairs.ready.path=p.json pairs.behaviour=a/b policy.algorithm=dpo correction.strategy=none": "pairs.behaviour: "
    'got "a/b", need sft or unknown: the offline policy is compared with its start: change it, '
    "or use another algorithm",
    "reward.ready=rm reward.ensemble.num_members=2": 'reward.ready: got "rm", '
    "need nothing beside reward.ensemble: its members are trained: remove it, or set num_members: 1",
}


@pytest.mark.parametrize("overrides", WITHOUT_WORLD)
def test_a_contradiction_without_the_world_is_told(overrides: str) -> None:
    assert lines(contradictions(config_of(MODELS, *overrides.split()))) == [WITHOUT_WORLD[overrides]]


@pytest.mark.parametrize(
    "overrides",
    [
        "rollout.top_p=0.9 correction.strategy=refit",
        "correction.rm_init=sft correction.strategy=none",
        "correction.strategy=wpo_bt rollout.top_p=0.9",
        "correction.strategy=relabel policy.zero_stage=3",
        "correction.strategy=rlp_spg correction.rlp_spg.clusterer=nli correction.rlp_spg.model=a/b",
        "reward.ensemble.num_members=2 reward.ensemble.aggregate=mean_minus_variance",
        "policy.algorithm=wpo correction.strategy=none policy.num_minibatches=3 policy.kl_placement=loss",
        "policy.algorithm=dpo correction.strategy=none rollout.samples_per_prompt=1",
        "rollout.samples_per_prompt=1 policy.algorithm=ppo correction.critic_on_promote=reinit",
        "policy.kl_placement=loss policy.kl_estimator=k3",
        "policy.kl_placement=loss policy.kl_coefficient=0",
        "correction.promote_after=3",
        "policy.num_minibatches=128",
        "pools.generation.gpus_per_actor=4 pools.policy.gpus_per_actor=1 pools.policy.num_actors=4",
        "pools.policy.colocate_with=generation pools.generation.strategy=strict_pack",
        "pools.policy.resources.policy=0.01 pools.policy.labels.zone='!in(a,b)' pools.policy.labels.kind=gpu",
        "rollout.straggler=reissue",
        DETERMINISTIC,
        f"{DETERMINISTIC} correction.promote_after=null correction.schedule=blocking",
        "deterministic=true pools.generation.max_running=1 policy.algorithm=wpo correction.strategy=none",
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


@pytest.mark.parametrize("name", ["gone", "prompts.jsonl", "model/gone"])
def test_a_missing_model_is_told(name: str) -> None:
    assert lines(inspect(config_of(MODELS, f"sft.base={name}"))) == [
        f'sft.base: got "{name}", no folder with a config.json, need a model folder or a Hub name org/name: '
        "correct the path"
    ]


def test_a_hub_name_is_not_looked_up() -> None:
    assert inspect(config_of(MODELS, "sft.base=org/name")) == []


def test_pickle_weights_are_refused_and_a_missing_tokenizer_is_told(workplace: Path) -> None:
    (workplace / "model" / "model.safetensors").rename(workplace / "model" / "pytorch_model.bin")
    (workplace / "model" / "tokenizer.json").unlink()
    assert lines(inspect(config_of(MODELS))) == [
        'sft.base: got "model" with no tokenizer, need its files beside the weights: save it there',
        'sft.base: got "model" with no safetensors weights, need whole safetensors files (pickles can run code): '
        "save it again (save_pretrained)",
    ]


def test_weights_that_end_early_or_miss_a_shard_are_told(workplace: Path) -> None:
    weights = workplace / "model" / "model.safetensors"
    write_weights(weights, missing_bytes=1)
    do = "need whole safetensors files (pickles can run code): save it again (save_pretrained)"
    assert lines(inspect(config_of(MODELS))) == [
        f'sft.base: got "model" with model.safetensors missing or incomplete, {do}'
    ]
    write_weights(weights)
    index = {"weight_map": {"weight": "model.safetensors", "other": "other.safetensors"}}
    (workplace / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert lines(inspect(config_of(MODELS))) == [
        f'sft.base: got "model" with other.safetensors missing or incomplete, {do}'
    ]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("sft.base=rm", 'sft.base: got "rm" with a LlamaForSequenceClassification, need ForCausalLM'),
        ("reward.ready=model", 'reward.ready: got "model" with a LlamaForCausalLM, need ForSequenceClassification'),
        (
            "gold={kind: classifier, model: model}",
            'gold.model: got "model" with a LlamaForCausalLM, need ForSequenceClassification',
        ),
    ],
)
def test_models_of_the_wrong_kind_are_told(override: str, line: str) -> None:
    assert lines(inspect(config_of(MODELS, override))) == [f"{line}: choose another model"]


def test_a_reward_model_of_two_labels_is_told(workplace: Path) -> None:
    write_reward_model(workplace / "two", num_labels=2)
    assert lines(inspect(config_of(MODELS, "reward.ready=two"))) == [
        'reward.ready: got "two" with 2 labels, need one label (a score): choose one with num_labels 1'
    ]


def test_a_clusterer_that_is_not_there_is_told_and_a_shorter_context_is_not(workplace: Path) -> None:
    write_model(workplace / "encoder", "BertModel", max_position_embeddings=8)
    overrides = ["correction.strategy=rlp_spg", "correction.rlp_spg.clusterer=encoder"]
    assert inspect(config_of(MODELS, *overrides, "correction.rlp_spg.model=encoder")) == []
    assert lines(inspect(config_of(MODELS, *overrides, "correction.rlp_spg.model=gone"))) == [
        'correction.rlp_spg.model: got "gone", no folder with a config.json, need a model folder or a Hub name '
        "org/name: correct the path"
    ]


def test_vocabularies_that_differ_are_told(workplace: Path) -> None:
    write_reward_model(workplace / "swapped", tokens=("b", "a"))
    write_reward_model(workplace / "larger", tokens=("a", "b", "c"))
    (write_reward_model(workplace / "mute", tokens=("a",)) / "tokenizer.json").unlink()
    for name in ("swapped", "larger", "mute"):
        assert lines(inspect(config_of(MODELS, f"reward.base={name}"))) == [
            f'reward.base: got "{name}" with another vocabulary, need the policy\'s token ids: '
            "choose a model of the same family"
        ]


def test_the_refit_cannot_start_from_an_sft_model_of_another_shape() -> None:
    overrides = ["reward.base=rm", "correction.rm_init=sft"]
    assert lines(inspect(config_of(MODELS, *overrides))) == [
        'correction.rm_init: got "sft", need base or previous: SFT and reward model differ (hidden_size 64 and 32): '
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
        "data.prompts.path=gone.jsonl": "data.prompts.path: got 'gone.jsonl', which does not exist, "
        "need a JSON, JSONL or Parquet file or a Hub data set: correct the path",
        "data.prompts.path=empty.jsonl": "data.prompts.path: got 'empty.jsonl', which has no rows, "
        "need at least one row: name a data set with rows",
        "data.prompts.path=broken.jsonl": "data.prompts.path: got 'broken.jsonl', broken at line 2: Expecting value, "
        "need a readable JSON, JSONL or Parquet file: repair the file",
        "data.num_heldout=5": "data.num_heldout: got 5 with 6 prompts in prompts.jsonl, "
        "need 2 prompts left for a step: lower it, or add prompts",
        "data.prompts.limit=3": "data.num_heldout: got 2 with 3 prompts in prompts.jsonl, "
        "need 2 prompts left for a step: lower it, or add prompts",
        "pairs.ready.path=gone.json": "pairs.ready.path: got 'gone.json', which does not exist, "
        "need a JSON, JSONL or Parquet file or a Hub data set: correct the path",
        "pairs.ready.path=prompts.jsonl": "pairs.ready.path: got columns prompt, output, need columns chosen and "
        "rejected, with prompt, messages or a shared beginning: rename the columns",
    }.items():
        assert lines(inspect(config_of(MODELS, override))) == [line]


def test_a_gold_function_is_looked_for_without_running_it(workplace: Path) -> None:
    (workplace / "mygold").mkdir()
    (workplace / "mygold" / "__init__.py").write_text("raise AssertionError('executed')")
    (workplace / "mygold" / "score.py").write_text("raise AssertionError('executed')")
    assert inspect(config_of(MODELS, "gold.path=mygold.score:f")) == []
    for path in ("yourgold.score:f", "mygold.score"):
        assert lines(inspect(config_of(MODELS, f"gold.path={path}"))) == [
            f'gold.path: got "{path}", need package.module:function, of this environment or folder: '
            "correct it, or install it"
        ]


JUDGE = MODELS.replace("{kind: function, path: 'json:loads'}", "{kind: judge, base_url: 'https://h/v1', model_name: m}")


def test_a_judge_is_checked_without_asking_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIBUNAL_KEY", "k")
    monkeypatch.delenv("NO_KEY", raising=False)
    for sound in (
        "gold.base_url=http://[::1]:8000",
        "gold.base_url=http://vllm.local/v1/",
        "gold.api_key_env=TRIBUNAL_KEY",
    ):
        assert inspect(config_of(JUDGE, sound)) == []
    for url in ("h/v1", "ftp://h", "https://user:word@h/v1", "https://h/v1?key=x", "https:///v1"):
        assert lines(inspect(config_of(JUDGE, f"gold.base_url={url}"))) == [
            f'gold.base_url: got "{url}", need http(s)://HOST[:PORT][/PATH], without user, query or fragment: '
            "correct it"
        ]
    assert lines(inspect(config_of(JUDGE, "gold.api_key_env=NO_KEY", "gold.cache_file=prompts.jsonl/a"))) == [
        "gold.api_key_env: got no such variable, or one whose value is no key, need the name of an environment "
        "variable that holds the key: export it, or set null for no key",
        'gold.cache_file: got "prompts.jsonl", need a folder that can be written (prompts.jsonl is none): change it',
    ]


def test_only_what_changes_a_judges_answers_makes_other_stages() -> None:
    config = config_of(JUDGE)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(dump_yaml(config))
    calm = ["concurrency=2", "num_retries=0", "timeout_s=1", "cache_file=a", "input_price=1", "output_price=2"]
    same = config_of(JUDGE, *(f"gold.{change}" for change in calm))
    assert inspect(same) == []
    assert stage_settings(same, "pairs") == stage_settings(config, "pairs")
    for change in ("model_name=o", "base_url=http://o", "parameters.top_p=0.5"):
        other = config_of(JUDGE, f"gold.{change}")
        assert [problem.path for problem in inspect(other)] == ["name"]
        assert stage_settings(other, "pairs") != stage_settings(config, "pairs")


def test_output_folders_that_cannot_be_written_are_told(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    (workplace / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    overrides = ["output_dir=prompts.jsonl/x", "stages_dir=locked/x"]
    assert lines(inspect(config_of(WORLD, *overrides))) == [
        'output_dir: got "prompts.jsonl/x", need a folder that can be written (prompts.jsonl is none): change it',
        'stages_dir: got "locked/x", need a folder that can be written (locked is none): change it',
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


def test_a_run_that_has_measured_the_sft_models_gold_goes_on_with_as_many_prompts() -> None:
    config = config_of(WORLD)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(dump_yaml(config))
    other = config_of(WORLD, "evaluation.num_prompts=128")
    assert inspect(other) == []
    (config.run_dir / "sft_gold.json").write_text("{}")
    assert inspect(other) == [], "without a checkpoint it starts over"
    (config.run_dir / "checkpoints" / "step-4").mkdir(parents=True)
    assert lines(inspect(other)) == [
        'name: got "trial", whose folder runs/trial was made with evaluation.num_prompts 1024 (now 128), '
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
    gpu_do = "lower gpus_per_actor, or set RAY_ADDRESS to a cluster"
    assert lines(inspect(config_of(WORLD, "pools.policy.cpus_per_actor=4"))) == [
        "pools: got 4.6 CPUs (generation 0.1, policy 4, scoring 0.2, reward 0.2, evaluation 0.1), "
        f"need at most 4 (this machine's): {do}"
    ]
    assert lines(inspect(config_of(WORLD, "pools.policy.gpus_per_actor=0.5", "pools.reward.gpus_per_actor=1"))) == [
        f"pools: got 2.5 GPUs (policy 0.5, reward 2), need at most 0 (this machine's): {gpu_do}"
    ]
    assert lines(inspect(config_of(WORLD, "pools.generation.kv_cache_gib=100"))) == [
        "pools: got 106.27 GiB of memory (generation 102.5, policy 0.61, scoring 1.08, reward 1.08, evaluation 0.5, "
        "ray 0.5), need at most 32 (this machine's): "
        "use smaller models, bfloat16, fewer actors, a smaller kv_cache_gib"
    ]


def test_a_cluster_is_not_measured_by_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "cluster:6379")
    assert inspect(config_of(WORLD, "pools.policy.cpus_per_actor=400", "pools.policy.gpus_per_actor=8")) == []


def test_memory_follows_its_formula() -> None:
    overrides = ["pools.scoring.num_actors=2", "pools.scoring.dtype=bfloat16", "policy.algorithm=ppo"]
    config = config_of(WORLD, *overrides, "policy.micro_batch_tokens=10")
    memory = memory_gib(config, NetworkSizes(policy=GIB, reward=GIB // 2, vocabulary=1000))
    longest = 4 + 64  # words of a prompt, rollout.max_new_tokens: such a sequence goes alone
    logits, scoring_logits, exports = 2 * 4 * longest * 1000 / GIB, 4 * 16384 * 1000 / GIB, 2 * 4
    assert memory == pytest.approx(
        {
            "generation": 2.5 + 3 * 4 + 1,
            "policy": 0.5 + 16 * 1.5 + logits + exports,
            "scoring": 2 * (0.5 + 2 + scoring_logits) + (0.5 + 2 * 2 + scoring_logits),
            "reward": (0.5 + 2 * 4 * 0.5) + (0.5 + 16 * 0.5),
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
        "base: {world: {}, evaluation: {num_prompts: 2000}, correction: {max_lag: 1}}\n"
        "arms: {a: {}, b: {correction.promote_after: 1}, c: {pairs.temperature: 0.5}}"
    )
    assert lines(study_problems(load_study_config(Path("s.yaml"), []))) == [
        "base.evaluation.num_prompts: got 2000, need at most 1024, as data.num_heldout: "
        "lower it, or raise data.num_heldout",
        "arms.b.correction.max_lag: got 1, need nothing beside correction.promote_after 1: remove one of the two",
        "arms.c.pairs.temperature: got 0.5, need 1.0, as in the first arm: "
        "move it to base, or name the arm in own_stages: the arms share the stages in runs/s/shared",
    ]


def test_a_study_with_another_definition_of_an_arm_that_has_begun_is_refused() -> None:
    text = "name: s\nseeds: [1]\nbase: {{world: {{}}}}\narms: {{a: {{}}, b: {{policy.kl_coefficient: {}}}}}"
    Path("s.yaml").write_text(text.format(0.1))
    begun = next(config for arm, _, config in study_runs(load_study_config(Path("s.yaml"), [])) if arm == "b")
    begun.run_dir.mkdir(parents=True)
    (begun.run_dir / "config.yaml").write_text(dump_yaml(begun))
    assert study_problems(load_study_config(Path("s.yaml"), [])) == []
    assert study_problems(load_study_config(Path("s.yaml"), ["base.rollout.temperature=0.5"])) == [], "no step is done"
    (begun.run_dir / "checkpoints" / "step-4").mkdir(parents=True)
    for harmless in ("pools.generation.max_running=4", "checkpoint.every=7", "policy.micro_batch_tokens=64"):
        assert study_problems(load_study_config(Path("s.yaml"), [f"base.{harmless}"])) == []
    Path("s.yaml").write_text(text.format(0.3))
    (found,) = lines(study_problems(load_study_config(Path("s.yaml"), [])))
    made = "whose folder runs/s/b/seed-1 was made with policy.kl_coefficient 0.1 (now 0.3)"
    assert found.startswith(f'name: got "seed-1", {made}, need a run folder of its own')


def test_arms_of_a_study_may_differ_in_strategy_algorithm_and_ensemble() -> None:
    Path("s.yaml").write_text(
        "name: s\nseeds: [1]\nbase: {world: {}}\n"
        "arms: {ocrm: {}, metarm: {correction.strategy: metarm}, "
        "dpo: {policy.algorithm: dpo, correction.strategy: none}, "
        "ensemble: {reward.ensemble: {num_members: 3, aggregate: worst, variance_coefficient: 0.5}}}"
    )
    assert study_problems(load_study_config(Path("s.yaml"), [])) == []
