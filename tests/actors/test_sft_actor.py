"""Supervised fine-tuning with a real DeepSpeed engine in this process."""

import pytest
import torch
from tiny_models import EOS, pad_batch, run_config, save_policy

from actors.sft import SftActor
from ocrm_ray.networks import load_causal_lm, load_tokenizer, response_logprobs
from ocrm_ray.prompts import write_prompts
from ocrm_ray.records import Prompt, Sequence

pytestmark = pytest.mark.real

PROMPTS = [
    Prompt(number, "", (3 + number % 5, 4), f"w{10 + number % 5} w{20 + number % 5} w{9}") for number in range(40)
]


def make_actor(tmp_path, prompts=PROMPTS, max_new_tokens=64, **settings):
    settings = {"batch_size": 16, "micro_batch_size": 16, "learning_rate": 1e-2, "num_epochs": 20} | settings
    config = run_config(tmp_path, sft=settings, rollout={"max_new_tokens": max_new_tokens})
    base = save_policy(tmp_path / "base")
    write_prompts(tmp_path / "prompts.jsonl", prompts)
    actor = SftActor(config, base, tmp_path / "prompts.jsonl", tmp_path / "sft")
    actor.start()
    return actor


def likelihoods(tmp_path, sequence):
    model = load_causal_lm(tmp_path / "sft", dtype="float32", trust_remote_code=False)
    return response_logprobs(model, pad_batch([sequence], EOS), 1.0)[0].detach().exp()


def test_model_learns_the_references_and_to_end_them(tmp_path):
    loss = make_actor(tmp_path).train()
    assert loss < 0.5
    reference = Sequence((3, 4), (10, 20, 9, EOS), True)
    assert (likelihoods(tmp_path, reference) > 0.7).all()
    assert load_tokenizer(tmp_path / "sft", trust_remote_code=False).eos_token_id == EOS


def test_reference_beyond_the_longest_response_is_cut_before_its_eos(tmp_path):
    make_actor(tmp_path, max_new_tokens=3).train()
    ended = Sequence((3, 4), (10, 20, 9, EOS), True)
    likely = likelihoods(tmp_path, ended)
    assert (likely[:3] > 0.7).all()
    assert likely[3] < 0.2


def test_result_does_not_depend_on_the_micro_batch_tokens(tmp_path):
    losses, weights = [], []
    for tokens in (10, 1000):
        folder = tmp_path / str(tokens)
        losses.append(make_actor(folder, micro_batch_tokens=tokens, learning_rate=1e-3, num_epochs=2).train())
        weights.append(load_causal_lm(folder / "sft", dtype="float32", trust_remote_code=False).network.lm_head.weight)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(weights[0], weights[1], atol=1e-4, rtol=0)


def test_prompts_are_not_trained_on(tmp_path):
    """Every prompt's second word is 4, so a loss on prompts would make it all but certain."""
    make_actor(tmp_path).train()
    said = Sequence((7,), (3, 4), False)
    assert (likelihoods(tmp_path, said) < 0.1).all()


def test_progress_counts_optimiser_steps(tmp_path):
    actor = make_actor(tmp_path, num_epochs=2)
    assert actor.progress() == (0, 0)
    actor.train()
    assert actor.progress() == (6, 6)


def test_prompts_without_references_are_an_error(tmp_path):
    actor = make_actor(tmp_path, prompts=[Prompt(0, "", (3,), None)])
    with pytest.raises(ValueError, match="no prompt has a reference"):
        actor.train()
