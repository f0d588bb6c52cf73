from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import EOS, scored_rollout

from ocrm_ray.algorithm.advantages import gae
from ocrm_ray.config import MissingEosPenalty, Policy, Rollout
from ocrm_ray.errors import RunError
from ocrm_ray.policy_learning import (
    UpdateStatistics,
    build_targets,
    collect_experience,
    learning_rate_factor,
    micro_batches,
    minibatches,
    policy_loss,
    require_live_scores,
    value_loss,
    with_old_logprobs,
)
from ocrm_ray.records import Sequence

CPU = torch.device("cpu")
ONE_BY_ONE = Policy(micro_batch_size=1)


def rows(*values):
    return [np.array(row, dtype=np.float32) for row in values]


def one_group(rewards=(3.0, 1.0), ended=(True, True), **fields):
    """Two samples of one prompt, of three tokens and of two; k1 against the anchor sums to 0.6 and 0.2."""
    sequences = [Sequence((4, 5), (6, 7, EOS), ended[0]), Sequence((4, 5), (8, EOS), ended[1])]
    logprobs, anchor = rows([-1.0, -2.0, -0.5], [-0.7, -0.2]), rows([-1.1, -2.2, -0.8], [-0.9, -0.2])
    return [scored_rollout(sequences, logprobs, rewards, anchor=anchor, **fields)]


def experience(**fields):
    return collect_experience(one_group(**fields), pad_id=EOS, share_prompts=True)


def test_rloo_subtracts_the_summed_kl_from_the_score():
    targets = build_targets(experience(), Policy(algorithm="rloo", kl_coefficient=0.5), Rollout())
    # rewards 3 - 0.5 * 0.6 = 2.7 and 1 - 0.5 * 0.2 = 0.9; each less the other
    expected = torch.tensor([[1.8, 1.8, 1.8], [-1.8, -1.8, 0.0]])
    torch.testing.assert_close(targets.advantages, expected)


def test_kl_in_the_loss_leaves_the_reward_alone():
    targets = build_targets(experience(), Policy(algorithm="rloo", kl_placement="loss", kl_coefficient=0.5), Rollout())
    torch.testing.assert_close(targets.advantages[:, 0], torch.tensor([2.0, -2.0]))


def test_grpo_divides_by_the_spread_of_the_group():
    targets = build_targets(experience(), Policy(algorithm="grpo", kl_coefficient=0.0), Rollout())
    torch.testing.assert_close(targets.advantages[:, 0], torch.tensor([0.5**0.5, -(0.5**0.5)]), atol=1e-3, rtol=0)


def test_missing_eos_gets_the_penalty_in_place_of_the_score():
    rollout = Rollout(missing_eos=MissingEosPenalty(penalty=-1.0))
    targets = build_targets(experience(ended=(False, True)), Policy(kl_coefficient=0.0), rollout)
    torch.testing.assert_close(targets.advantages[:, 0], torch.tensor([-2.0, 2.0]))


def test_masked_response_without_eos_is_in_no_loss_and_no_baseline():
    rollout = Rollout(missing_eos="mask")
    targets = build_targets(experience(ended=(False, True)), Policy(kl_coefficient=0.0), rollout)
    assert targets.loss_mask.tolist() == [[False] * 3, [True, True, False]]
    assert (targets.advantages == 0).all()


