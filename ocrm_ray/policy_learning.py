"""From scored rollouts to the loss of one policy update: pure tensors, no engine.

``collect_experience`` turns rollouts into tensors, ``build_targets`` scores into advantages, ``micro_batches`` cuts a
minibatch so that the shares of its micro-batches sum to the token mean of the whole, whatever their size and whoever
of several ranks has them.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ocrm_ray import ranks
from ocrm_ray.algorithm.advantages import gae, grpo_advantages, rloo_advantages, shaped_rewards, whiten
from ocrm_ray.algorithm.direct_preference import direct_preference_losses, implicit_margins
from ocrm_ray.algorithm.logprobs import sequence_logprobs
from ocrm_ray.algorithm.policy_loss import clipped_policy_loss, clipped_value_loss, kl_terms, truncated_weights
from ocrm_ray.algorithm.wpo import pair_log_weights, response_log_weights
from ocrm_ray.batches import PaddedBatch, SequenceTable, pad_rows
from ocrm_ray.config import MissingEosPenalty, Policy, Rollout
from ocrm_ray.errors import RunError
from ocrm_ray.records import FloatArray, IntArray, UpdateReport
from ocrm_ray.records import Rollout as ScoredRollout

MIXED_VERSIONS = -1


@dataclass(frozen=True, slots=True)
class Experience:
    """The N samples of a step in rollout order, group after group of ``group_size``.

    Log-probs are float32 [N, T], 0 past the end of each response; ``mask`` [N, T] is True on response tokens;
    ``scores`` [N] are the live reward model's; ``versions`` [N] the policy version that produced a sample,
    ``MIXED_VERSIONS`` where there were several. ``old_logprobs`` [N, T]: the trainer's before the update; None where
    it takes one optimiser step, whose own forward pass gives them.
    """

    table: SequenceTable
    sampler_logprobs: Tensor
    anchor_logprobs: Tensor
    sft_logprobs: Tensor
    mask: Tensor
    scores: Tensor
    has_eos: Tensor
    versions: Tensor
    group_size: int
    old_logprobs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Targets:
    """What an update aims at, [N, T] each; ``values`` and ``returns`` only with a critic.

    ``loss_mask``: the tokens that enter the loss.
    """

    advantages: Tensor
    loss_mask: Tensor
    values: Tensor | None = None
    returns: Tensor | None = None


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some samples of a minibatch, cut to their longest response; ``share`` of the minibatch's loss tokens."""

    batch: PaddedBatch
    experience_rows: Tensor
    sampler_logprobs: Tensor
    anchor_logprobs: Tensor
    old_logprobs: Tensor | None
    targets: Targets
    share: float


def require_live_scores(rollouts: Seq[ScoredRollout], reward_version: int, anchor_version: int) -> None:
    """RunError if a rollout is not scored, or by another reward model or anchor than the live ones."""
    for rollout in rollouts:
        if rollout.scores is None:
            raise RunError(f"prompt {rollout.prompt.prompt_id}: trained on before it was scored")
        for scores in rollout.scores:
            if (scores.reward_version, scores.anchor_version) != (reward_version, anchor_version):
                raise RunError(
                    f"prompt {rollout.prompt.prompt_id}: scored by reward model {scores.reward_version} and anchor "
                    f"{scores.anchor_version}, live are reward model {reward_version} and anchor {anchor_version}"
                )


def collect_experience(rollouts: Seq[ScoredRollout], pad_id: int, share_prompts: bool) -> Experience:
    """The samples of scored rollouts, which all have the same number of samples, as tensors."""
    samples = [sample for rollout in rollouts for sample in rollout.samples]
    scores = [score for rollout in rollouts for score in rollout.scores or ()]
    group_size = len(rollouts[0].samples)
    assert all(len(rollout.samples) == group_size for rollout in rollouts), "groups of different sizes"
    assert len(scores) == len(samples), "a rollout without scores"
    table = SequenceTable([sample.sequence for sample in samples], pad_id, share_prompts)
    lengths = torch.from_numpy(table.response_lengths)
    spans = ((sample.first_version, sample.last_version) for sample in samples)
    return Experience(
        table=table,
        sampler_logprobs=pad_rows([sample.logprobs for sample in samples]),
        anchor_logprobs=pad_rows([score.anchor_logprobs for score in scores]),
        sft_logprobs=pad_rows([score.sft_logprobs for score in scores]),
        mask=torch.arange(int(lengths.max())) < lengths[:, None],
        scores=torch.tensor([score.reward for score in scores], dtype=torch.float32),
        has_eos=torch.tensor([sample.sequence.has_eos for sample in samples]),
        versions=torch.tensor([first if first == last else MIXED_VERSIONS for first, last in spans]),
        group_size=group_size,
    )


