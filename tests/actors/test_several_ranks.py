"""Training on several ranks, real processes that talk by gloo, against training on one: this process."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from rank_processes import rank_processes
from safetensors.torch import load_file
from tiny_models import (
    EOS,
    build_policy,
    random_pairs,
    run_config,
    save_pairs,
    save_policy,
    save_reward_model,
    scored_rollout,
)

from actors.policy import PolicyActor
from ocrm_ray.batches import SequenceTable
from ocrm_ray.config import Pool
from ocrm_ray.networks import CausalModel, table_logprobs
from ocrm_ray.records import Sequence

pytestmark = pytest.mark.real

SPREAD = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""At ZeRO 3 DeepSpeed would leave tensors this small whole on every rank."""
FIGURES = ("loss", "grad_norm", "entropy", "clip_share", "logprob_gap", "truncated_share", "value_loss")


@pytest.fixture(scope="module")
def two_ranks():
    with rank_processes(2) as ranks:
        yield ranks


def replayed(num_updates=3):
    """Rollouts of five prompts with three responses each, of very different lengths; one of them without EOS."""
    random, model = np.random.default_rng(8), CausalModel(build_policy())
    steps = []
    for version in range(num_updates):
        step = []
        for prompt in range(5):
            sequences = []
            for sample in range(3):
                words = random.integers(3, 30, random.integers(1, 5 + 5 * prompt)).tolist()
                is_whole = (prompt, sample) != (1, 2)
                sequences.append(Sequence((5, 6 + prompt), (*words, EOS) if is_whole else tuple(words), is_whole))
            table = SequenceTable(sequences, EOS, share_prompts=False)
            found = table_logprobs(model, table, 1.0, Pool())
            logprobs = [row + random.normal(0, 0.1, len(row)).astype(np.float32) for row in found]
            rewards = random.normal(0, 1, 3).tolist()
            step.append(scored_rollout(sequences, logprobs, rewards, sampled_at=(version, version)))
        steps.append(step)
    return steps


def make_actor(folder, stage, checkpoint=None, dtype="float32", **policy):
    """A trainer over the models in ``folder``; called by every rank."""
    policy = {"learning_rate": 1e-4, "micro_batch_size": 3, "deepspeed": SPREAD, "zero_stage": stage} | policy
    rollout = {"missing_eos": "mask"}
    config = run_config(folder, policy=policy, rollout=rollout, pools={"policy": {"dtype": dtype}})
    reward = str(folder / "rm") if policy.get("algorithm") == "ppo" else None
    actor = PolicyActor(config, str(folder / "sft"), reward, config.run_dir, folder / "exports", checkpoint=checkpoint)
    actor.start()
    return actor


def exported(actor):
    """On rank 0."""
    weights = actor.export_weights()
    return None if weights is None else load_file(weights.path)


def updates(folder, stage, policy, dtype="float32"):
    actor = make_actor(folder, stage, dtype=dtype, **policy)
    reports = [asdict(actor.update(rollouts)) for rollouts in replayed()]
    answer = reports, actor.logprobs([Sequence((5, 6), (8, 9, EOS), True)] * 3), exported(actor)
    actor.close()
    return answer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_policy(folder / "sft")
    save_reward_model(folder / "rm")
    save_pairs(run_config(folder), random_pairs(16, seed=1))
    return folder


POLICIES = {
    "rloo": {"algorithm": "rloo"},
    "ppo": {"algorithm": "ppo", "num_epochs": 2, "num_minibatches": 3, "critic_learning_rate": 1e-4},
    "grpo": {"algorithm": "grpo", "kl_placement": "loss", "kl_estimator": "k3", "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def alone(models):
    """What one rank does without ZeRO."""
    return {name: updates(models, 0, policy) for name, policy in POLICIES.items()}


def assert_close(weights, expected, atol):
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name].float(), tensor.float(), atol=atol, rtol=0)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("algorithm", POLICIES)
def test_three_updates_on_two_ranks_are_those_of_one_and_so_is_what_is_exported(
    two_ranks, models, alone, stage, algorithm
):
    expected, expected_logprobs, expected_weights = alone[algorithm]
    start = load_file(models / "sft" / "model.safetensors")
    assert min(float((expected_weights[name] - start[name]).abs().max()) for name in start) > 1e-4
    answers = two_ranks.run(updates, models, stage, POLICIES[algorithm])
    for reports, logprobs, weights in answers:
        for report, reference in zip(reports, expected, strict=True):
            for name in FIGURES:
                if reference[name] is None:
                    assert report[name] is None
                else:
                    assert report[name] == pytest.approx(reference[name], rel=1e-5, abs=1e-5), name
        np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-4)
        if weights is not None:
            assert_close(weights, expected_weights, atol=1e-5)
    assert [weights is None for *_, weights in answers] == [False, True]
