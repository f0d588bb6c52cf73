"""The memory model against what torch saves, what models hold, and counts by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import EOS, build_policy, llama_config, pad_batch

from actors.placement import Node, cluster_problems, plan_bundles
from ocrm_ray.cli import main
from ocrm_ray.config import RunConfig
from ocrm_ray.config_file import load_run_config
from ocrm_ray.inspection import network_sizes
from ocrm_ray.memory import (
    GIB,
    Layers,
    NetworkSizes,
    Training,
    export_bytes,
    gpu_demands,
    layers_of,
    memory_lines,
    memory_ranks,
    running_sequences,
    saved_bytes,
)
from ocrm_ray.model_folders import read_shape
from ocrm_ray.networks import ScalarModel, checkpoint_layers
from ocrm_ray.records import Sequence

ROOT = Path(__file__).parent.parent
WIDE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "num_attention_heads": 4}
SEQUENCES = [Sequence((3, 4, first), (5, 6, 7, 8, EOS), True) for first in range(5, 25)]  # none is padded
SHAPES = {"grouped keys": {"num_key_value_heads": 2}, "wide heads": {"num_key_value_heads": 4, "head_dim": 64}}


def saved_by_torch(model, batch):
    """Bytes that autograd keeps for the way back, every storage once, without the weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found = {}

    def keep(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = model(batch)
    assert scores.requires_grad
    return sum(size for pointer, (size, _) in found.items() if pointer not in own)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_layers_save_is_within_one_percent_of_what_torch_saves(shape, checkpointing, dtype):
    from transformers import LlamaForSequenceClassification

    config = llama_config(**WIDE, **SHAPES[shape], num_labels=1, pad_token_id=EOS)
    model = ScalarModel(LlamaForSequenceClassification(config).to(getattr(torch, dtype)))
    if checkpointing:
        checkpoint_layers(model)
    batch = pad_batch(SEQUENCES, EOS)
    num_tokens = batch.tokens.numel()
    layers = layers_of(config.to_dict())
    predicted = saved_bytes(layers, Training(dtype, 0, 1, checkpointing, num_tokens))
    if checkpointing:  # the layer that is computed again is not there yet
        whole, ends = (
            saved_bytes(replace(layers, num_layers=number), Training(dtype, 0, 1, False, num_tokens))
            for number in (1, 0)
        )
        predicted -= whole - ends
    measured = saved_by_torch(model, batch)
    assert predicted == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("tied", [False, True])
def test_a_config_alone_counts_the_parameters_of_the_network_that_it_describes(tmp_path, tied):
    network = build_policy(**WIDE, tie_word_embeddings=tied, num_key_value_heads=2)
    network.config.save_pretrained(tmp_path)
    facts, problems = read_shape("assumed.policy", tmp_path, "policy")
    assert problems == []
    assert facts.num_parameters == sum(parameter.numel() for parameter in network.parameters())
    assert layers_of(facts.settings) == Layers(6, 128, 128, 64, 352, 4)
    scored, _ = read_shape("assumed.reward", tmp_path, "reward")
    assert scored.num_parameters == sum(parameter.numel() for parameter in network.base_model.parameters()) + 128


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "no such"}'])
def test_a_folder_without_a_sound_config_is_told(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    facts, (problem,) = read_shape("assumed.policy", tmp_path, "policy")
    assert facts is None
    assert (problem.path, problem.need) == ("assumed.policy", "a folder with the config.json of such a model")


def test_widths_are_read_under_the_names_of_several_families():
    gpt2 = {"n_embd": 64, "n_layer": 3, "n_head": 4}
    assert layers_of(gpt2) == Layers(3, 64, 64, 64, 256, 4)
    nested = {"text_config": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 48}}
    assert layers_of(nested) == Layers(2, 64, 96, 96, 256, 2)
    assert layers_of({"d_model": 64}) is None


LAYERS = Layers(2, 100, 100, 50, 400, 4)
SIZES = NetworkSizes(10**6, 10**5, 1000, 0, LAYERS, Layers(1, 10, 10, 10, 40, 1))


