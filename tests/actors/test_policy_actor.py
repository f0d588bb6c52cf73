"""The trainer with real DeepSpeed engines, in this process, on a tiny policy."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    EOS,
    build_policy,
    pad_batch,
    random_pairs,
    run_config,
    save_pairs,
    save_policy,
    save_reward_model,
    scored_rollout,
)

from actors.policy import CRITIC, PolicyActor
from actors.training_engine import EngineSettings, TrainingEngine
from actors.weight_transport import WeightReader
from ocrm_ray import batches, networks
from ocrm_ray.algorithm.schedule import CorrectionClock
from ocrm_ray.checkpoints import STATE, RunState, begin, finish, newest
from ocrm_ray.errors import RunError
from ocrm_ray.networks import CausalModel, load_causal_lm, response_logprobs
from ocrm_ray.records import OnPolicyState, RefitReport, Sequence

pytestmark = pytest.mark.real

SEQUENCES = [
    Sequence((5, 6), (8, 9, 10, EOS), True),
    Sequence((5, 6), (12, EOS), True),
    Sequence((5, 6), (13, 14, 15), False),
    Sequence((5, 6), (7, 20, 21, 22, EOS), True),
]
REWARDS = [2.0, -1.0, 0.5, -0.5]


def make_actor(tmp_path, reward_path=None, tied=True, **sections):
    folder = save_policy(tmp_path / "sft", tie_word_embeddings=tied)
    sections = {"policy": {"learning_rate": 3e-3, "kl_coefficient": 0.0}} | sections
    config = run_config(tmp_path, **sections)
    actor = PolicyActor(config, folder, reward_path, config.run_dir, tmp_path / "exports")
    if reward_path is not None:
        save_pairs(config, random_pairs(16, seed=1))
    actor.start()
    return actor


def rollouts_of(actor, rewards=REWARDS, **fields):
    """Rollouts whose sampling log-probs are the trainer's own, at temperature 1."""
    return [scored_rollout(SEQUENCES, actor.logprobs(SEQUENCES), rewards, **fields)]


def sums(actor):
    return np.array([row.sum() for row in actor.logprobs(SEQUENCES)])


def test_update_raises_what_was_rewarded_and_lowers_what_was_not(tmp_path):
    actor = make_actor(tmp_path)
    before = sums(actor)
    report = actor.update(rollouts_of(actor))
    change = sums(actor) - before
    assert change[0] > 0
    assert change[1] < 0
    assert report.version == 1
    assert report.logprob_gap < 1e-6
    assert report.grad_norm > 0


@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.parametrize("algorithm", ["rloo", "ppo"])
def test_update_does_not_depend_on_the_micro_batch_tokens(tmp_path, monkeypatch, zero_stage, algorithm):
    monkeypatch.setattr(batches, "SMALL_BLOCK", 1)
    results = []
    for tokens in (1, 15, 100):
        folder = tmp_path / str(tokens)
        settings = {"micro_batch_tokens": tokens, "algorithm": algorithm, "zero_stage": zero_stage, "num_epochs": 2}
        reward = save_reward_model(folder / "rm") if algorithm == "ppo" else None
        rollout = {"missing_eos": "mask"}
        actor = make_actor(folder, reward, policy=settings | {"learning_rate": 1e-3}, rollout=rollout)
        report = actor.update(rollouts_of(actor))
        results.append((sums(actor), report))
    for values, report in results[1:]:
        np.testing.assert_allclose(values, results[0][0], atol=2e-4)
        assert report.loss == pytest.approx(results[0][1].loss, abs=1e-5)
        assert report.grad_norm == pytest.approx(results[0][1].grad_norm, rel=1e-4)
        assert report.entropy == pytest.approx(results[0][1].entropy, rel=1e-5)