def with_old_logprobs(
    experience: Experience, is_exact: Tensor, compute: Callable[[IntArray], Seq[FloatArray]]
) -> Experience:
    """``old_logprobs`` are the sampler's where ``is_exact`` [N]; of the other rows ``compute`` gives them, [T] each."""
    old_logprobs = experience.sampler_logprobs.clone()
    rows = (~is_exact).nonzero().squeeze(1)
    if len(rows):
        computed = pad_rows(compute(rows.numpy()))
        old_logprobs[rows, : computed.shape[1]] = computed
    return replace(experience, old_logprobs=old_logprobs)


def build_targets(experience: Experience, policy: Policy, rollout: Rollout, values: Tensor | None = None) -> Targets:
    """Advantages from scores, per token [N, T]; PPO needs the critic's ``values`` [N, T] from before the update.

    Responses without EOS get the penalty in place of their score, or with ``mask`` stay out of the loss and of the
    baselines and statistics of others. With the KL in the reward, RLOO and GRPO subtract its sum over the response
    from the score, PPO spreads it over the tokens.
    """
    counted, scores = experience.has_eos, experience.scores
    if isinstance(rollout.missing_eos, MissingEosPenalty):
        scores = scores.where(counted, rollout.missing_eos.penalty)
        counted = torch.ones_like(counted)
    loss_mask = experience.mask & counted[:, None]
    coefficient = policy.kl_coefficient if policy.kl_placement == "reward" else 0.0
    kl = kl_terms(experience.sampler_logprobs, experience.anchor_logprobs, policy.kl_estimator)
    if policy.algorithm == "ppo":
        assert values is not None, "PPO needs the critic's values"
        rewards = shaped_rewards(scores, kl, experience.mask, coefficient)
        advantages, returns = gae(rewards, values, experience.mask, policy.gamma, policy.gae_lambda)
        return Targets(whiten(advantages, loss_mask), loss_mask, values, returns)
    rewards = (scores - coefficient * kl.sum(1)).view(-1, experience.group_size)
    baseline = rloo_advantages if policy.algorithm == "rloo" else grpo_advantages
    advantages = baseline(rewards, valid=counted.view(-1, experience.group_size)).view(-1, 1)
    return Targets(advantages * loss_mask, loss_mask)


def minibatches(num_samples: int, num_minibatches: int, seed: Seq[int]) -> list[IntArray]:
    """Indices of the samples, shuffled by ``seed`` and cut into at most ``num_minibatches`` parts of even size."""
    order = np.random.default_rng(seed).permutation(num_samples).astype(np.int64)
    return [part for part in np.array_split(order, num_minibatches) if part.size]


def micro_batches(
    experience: Experience, targets: Targets, rows: IntArray, policy: Policy, device: torch.device
) -> Iterator[MicroBatch]:
    """This rank's share of a minibatch ``rows`` in parts of similar length; none where no token enters the loss."""
    num_tokens = int(targets.loss_mask[torch.from_numpy(rows)].sum())
    if num_tokens == 0:
        return
    for chunk in experience.table.chunks(rows, policy.micro_batch_size, policy.micro_batch_tokens):
        chosen = rows[chunk]
        index = torch.from_numpy(chosen)
        batch = experience.table.batch(chosen)
        width = batch.response_mask.shape[1]

        def cut(values: Tensor | None, index: Tensor = index, width: int = width) -> Any:
            return None if values is None else values[index, :width].to(device)

        yield MicroBatch(
            batch=batch.to(device),
            experience_rows=index,
            sampler_logprobs=cut(experience.sampler_logprobs),
            anchor_logprobs=cut(experience.anchor_logprobs),
            old_logprobs=cut(experience.old_logprobs),
            targets=Targets(*map(cut, (targets.advantages, targets.loss_mask, targets.values, targets.returns))),
            share=float(targets.loss_mask[index].sum()) / num_tokens,
        )


def policy_loss(
    logprobs: Tensor, micro: MicroBatch, policy: Policy, importance_cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, share of tokens that the clip stops, share whose importance weight was cut) of a micro-batch.

    All scaled by its share: over a minibatch they sum to the token means.
    """
    mask, advantages, truncated = micro.targets.loss_mask, micro.targets.advantages, torch.zeros_like(logprobs)
    old_logprobs = logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs
    if importance_cap is not None:
        weights = truncated_weights(old_logprobs, micro.sampler_logprobs, mask, importance_cap)
        advantages, truncated = advantages * weights, mask & (weights == importance_cap)
    loss, clip_share = clipped_policy_loss(logprobs, old_logprobs, advantages, mask, policy.clip_range)
    if policy.kl_placement == "loss" and policy.kl_coefficient > 0:
        kl = kl_terms(logprobs, micro.anchor_logprobs, policy.kl_estimator)
        loss = loss + policy.kl_coefficient * kl.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)
    truncated_share = truncated.sum() / mask.sum().clamp(min=1)
    return micro.share * loss, micro.share * clip_share, micro.share * truncated_share


def value_loss(values: Tensor, micro: MicroBatch, policy: Policy) -> Tensor:
    """The critic's loss of a micro-batch, scaled by its share; without ``value_coefficient``."""
    targets = micro.targets
    assert targets.values is not None
    assert targets.returns is not None
    loss = clipped_value_loss(values, targets.values, targets.returns, targets.loss_mask, policy.value_clip_range)
    return micro.share * loss