def config_of(**sections):
    tree = {"data": {"max_prompt_tokens": 100}, "rollout": {"max_new_tokens": 28, "samples_per_prompt": 2}}
    return RunConfig.model_validate({"name": "trial", **tree, **sections})


def ranks_of(sizes=SIZES, **sections):
    return {rank.role: rank for rank in memory_ranks(config_of(**sections), sizes)}


def test_every_kind_of_process_is_there_with_its_number():
    pools = {"policy": {"num_actors": 4}, "scoring": {"num_actors": 3}}
    pools |= {"reward": {"num_actors": 2, "num_refit_ranks": 5}}
    generation = {"num_actors": 2, "gpus_per_actor": 4}
    ranks = ranks_of(pools={**pools, "generation": generation}, policy={"algorithm": "ppo"})
    assert {role: rank.num_ranks for role, rank in ranks.items()} == {
        "engine": 8, "policy": 4, "critic": 4, "scorer": 3, "pair scorer": 1, "reward server": 2, "refit": 5,
        "evaluation": 1,
    }  # fmt: skip
    assert "refit" not in ranks_of(correction={"strategy": "none"}, reward={"ready": "rm"})


def test_scorers_and_servers_hold_as_many_networks_as_a_correction_needs():
    def weights(role, **correction):
        return ranks_of(correction=correction)[role].parts["weights"] / (4e5 if role == "reward server" else 4e6)

    assert [weights("scorer", kl_reference=kind) for kind in ("sft", "moving")] == [1, 3]
    assert [weights("pair scorer", strategy=kind) for kind in ("refit", "ocrm")] == [1, 2]
    assert [weights("reward server", strategy=kind) for kind in ("none", "ocrm")] == [1, 2]


def test_ranks_share_what_their_stage_splits():
    def total(zero_stage, num_ranks):
        parts = Training("bfloat16", zero_stage, num_ranks, False, 0).parts(10**9, None)
        return {part: size / 1e9 for part, size in parts.items() if part != "activations"}

    assert total(2, 4) == {"weights": 2, "gradients": 1, "masters": 1, "moments": 2}
    assert total(3, 4) == {"weights": 0.5, "gradients": 1 + 2 * 0.5, "masters": 1, "moments": 2}
    assert total(0, 4) == {"weights": 2, "gradients": 6, "masters": 1, "moments": 2}


def test_ranks_of_a_refit_share_the_reward_model_by_their_own_stage_or_else_the_policys():
    def refit(num_ranks, zero_stage, own=None):
        pool = {"num_refit_ranks": num_ranks, "refit_zero_stage": own}
        parts = ranks_of(pools={"reward": pool}, policy={"zero_stage": zero_stage})["refit"]
        return parts.parts["weights"], parts.parts["masters"], parts.parts["moments"]

    assert refit(1, 2) == (4e5, 4e5, 8e5)
    assert refit(4, 2) == (4e5, 1e5, 2e5)
    assert refit(4, 3) == (1e5, 1e5, 2e5)
    assert refit(4, 3, own=2) == (4e5, 1e5, 2e5)


def test_an_engines_cache_is_what_is_left_of_its_share_and_holds_so_many_sequences():
    pools = {"generation": {"gpus_per_actor": 2, "gpu_memory_share": 0.5, "dtype": "bfloat16", "max_running": 7}}
    config = config_of(pools=pools, assumed={"gpu_gib": 10})
    engine = ranks_of(pools=pools, assumed={"gpu_gib": 10})["engine"]
    assert engine.total == 5 * GIB
    assert engine.parts["weights"] == 10**6
    of_sequence = 128 * 2 * 2 * 50 * 2
    assert running_sequences(config, SIZES) == int(2 * engine.parts["KV cache"] / of_sequence)
    assert memory_lines(config, SIZES)[-1].endswith("of the longest sequences, max_running is 7")