def forwards_of(actor, monkeypatch):
    """[sequences, with gradient] of every forward pass that the policy makes from now on."""
    calls, original = [], CausalModel.forward

    def forward(self, batch, *arguments):
        calls.append((len(batch.places), torch.is_grad_enabled()))
        return original(self, batch, *arguments)

    monkeypatch.setattr(CausalModel, "forward", forward)
    return calls


@pytest.mark.parametrize("sampled_at", [(0, 0), (-1, 0)])
def test_update_of_one_step_passes_over_its_tokens_once(tmp_path, monkeypatch, sampled_at):
    actor = make_actor(tmp_path)
    rollouts = rollouts_of(actor, sampled_at=sampled_at)
    calls = forwards_of(actor, monkeypatch)
    actor.update(rollouts)
    assert calls == [(4, True)]


def test_several_steps_reuse_the_samplers_logprobs_of_fresh_rollouts_once_the_gap_is_known(tmp_path, monkeypatch):
    actor = make_actor(tmp_path, policy={"num_epochs": 2, "learning_rate": 1e-3})
    calls, passes = forwards_of(actor, monkeypatch), []
    for sampled_at in ((0, 0), (1, 1), (1, 1)):
        rollouts = rollouts_of(actor, sampled_at=sampled_at)
        calls.clear()
        actor.update(rollouts)
        passes.append([*calls])
    once = [(4, True), (4, True)]
    assert passes == [[(4, False), *once], once, [(4, False), *once]]


def test_gap_above_the_bound_makes_every_row_computed_again(tmp_path, monkeypatch):
    actor = make_actor(tmp_path, policy={"num_epochs": 2, "reuse_logprobs_within": 0.01})
    calls = forwards_of(actor, monkeypatch)
    for version, shift in ((0, 0.02), (1, 0.0), (2, 0.0)):
        (rollout,) = rollouts_of(actor, sampled_at=(version, version))
        samples = tuple(replace(sample, logprobs=sample.logprobs + np.float32(shift)) for sample in rollout.samples)
        calls.clear()
        actor.update([replace(rollout, samples=samples)])
        assert len(calls) == (2 if version == 2 else 3)