def preference_loss(
    logprobs: Tensor, collisions: Tensor | None, mask: Tensor, anchor: Tensor, policy: Policy
) -> Tensor:
    """DPO's loss summed over n pairs, with ``collisions`` WPO's.

    ``logprobs``, ``collisions``, ``mask`` [2n, T]: of all chosen, then of all rejected; ``anchor`` [n, 2] summed.
    """

    def by_pair(values: Tensor) -> Tensor:
        return values.view(2, -1).T

    direct = policy.direct
    margins = implicit_margins(by_pair(sequence_logprobs(logprobs, mask)), anchor, direct.beta)
    weights = None
    if collisions is not None:
        responses = by_pair(response_log_weights(logprobs, collisions, mask))
        weights = pair_log_weights(responses, cap=True).exp()
    return direct_preference_losses(margins, direct.label_smoothing, weights).sum()


def learning_rate_factor(update: int, policy: Policy, period: int) -> float:
    """Factor of the learning rate at the ``update``-th update (from 0) of a schedule of ``period`` updates.

    ``linear``: 1, 1 - 1/period, ..., 1/period, and that last value for updates beyond the period.
    """
    if policy.lr_schedule == "constant":
        return 1.0
    return max(1.0 - update / period, 1.0 / period)


class UpdateStatistics:
    """What an update reports: sums of terms over sums of weights, by name of the report's field."""

    NAMES = ("loss", "entropy", "clip_share", "grad_norm", "logprob_gap", "truncated_share", "value_loss")

    def __init__(self) -> None:
        self.sums: defaultdict[str, Any] = defaultdict(float)
        self.weights: defaultdict[str, Any] = defaultdict(float)
        self.num_steps = self.num_skipped_steps = 0
        """Optimiser steps until now, of a critic too; of these, those that were skipped."""

    def add(self, weight: Tensor | float, **terms: Tensor | float) -> None:
        """A term to each named sum, and ``weight`` to what it is divided by; nothing waits for a GPU here."""
        for name, term in terms.items():
            self.sums[name] += torch.as_tensor(term).detach().double()
            self.weights[name] += weight

    def add_step(self, norm: float, **terms: float) -> None:
        """Terms of an optimiser step; of one that was skipped, its ``norm`` not being finite, only that it was."""
        self.num_steps += 1
        if math.isfinite(norm):
            self.add(1, **terms)
        else:
            self.num_skipped_steps += 1

    def add_gap(self, logprobs: Tensor, micro: MicroBatch, experience: Experience, version: int) -> None:
        """``logprobs`` [B, T] by the weights of ``version``; only samples that it produced alone are compared."""
        same = (experience.versions[micro.experience_rows] == version).to(logprobs.device)
        compared = micro.batch.response_mask & same[:, None]
        self.add(compared.sum(), logprob_gap=(logprobs - micro.sampler_logprobs).abs()[compared].sum())

    def report(self, experience: Experience, version: int, seconds: float) -> UpdateReport:
        """The report of the update to ``version``; KLs are means over responses of k1 sums, from sampling log-probs.

        Before it, what this rank has seen is replaced by what all have.
        """
        sampler = experience.sampler_logprobs
        both = self.sums, self.weights
        seen = torch.tensor([[float(values[name]) for name in self.NAMES] for values in both], dtype=torch.float64)
        for values, totals in zip(both, ranks.add_up(seen).tolist(), strict=True):
            values.update(zip(self.NAMES, totals, strict=True))
        weighted = {name: weight for name in self.NAMES if (weight := self.weights[name])}
        means: dict[str, Any] = {name: None for name in self.NAMES} | {"loss": 0.0}
        means |= {name: self.sums[name] / weight for name, weight in weighted.items()}
        return UpdateReport(
            version=version,
            kl_anchor=float((sampler - experience.anchor_logprobs).sum(1).mean()),
            kl_sft=float((sampler - experience.sft_logprobs).sum(1).mean()),
            seconds=seconds,
            num_skipped_steps=self.num_skipped_steps,
            **means,
        )
