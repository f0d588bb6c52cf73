"""Fitting SFT and reward models on two ranks, real processes that talk by gloo, against one: this process."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_several_ranks import SPREAD
from tiny_models import random_pairs, run_config, save_pairs, save_policy, save_reward_model

from actors.reward import RewardRefitter
from actors.sft import SftActor
from ocrm_ray.prompts import write_prompts
from ocrm_ray.records import Prompt, RefitRequest, Sequence

pytestmark = pytest.mark.real

TRAINING = {"batch_size": 13, "micro_batch_size": 2, "learning_rate": 1e-4, "num_epochs": 2}
NUM_PAIRS = 27
"""So that the last optimiser batch of an epoch is one pair: a rank has nothing of it."""
STRATEGIES = {
    "ocrm": {},
    "metarm": {"metarm": {"num_prompts": 3, "eta": 0.1}},
    "rlp_uml": {"rlp_uml": {"num_prompts": 4}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_policy(folder / "sft")
    save_reward_model(folder / "base")
    save_pairs(run_config(folder), random_pairs(NUM_PAIRS, seed=1), random_pairs(21, seed=2))
    prompts = [Prompt(n, "", (3 + n % 5, 4), " ".join(f"w{10 + i}" for i in range(1 + n % 7))) for n in range(15)]
    write_prompts(folder / "prompts.jsonl", prompts)
    return folder


def responses_to_prompts():
    random = np.random.default_rng(6)

    def response(prompt):
        words = random.integers(5, 30, random.integers(2, 9)).tolist()
        return Sequence((3, prompt), (*words, 2), True)

    return tuple(tuple(response(4 + number) for _ in range(2 + number % 2)) for number in range(5))


def refit(folder, stage, strategy, version):
    """Two refits in one process; figures of both, and rank 0's weights of the second."""
    policy = {"zero_stage": stage, "deepspeed": SPREAD}
    correction = {"strategy": strategy, "training": TRAINING, **STRATEGIES[strategy]}
    reward = {"base": str(folder / "base"), "training": TRAINING}
    config = run_config(folder, policy=policy, correction=correction, reward=reward)
    refitter = RewardRefitter(config, str(folder / "sft"), None, config.run_dir)
    refitter.start()
    weights = np.random.default_rng(4).uniform(0, 2, NUM_PAIRS).astype(np.float32) if strategy == "ocrm" else None
    groups = responses_to_prompts() if strategy != "ocrm" else ()
    reports = [
        refitter.refit(RefitRequest(number, np.arange(NUM_PAIRS), weights, seed=3, groups=groups))
        for number in (version, version + 1)
    ]
    figures = [[report.loss, report.heldout_accuracy, *report.figures.values()] for report in reports]
    return figures, load_file(reports[-1].path / "model.safetensors")


@pytest.mark.parametrize(
    ("stage", "strategy"),
    [(0, "ocrm"), (2, "ocrm"), (3, "ocrm"), (0, "metarm"), (2, "metarm"), (0, "rlp_uml"), (2, "rlp_uml")],
)
def test_a_refit_on_two_ranks_is_that_of_one(two_ranks, models, stage, strategy):
    figures, weights = refit(models, 0, strategy, version=1)
    start = load_file(models / "base" / "model.safetensors")
    (found, found_weights), _ = two_ranks.run(refit, models, stage, strategy, 11)
    assert found == [pytest.approx(each, rel=1e-5, abs=1e-5) for each in figures]
    for name, tensor in weights.items():
        assert (tensor - start[name]).abs().max() > 1e-4
        torch.testing.assert_close(found_weights[name], tensor, atol=1e-5, rtol=0)


def fine_tune(folder, stage):
    sft = {"batch_size": 7, "micro_batch_size": 2, "learning_rate": 1e-4, "num_epochs": 2}
    config = run_config(folder, sft=sft, policy={"zero_stage": stage, "deepspeed": SPREAD})
    actor = SftActor(config, str(folder / "sft"), folder / "prompts.jsonl", folder / f"tuned-{stage}")
    actor.start()
    return actor.train()


@pytest.mark.parametrize("stage", [2, 3])
def test_fine_tuning_on_two_ranks_is_that_of_one(two_ranks, models, stage):
    loss = fine_tune(models, 0)
    assert two_ranks.run(fine_tune, models, stage) == [pytest.approx(loss, rel=1e-5)] * 2
    weights, found = (load_file(models / f"tuned-{each}" / "model.safetensors") for each in (0, stage))
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)