def test_stale_rollouts_weigh_by_the_ratio_up_to_the_cap(tmp_path):
    reports = []
    for cap in (2.0, None):
        actor = make_actor(tmp_path / str(cap), rollout={"importance_cap": cap})
        (rollout,) = rollouts_of(actor, sampled_at=(-1, -1))
        samples = [replace(sample, logprobs=sample.logprobs - np.float32(1.0)) for sample in rollout.samples]
        reports.append(actor.update([replace(rollout, samples=tuple(samples))]))
    # every token is e times likelier now: weight 2 on all of them, or 1
    assert [report.truncated_share for report in reports] == [1.0, 0.0]
    assert reports[0].grad_norm == pytest.approx(2 * reports[1].grad_norm, rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_exported_file_reproduces_the_trainers_logprobs_and_names_the_head(tmp_path, tied):
    actor = make_actor(tmp_path, tied=tied)
    actor.update(rollouts_of(actor))
    weights = actor.export_weights()
    assert weights.version == 1
    assert weights.num_bytes == weights.path.stat().st_size
    state = load_file(weights.path)
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"]) == tied
    model = build_policy(tie_word_embeddings=tied)
    model.load_state_dict(state)
    batch = pad_batch(SEQUENCES, EOS)
    rows = response_logprobs(CausalModel(model), batch, 1.0).detach()
    for row, expected in zip(rows.numpy(), actor.logprobs(SEQUENCES), strict=True):
        np.testing.assert_allclose(row[: len(expected)], expected, atol=1e-5)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_an_export_stays_what_it_was_through_later_updates_until_its_release(tmp_path, zero_stage):
    actor = make_actor(tmp_path, policy={"learning_rate": 3e-3, "zero_stage": zero_stage})
    actor.update(rollouts_of(actor))
    held, before = actor.export_weights(), sums(actor)
    for _ in range(3):
        actor.update(rollouts_of(actor))
        actor.release_weights(actor.export_weights())
    assert np.abs(sums(actor) - before).max() > 0.01
    actor.save("held", held)
    model = load_causal_lm(tmp_path / "test" / "held", dtype="float32", trust_remote_code=False)
    saved = response_logprobs(model, pad_batch(SEQUENCES, EOS), 1.0).sum(1)
    np.testing.assert_allclose(saved.detach().numpy(), before, atol=1e-5)
    assert len(list(held.path.parent.iterdir())) == 2


class WatchedLock:
    """A lock that tells when someone must wait for it."""

    def __init__(self):
        self.lock, self.waited_for = threading.Lock(), threading.Event()

    def __enter__(self):
        if not self.lock.acquire(blocking=False):
            self.waited_for.set()
            self.lock.acquire()

    def __exit__(self, *error):
        self.lock.release()


def test_a_release_comes_through_while_an_update_runs_and_a_save_waits_for_its_end(tmp_path, monkeypatch):
    actor = make_actor(tmp_path)
    rollouts, weights = rollouts_of(actor), actor.export_weights()
    inside, go_on, lock = threading.Event(), threading.Event(), WatchedLock()
    monkeypatch.setattr(actor, "_lock", lock)
    step = actor._engine.step

    def held_step(factor):
        inside.set()
        assert go_on.wait(60)
        return step(factor)

    monkeypatch.setattr(actor._engine, "step", held_step)
    with ThreadPoolExecutor(2) as threads:
        updating = threads.submit(actor.update, rollouts)
        assert inside.wait(60)
        saving = threads.submit(actor.save, "present")
        actor.release_weights(weights)
        was_waited_for = lock.waited_for.wait(20)
        go_on.set()
        assert was_waited_for
        assert updating.result().version == 1
        saving.result()
    model = load_causal_lm(tmp_path / "test" / "present", dtype="float32", trust_remote_code=False)
    saved = response_logprobs(model, pad_batch(SEQUENCES, EOS), 1.0).sum(1)
    np.testing.assert_allclose(saved.detach().numpy(), sums(actor), atol=1e-5)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_saved_policy_is_the_trained_one(tmp_path, zero_stage):
    actor = make_actor(tmp_path, policy={"learning_rate": 3e-3, "zero_stage": zero_stage})
    actor.update(rollouts_of(actor))
    actor.save("checkpoints/step-1")
    folder = tmp_path / "test" / "checkpoints" / "step-1"
    model = load_causal_lm(folder, dtype="float32", trust_remote_code=False)
    saved = response_logprobs(model, pad_batch(SEQUENCES, EOS), 1.0).sum(1)
    np.testing.assert_allclose(saved.detach().numpy(), sums(actor), atol=1e-5)


def test_stale_scores_are_refused_until_the_commit_makes_them_live(tmp_path):
    actor = make_actor(tmp_path)
    rescored = rollouts_of(actor, versions=(1, 10))
    with pytest.raises(RunError, match="scored by reward model 1 and anchor 10, live are reward model 0 and anchor 0"):
        actor.update(rescored)
    actor.stage("snapshot-10", None)
    actor.commit("snapshot-10", 1, 10)
    assert actor.update(rescored).version == 1
    with pytest.raises(RunError):
        actor.update(rollouts_of(actor))


def test_reset_at_promotion_makes_the_update_that_of_a_fresh_optimiser(tmp_path):
    """After a first update whose moments a reset must forget, the same weights take the same second step."""
    changed = {"correction": {"reset_optimizer": True, "every": 4}}
    changed["policy"] = {"learning_rate": 3e-3, "lr_schedule": "linear", "kl_coefficient": 0.0}
    kept = make_actor(tmp_path / "kept", **changed)
    kept.update(rollouts_of(kept))
    kept.save("after-one")
    config = run_config(tmp_path / "fresh", **changed)
    fresh = PolicyActor(config, str(tmp_path / "kept" / "test" / "after-one"), None, config.run_dir, tmp_path / "e")
    fresh.start()
    kept.commit("snapshot-1", 0, 0)
    rollouts = rollouts_of(kept, rewards=REWARDS[::-1])
    kept.update(rollouts)
    fresh.update(rollouts)
    np.testing.assert_allclose(sums(kept), sums(fresh), atol=2e-5)


def test_commit_again_does_not_reset_again(tmp_path):
    changed = {"correction": {"reset_optimizer": True}}
    once, twice = (make_actor(tmp_path / name, **changed) for name in ("once", "twice"))
    for actor in (once, twice):
        actor.commit("snapshot-1", 0, 0)
        actor.update(rollouts_of(actor))
    twice.commit("snapshot-1", 0, 0)
    rollouts = rollouts_of(once, rewards=REWARDS[::-1])
    once.update(rollouts)
    twice.update(rollouts)
    np.testing.assert_array_equal(sums(once), sums(twice))


PAIRS = random_pairs(13, seed=5)
PAIR_TEMPERATURE = 1.3


def pair_actor(tmp_path, algorithm, direct=None, **policy):
    settings = {"algorithm": algorithm, "learning_rate": 1e-3, "direct": {"beta": 0.4} | (direct or {})}
    folder = save_policy(tmp_path / "sft")
    config = run_config(tmp_path, policy=settings | policy, pairs={"temperature": PAIR_TEMPERATURE})
    save_pairs(config, PAIRS)
    actor = PolicyActor(config, folder, None, config.run_dir, tmp_path / "exports")
    actor.start()
    return actor


def full_table(model, sequence):
    """Log-probs of the whole vocabulary [T, V] behind each response token, and the tokens [T, 1]."""
    tokens = torch.tensor([sequence.prompt_ids + sequence.response_ids])
    logits = model(input_ids=tokens).logits[0, len(sequence.prompt_ids) - 1 : -1]
    return torch.log_softmax(logits / PAIR_TEMPERATURE, dim=-1), torch.tensor(sequence.response_ids)[:, None]


def pair_sums(model, indices):
    """Summed log-probs [N, 2] of (chosen, rejected)."""
    rows = [full_table(model, side) for index in indices for side in (PAIRS[index].chosen, PAIRS[index].rejected)]
    return torch.stack([table.gather(1, said).sum() for table, said in rows]).view(-1, 2)


@torch.no_grad()
def wpo_weights(model, indices):
    """min(1, w(chosen) w(rejected)), w = exp of the mean over tokens of log p(y_t) - log sum_v p(v)^2."""
    weights = []
    for index in indices:
        total = 0.0
        for side in (PAIRS[index].chosen, PAIRS[index].rejected):
            table, said = full_table(model, side)
            total += float((table.gather(1, said)[:, 0] - table.exp().square().sum(dim=1).log()).mean())
        weights.append(min(1.0, np.exp(total)))
    return torch.tensor(weights, dtype=torch.float64)


@torch.no_grad()
def anchor_of(indices, noise=0.0):
    own = pair_sums(build_policy().double(), indices)
    random = torch.randn(own.shape, generator=torch.Generator().manual_seed(2), dtype=own.dtype)
    return (own + noise * random).float().numpy()


@pytest.mark.parametrize("algorithm", ["dpo", "wpo"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_direct_update_takes_the_step_of_plain_torch_on_its_formula(tmp_path, algorithm, label_smoothing):
    model, indices = build_policy().double(), np.array([11, 0, 4, 7, 2, 9])
    anchor = anchor_of(indices, noise=2.0)
    rewards = 0.4 * (pair_sums(model, indices) - torch.from_numpy(anchor).double())
    sigmoid = torch.sigmoid(rewards[:, 0] - rewards[:, 1])
    losses = -(1 - label_smoothing) * sigmoid.log() - label_smoothing * (1 - sigmoid).log()
    if algorithm == "wpo":
        weights = wpo_weights(model, indices)
        assert weights.min() < 0.9
        losses = weights * losses
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    losses.mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    optimizer.step()

    actor = pair_actor(tmp_path, algorithm, {"label_smoothing": label_smoothing})
    report = actor.learn_pairs(indices, anchor)
    assert report.version == 1
    assert report.loss == pytest.approx(float(losses.mean().detach()), rel=1e-5)
    assert report.grad_norm == pytest.approx(float(norm), rel=1e-4)
    present = actor._engine.weights()
    for name, parameter in model.named_parameters():
        clear = gradients[name].abs() > 1e-5  # below, the first step of Adam goes by the sign of rounding
        torch.testing.assert_close(present[name][clear].double(), parameter.detach()[clear], atol=5e-6, rtol=0)


def test_the_first_loss_is_log_2_where_the_anchor_is_the_policy_itself(tmp_path):
    indices = np.arange(13)
    report = pair_actor(tmp_path / "dpo", "dpo").learn_pairs(indices, anchor_of(indices))
    assert report.loss == pytest.approx(np.log(2), abs=1e-5)
    expected = np.log(2) * float(wpo_weights(build_policy().double(), indices).mean())
    report = pair_actor(tmp_path / "wpo", "wpo").learn_pairs(indices, anchor_of(indices))
    assert report.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("algorithm", ["dpo", "wpo"])
def test_a_direct_update_does_not_depend_on_the_micro_batches(tmp_path, monkeypatch, algorithm):
    monkeypatch.setattr(batches, "SMALL_BLOCK", 1)
    indices, results = np.array([11, 0, 4, 7, 2, 9, 1]), []
    for number, sizes in enumerate([{}, {"micro_batch_size": 1}, {"micro_batch_tokens": 30}, {"zero_stage": 3}]):
        actor = pair_actor(tmp_path / str(number), algorithm, **sizes)
        report = actor.learn_pairs(indices, anchor_of(indices, noise=2.0))
        results.append((report.loss, report.grad_norm, sums(actor)))
    for loss, norm, values in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert norm == pytest.approx(results[0][1], rel=1e-4)
        np.testing.assert_allclose(values, results[0][2], atol=2e-4)


@pytest.mark.parametrize("algorithm", ["dpo", "wpo"])
def test_direct_updates_lower_the_loss_and_raise_every_pairs_margin(tmp_path, algorithm):
    actor, indices = pair_actor(tmp_path, algorithm), np.arange(13)
    anchor = anchor_of(indices)
    reports = [actor.learn_pairs(indices, anchor) for _ in range(8)]
    assert [report.version for report in reports] == list(range(1, 9))
    assert reports[-1].loss < 0.5 * reports[0].loss
    assert (reports[-1].kl_sft, reports[-1].entropy, reports[-1].logprob_gap) == (None, None, None)
    actor.save("learned")
    learned = load_causal_lm(tmp_path / "test" / "learned", dtype="float32", trust_remote_code=False).network
    with torch.no_grad():
        change = pair_sums(learned, indices).numpy() - anchor
    assert (change[:, 0] - change[:, 1]).min() > 0


def ppo_actor(tmp_path, **correction):
    reward = save_reward_model(tmp_path / "rm")
    settings = {"algorithm": "ppo", "learning_rate": 1e-9, "critic_learning_rate": 3e-3, "value_clip_range": 100.0}
    return make_actor(tmp_path, reward, policy=settings, correction=correction)


def test_critic_learns_the_returns_of_the_same_rollouts(tmp_path):
    actor = ppo_actor(tmp_path)
    losses = [actor.update(rollouts_of(actor)).value_loss for _ in range(12)]
    assert losses[-1] < losses[0] / 3


def test_promoted_critic_is_that_of_an_actor_which_started_from_the_new_reward_model(tmp_path):
    other = save_reward_model(tmp_path / "other", seed=9)
    refit = RefitReport(1, other, 0.0, 0.0, 0.0)
    actor = ppo_actor(tmp_path / "a", critic_on_promote="reinit")
    for _ in range(3):
        actor.update(rollouts_of(actor))
    actor.stage("snapshot-3", refit)
    before = actor.update(rollouts_of(actor)).value_loss
    actor.commit("snapshot-3", 1, 0)
    after = actor.update(rollouts_of(actor, versions=(1, 0))).value_loss
    fresh = make_actor(tmp_path / "b", other, policy={"algorithm": "ppo", "value_clip_range": 100.0})
    expected = fresh.update(rollouts_of(fresh)).value_loss
    assert after == pytest.approx(expected, rel=1e-4)
    assert before != pytest.approx(expected, rel=1e-2)


def test_a_control_that_refits_nothing_gives_the_critic_a_new_start_too(tmp_path):
    actor = ppo_actor(tmp_path / "a", critic_on_promote="reinit")
    first = actor.update(rollouts_of(actor)).value_loss
    for _ in range(3):
        actor.update(rollouts_of(actor))
    actor.stage("snapshot-4", None)
    before = actor.update(rollouts_of(actor)).value_loss
    actor.commit("snapshot-4", 0, 0)
    assert actor.update(rollouts_of(actor)).value_loss == pytest.approx(first, rel=1e-4)
    assert before != pytest.approx(first, rel=1e-2)


def test_a_checkpoint_has_the_critic_that_was_live_though_another_is_before_it_is_written(tmp_path):
    actor = ppo_actor(tmp_path / "a", critic_on_promote="reinit")
    actor.update(rollouts_of(actor))
    actor.capture()
    expected = actor._critic.engine.weights()
    actor.stage("snapshot-1", None)
    actor.commit("snapshot-1", 0, 0)
    partial = begin(tmp_path, 1)
    actor.write_checkpoint(partial, None)
    found = load_file(partial / STATE / CRITIC / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_critic_is_kept_where_the_configuration_says_so(tmp_path):
    actor = ppo_actor(tmp_path, critic_on_promote="keep")
    losses = [actor.update(rollouts_of(actor)).value_loss for _ in range(6)]
    actor.stage("s", RefitReport(1, tmp_path / "nowhere", 0.0, 0.0, 0.0))
    actor.commit("s", 1, 0)
    assert actor.update(rollouts_of(actor, versions=(1, 0))).value_loss < losses[-1]


def token_batch(tokens):
    """Rows of equal length whose first token is the prompt."""
    return pad_batch([Sequence((row[0],), tuple(row[1:]), False) for row in tokens.tolist()], EOS)


def engine_weights(settings, num_parts, steps=3, **sizes):
    """Weights of a policy after some steps on fixed sequences, each step in ``num_parts`` parts."""
    engine = TrainingEngine(CausalModel(build_policy(**sizes)), settings)
    tokens = torch.randint(0, 32, (8, 12), generator=torch.Generator().manual_seed(1))
    norms = []

    def loss_of(part):
        return -response_logprobs(engine.forward, token_batch(part), 1.0).sum() / tokens[:, 1:].numel()

    for _ in range(steps):
        engine.accumulate(tokens.chunk(num_parts), loss_of)
        norms.append(engine.step(1.0))
    weights = engine.weights()
    rotary = engine.network.model.rotary_emb.inv_freq.clone()
    engine.close()
    return weights, norms, rotary


# Weights above 100,000 numbers, which ZeRO 3 gathers for one module at a time and lets go again.
LARGE = {"vocab_size": 4096, "intermediate_size": 4096, "num_hidden_layers": 1}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_zero_stage_takes_the_step_of_plain_torch_with_clipping(monkeypatch, checkpointing):
    model = build_policy(**LARGE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    tokens = torch.randint(0, 32, (8, 12), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        logits = model(input_ids=tokens).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    expected = model.state_dict()
    monkeypatch.setattr(networks, "MAX_LOGITS", 10 * 4096)
    monkeypatch.setattr(batches, "SMALL_BLOCK", 1)
    monkeypatch.setattr(batches, "MAX_PADDING", -1.0)  # every row is a block
    for stage in range(4):
        settings = EngineSettings(1e-3, 0.05, zero_stage=stage, dtype="float32", checkpointing=checkpointing)
        weights, _, _ = engine_weights(settings, num_parts=2, **LARGE)
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], atol=3e-5, rtol=0)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_bfloat16_trains_with_float32_gradients_and_rotary_frequencies(zero_stage):
    settings = EngineSettings(1e-3, 0.05, zero_stage=zero_stage, dtype="bfloat16")
    whole, norms, rotary = engine_weights(settings, num_parts=1)
    _, split_norms, _ = engine_weights(settings, num_parts=8)
    assert whole["lm_head.weight"].dtype == torch.bfloat16
    assert torch.equal(rotary, build_policy().model.rotary_emb.inv_freq)
    assert norms == pytest.approx(split_norms, rel=2e-2)


def test_groups_of_different_sizes_are_a_programming_error(tmp_path):
    actor = make_actor(tmp_path)
    (rollout,) = rollouts_of(actor)
    smaller = replace(rollout, samples=rollout.samples[:2], scores=rollout.scores[:2])
    with pytest.raises(AssertionError, match="groups of different sizes"):
        actor.update([rollout, smaller])


@pytest.mark.parametrize(("zero_stage", "dtype"), [(0, "float32"), (2, "float32"), (0, "bfloat16"), (3, "bfloat16")])
def test_gradient_that_is_not_finite_ends_the_run(zero_stage, dtype):
    engine = TrainingEngine(CausalModel(build_policy()), EngineSettings(1e-3, 1.0, zero_stage, dtype))
    batch = token_batch(torch.tensor([[3, 4]]))
    engine.accumulate([batch], lambda part: response_logprobs(engine.forward, part, 1.0).sum() * float("nan"))
    with pytest.raises(RunError, match="gradient is not finite"):
        engine.step(1.0)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
@pytest.mark.parametrize("algorithm", ["rloo", "ppo"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trainer_goes_on_from_its_checkpoint_bit_for_bit(tmp_path, algorithm, dtype, lora):
    reward = save_reward_model(tmp_path / "rm") if algorithm == "ppo" else None
    sections = {"policy": {"algorithm": algorithm, "learning_rate": 3e-3, "lr_schedule": "linear", "lora": lora}}
    asked = make_actor(tmp_path, reward, **sections, pools={"policy": {"dtype": dtype}})
    asked.update(rollouts_of(asked))
    snapshot = asked.export_weights()
    asked.commit("snapshot-1", 3, 2)
    live = {"versions": (3, 2)}
    asked.update(rollouts_of(asked, **live))
    asked.capture()
    rollouts = rollouts_of(asked, **live)
    report = asked.update(rollouts)
    partial = begin(tmp_path, 2)
    written = asked.write_checkpoint(partial, snapshot)
    state = {"reward_version": 0, "anchor_version": 0, "num_issued": 2, "outstanding": (), "probe_bound": (1, 1)}
    run = RunState(step=2, clock=CorrectionClock(4), on_policy=OnPolicyState(), **state)
    folder = finish(partial, run, written, num_kept=1)
    assert newest(tmp_path).folder == folder

    resumed = PolicyActor(asked.config, asked.sft_path, reward, asked.run_dir, tmp_path / "again", checkpoint=folder)
    resumed.start()
    again = resumed.update(rollouts)
    assert replace(again, seconds=0) == replace(report, seconds=0)
    np.testing.assert_array_equal(sums(resumed), sums(asked))
    weights = resumed.saved_snapshot()
    assert weights.version == 1
    with WeightReader().read(snapshot) as old, WeightReader().read(weights) as found:
        assert all(torch.equal(old[name], found[name]) for name in old)