def test_ppo_returns_follow_gae_on_rewards_with_the_score_on_the_last_token():
    values = torch.tensor([[0.3, -0.1, 0.2], [0.5, 0.4, 9.0]])
    policy = Policy(algorithm="ppo", kl_coefficient=0.5, gamma=0.9, gae_lambda=0.8)
    targets = build_targets(experience(), policy, Rollout(), values)
    rewards = torch.tensor([[-0.05, -0.1, 3.0 - 0.15], [-0.1, 1.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantages, returns = gae(rewards, values, mask, 0.9, 0.8)
    torch.testing.assert_close(targets.returns, returns)
    kept = advantages[mask]
    torch.testing.assert_close(targets.advantages[mask], (kept - kept.mean()) / kept.std(correction=0))


@pytest.mark.parametrize("micro_batch_tokens", [1, 10, 100])
def test_micro_batches_sum_to_the_token_mean_of_the_minibatch(micro_batch_tokens):
    rollouts = one_group() + one_group(rewards=(0.5, 4.0), ended=(False, True))
    data = collect_experience(rollouts, pad_id=EOS, share_prompts=True)
    policy = Policy(kl_placement="loss", kl_coefficient=0.3, kl_estimator="k3", micro_batch_tokens=micro_batch_tokens)
    data = replace(data, old_logprobs=data.sampler_logprobs)
    targets = build_targets(data, policy, Rollout(missing_eos="mask"))
    new = data.sampler_logprobs + 0.1 * torch.randn(data.mask.shape, generator=torch.Generator().manual_seed(0))
    ratio, gap = (new - data.sampler_logprobs).exp(), new - data.anchor_logprobs
    surrogate = torch.maximum(-targets.advantages * ratio, -targets.advantages * ratio.clamp(0.8, 1.2))
    expected = (surrogate + 0.3 * (torch.exp(-gap) - 1 + gap))[targets.loss_mask].mean()
    parts = [
        policy_loss(new[micro.experience_rows, : micro.targets.loss_mask.shape[1]], micro, policy, 2.0)[0]
        for micro in micro_batches(data, targets, np.arange(4), policy, CPU)
    ]
    torch.testing.assert_close(sum(parts), expected)


def one_loss(data, logprobs, cap, **settings):
    """(loss, clip share, truncated share) of both samples as one micro-batch."""
    policy = Policy(kl_coefficient=0.0, **settings)
    (micro,) = micro_batches(data, build_targets(data, policy, Rollout()), np.arange(2), policy, CPU)
    return policy_loss(logprobs, micro, policy, cap)


@pytest.mark.parametrize(("cap", "weights", "truncated"), [(2.0, (1.5, 2.0), 0.4), (None, (1.0, 1.0), 0.0)])
def test_one_step_weighs_each_sample_by_how_much_likelier_it_became_up_to_the_cap(cap, weights, truncated):
    data = experience(sampled_at=(0, 0))
    moved = torch.tensor([1.5, 3.0]).log()[:, None] * data.mask
    logprobs = (data.sampler_logprobs + moved).requires_grad_()
    loss, clip_share, truncated_share = one_loss(data, logprobs, cap)
    loss.backward()
    # advantages 2 and -2; the surrogate's own ratio is 1, so nothing is clipped
    torch.testing.assert_close(
        logprobs.grad, torch.tensor([[-2.0], [2.0]]) * torch.tensor(weights)[:, None] * data.mask / 5
    )
    assert (clip_share, truncated_share.item()) == (0, pytest.approx(truncated))


def test_fresh_rollouts_lose_and_gain_nothing_by_the_cap():
    data = experience()
    for cap in (1.0, 2.0):
        assert one_loss(data, data.sampler_logprobs, cap)[0] == one_loss(data, data.sampler_logprobs, None)[0]


def test_several_steps_clip_around_the_weights_before_the_update_and_weigh_by_them():
    data = experience()
    old = data.sampler_logprobs + torch.tensor(1.25).log() * data.mask
    logprobs = old + torch.tensor(1.5).log() * data.mask
    loss, clip_share, _ = one_loss(replace(data, old_logprobs=old), logprobs, 2.0)
    # 1.25 * max(-A * 1.5, -A * 1.2): the three tokens with A = 2 are clipped, the two with A = -2 are not
    assert loss.item() == pytest.approx(1.25 * (3 * -2.4 + 2 * 3.0) / 5)
    assert clip_share.item() == pytest.approx(3 / 5)


def test_old_logprobs_are_the_samplers_where_exact_and_computed_elsewhere():
    asked = []
    computed = with_old_logprobs(
        experience(),
        torch.tensor([True, False]),
        lambda rows: asked.extend(rows) or [np.array([-3.0, -4.0], np.float32)],
    )
    assert asked == [1]
    torch.testing.assert_close(computed.old_logprobs, torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -4.0, 0.0]]))


def test_value_losses_of_micro_batches_sum_to_half_the_mean_squared_error():
    data = experience()
    targets = build_targets(data, Policy(algorithm="ppo"), Rollout(), torch.zeros(2, 3))
    new = torch.full((2, 3), 0.1)
    expected = ((new - targets.returns)[data.mask] ** 2).mean() / 2
    parts = [
        value_loss(new[: len(micro.experience_rows), : micro.targets.loss_mask.shape[1]], micro, Policy())
        for micro in micro_batches(data, targets, np.arange(2), ONE_BY_ONE, CPU)
    ]
    torch.testing.assert_close(sum(parts), expected)


def test_minibatch_without_a_token_in_the_loss_has_no_micro_batches():
    data = experience(ended=(False, False))
    targets = build_targets(data, Policy(), Rollout(missing_eos="mask"))
    assert list(micro_batches(data, targets, np.arange(2), ONE_BY_ONE, CPU)) == []


def test_minibatches_hold_every_sample_once_in_an_order_that_depends_on_the_seed():
    parts, again, other = (minibatches(10, 3, seed) for seed in ((1, 0, 0), (1, 0, 0), (1, 1, 0)))
    assert sorted(np.concatenate(parts).tolist()) == list(range(10))
    assert np.array_equal(np.concatenate(parts), np.concatenate(again))
    assert not np.array_equal(np.concatenate(parts), np.concatenate(other))


def test_kls_are_mean_sums_over_responses_of_sampler_less_anchor():
    report = UpdateStatistics().report(experience(), 1, 0.0)
    assert report.kl_anchor == pytest.approx(0.4)
    assert report.kl_sft == pytest.approx(0.4)


@pytest.mark.parametrize(("sampled_at", "gap"), [((5, 5), 0.25), ((4, 5), None), ((4, 4), None)])
def test_gap_counts_only_samples_of_the_version_at_hand(sampled_at, gap):
    data = experience(sampled_at=sampled_at)
    targets = build_targets(data, Policy(), Rollout())
    statistics = UpdateStatistics()
    for micro in micro_batches(data, targets, np.arange(2), ONE_BY_ONE, CPU):
        statistics.add_gap(micro.sampler_logprobs + 0.25, micro, data, version=5)
    assert statistics.report(data, 6, 0.0).logprob_gap == pytest.approx(gap)


@pytest.mark.parametrize("versions", [(1, 0), (0, 1)])
def test_scores_of_other_versions_are_refused_with_both_named(versions):
    with pytest.raises(RunError, match=f"reward model {versions[0]} and anchor {versions[1]}, live are reward model 0"):
        require_live_scores(one_group(versions=versions), 0, 0)


def test_linear_rate_falls_to_its_last_positive_value_and_stays():
    policy = Policy(lr_schedule="linear")
    assert [learning_rate_factor(update, policy, 4) for update in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.25, 0.25]
    assert learning_rate_factor(3, Policy(lr_schedule="constant"), 4) == 1.0