def test_a_trainer_may_have_what_sleeping_engines_leave():
    pools = {"generation": {"gpus_per_actor": 0.5}, "policy": {"gpus_per_actor": 0.25, "colocate_with": "generation"}}
    rooms = {}
    for sleeps in (False, True):
        pools["generation"]["sleeps"] = sleeps
        config = config_of(pools=pools, assumed={"gpu_gib": 8})
        rooms[sleeps] = {role: room for role, _, room in gpu_demands(config, memory_ranks(config, SIZES))}
    assert (rooms[False]["policy"], rooms[True]["policy"]) == (2, 6)
    assert rooms[False]["engine"] == rooms[True]["engine"] == 4


def test_what_is_too_much_for_a_gpu_is_told_with_policy_and_critic_as_one():
    pools = {"policy": {"gpus_per_actor": 1}, "scoring": {"gpus_per_actor": 0.5, "dtype": "bfloat16"}}
    config = config_of(pools=pools, policy={"algorithm": "ppo"}, assumed={"gpu_gib": 8})
    sizes = NetworkSizes(5 * 10**8, 10**7, 1000)
    demands = {role: (asked, room) for role, asked, room in gpu_demands(config, memory_ranks(config, sizes))}
    ranks = {rank.role: rank for rank in memory_ranks(config, sizes)}
    assert demands["policy"] == ((ranks["policy"].total + ranks["critic"].total) / GIB, 8)
    assert demands["scorer"][1] == 4
    lines = memory_lines(config, sizes)
    assert "memory: fits GPUs of 8 GiB (assumed.gpu_gib)" in lines
    too_small = config.model_copy(update={"assumed": config.assumed.model_copy(update={"gpu_gib": 1.0})})
    (line,) = [line for line in memory_lines(too_small, sizes) if line.startswith("memory: ")]
    assert line == (
        "memory: too much for GPUs of 1 GiB (assumed.gpu_gib): policy 8 GiB of 1, scorer 1 GiB of 0, "
        "pair scorer 2 GiB of 0"
    )
    offloads = config.model_copy(update={"policy": config.policy.model_copy(update={"offload": "optimizer"})})
    assert "memory: fits GPUs of 8 GiB (assumed.gpu_gib) without policy.offload" in memory_lines(offloads, sizes)


def test_exports_are_as_large_as_what_is_exported(tmp_path):
    network = build_policy(**WIDE, tie_word_embeddings=True)
    exported = sum(tensor.nbytes for tensor in network.state_dict().values())
    network.config.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    facts, _ = read_shape("assumed.policy", tmp_path, "policy")
    sizes = NetworkSizes(facts.num_parameters, 0, 32, tied_head=settings["vocab_size"] * settings["hidden_size"])
    assert export_bytes(config_of(), sizes) == exported


CLUSTERS = {"1x8": (8, 1.24e9), "4x8": (32, 8.03e9), "64": (64, 70.6e9)}


@pytest.mark.parametrize("name", CLUSTERS)
def test_an_example_cluster_is_checked_without_its_models_and_nothing_waits_on_it(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RAY_ADDRESS", "cluster:6379")
    path = ROOT / "configs" / "clusters" / f"{name}.yaml"
    assert main(["check", str(path)]) == 0
    out = capsys.readouterr().out
    config, (num_gpus, num_parameters) = load_run_config(path, []), CLUSTERS[name]
    sizes = network_sizes(config)
    assert sizes.policy == pytest.approx(num_parameters, rel=0.01)
    bundles = [bundle for of_pool in plan_bundles(config.pools).values() for bundle in of_pool]
    assert sum(bundle["GPU"] for bundle in bundles) == num_gpus
    nodes = [Node(str(number), *[{"CPU": 64.0, "GPU": 8.0}] * 2) for number in range(num_gpus // 8)]
    assert cluster_problems(config.pools, nodes) == []
    assert f"memory: fits GPUs of {config.assumed.gpu_gib:g} GiB" in out
    assert "they keep up and nothing waits" in out
    assert "predicted step: " in out
