"""What crosses process boundaries: frozen dataclasses over Python numbers and numpy arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ocrm_ray.judge import JudgeStatistics

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as text and as tokens (chat template and special tokens included)."""

    prompt_id: int
    text: str
    token_ids: tuple[int, ...]
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Sequence:
    """A prompt and one response, the response up to and including its first EOS."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    has_eos: bool


SequencePair: TypeAlias = tuple[Sequence, Sequence]
Groups: TypeAlias = tuple[tuple[Sequence, ...], ...]
Material: TypeAlias = tuple[tuple[SequencePair, ...], Groups]
"""(extra pairs, groups) of a refit."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Sample ``num_samples`` responses to one prompt, sample i with seed ``seed + i``; low ``priority`` first."""

    request_id: str
    prompt: Prompt
    num_samples: int
    max_new_tokens: int
    temperature: float
    seed: int
    top_p: float = 1.0
    top_k: int = 0
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled response.

    ``logprobs`` [T]: of the distribution actually sampled from (temperature applied). ``first_version`` and
    ``last_version``: policy versions that produced its oldest and its newest token.
    """

    sequence: Sequence
    logprobs: FloatArray
    first_version: int
    last_version: int


@dataclass(frozen=True, slots=True)
class Scores:
    """What the live reward model and the anchor say of one sample, and which versions they were."""

    reward: float
    reward_version: int
    anchor_logprobs: FloatArray
    anchor_version: int
    sft_logprobs: FloatArray


@dataclass(frozen=True, slots=True)
class Rollout:
    """The samples of one prompt: the unit that is generated, scored and trained on together."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    incarnation: int
    scores: tuple[Scores, ...] | None = None
    """One a sample; None before scoring."""

    @property
    def first_version(self) -> int:
        """Policy version of the oldest token."""
        return min(sample.first_version for sample in self.samples)

    @property
    def num_tokens(self) -> int:
        """Response tokens."""
        return sum(len(sample.sequence.response_ids) for sample in self.samples)

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return tuple(sample.sequence for sample in self.samples)

    def with_scores(self, scores: tuple[Scores, ...]) -> "Rollout":
        assert len(scores) == len(self.samples)
        return replace(self, scores=scores)


@dataclass(frozen=True, slots=True)
class Responses:
    """What a refit may take from one rollout: each response with the reward that it was trained with."""

    prompt: Prompt
    sequences: tuple[Sequence, ...]
    rewards: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class OnPolicyState:
    """What is kept between refits; ``taken``: by the latest one, (snapshot version, extra pairs, groups).

    ``taking``: (snapshot version, responses) of one that is still at it.
    """

    latest: tuple[Responses, ...] = ()
    labelled: tuple[SequencePair, ...] = ()
    taken: tuple[int, tuple[SequencePair, ...], Groups] | None = None
    taking: tuple[int, tuple[Responses, ...]] | None = None


@dataclass(frozen=True, slots=True)
class PolicyWeights:
    """Exported policy weights: a segment in the safetensors format, tied heads under their own names.

    It lies at ``path`` on the trainer's node, or is what ``reference`` points to in Ray's object store; it is
    rewritten once it is released. ``checksum``: CRC-32 of the tensors' bytes. ``nccl``: the group that engines get
    them in, where they do not read them, and what is broadcast there.
    """

    version: int
    path: Path
    num_bytes: int
    checksum: int | None = None
    reference: Any = None
    nccl: Any = None


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """One policy update. ``logprob_gap``: mean absolute difference, trainer (before the update) against sampler.

    ``truncated_share``: of the loss tokens, those whose importance weight was cut at its cap. ``num_skipped_steps``:
    optimiser steps not taken, since their gradients were not finite. None: the update had nothing to take it from, such
    as no rollout, none by the trainer's own version (``logprob_gap``), or no step (``grad_norm``).
    """

    version: int
    loss: float
    kl_anchor: float | None
    kl_sft: float | None
    entropy: float | None
    clip_share: float | None
    grad_norm: float | None
    logprob_gap: float | None
    seconds: float
    value_loss: float | None = None
    truncated_share: float | None = None
    num_skipped_steps: int = 0


@dataclass(frozen=True, slots=True)
class PublishReport:
    """One publish to every engine; ``pause_s`` is how long generation stood still.

    ``transfer_s``: until the weights lay checked on the engine's node; ``repack_s``: of turning them into the engine's
    own layout, on CPU while it goes on generating.
    """

    version: int
    num_bytes: int
    seconds: float
    pause_s: float
    transfer_s: float = 0.0
    repack_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RefitRequest:
    """Refit the RM on training pairs ``indices`` [N] with ``weights`` [N] (None: uniform) to ``reward_version``.

    ``extra_pairs``: (chosen, rejected) beside those. ``groups``: on-policy responses to one prompt each, unlabelled.
    """

    reward_version: int
    indices: IntArray
    weights: FloatArray | None
    seed: int
    extra_pairs: tuple[tuple[Sequence, Sequence], ...] = ()
    groups: tuple[tuple[Sequence, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class RefitReport:
    """A finished refit: its model folder, mean loss, accuracy on the held-out pairs; ``figures`` of its strategy."""

    reward_version: int
    path: Path
    loss: float
    heldout_accuracy: float
    seconds: float
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Mean and standard deviation of a reward model's raw scores on the calibration set."""

    mean: float
    std: float


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """One evaluation on the held-out prompts, of the first sample of each.

    Gold fields are None where there is no gold scorer, those of pairs where no prompt has two samples. KL in nats a
    response, mean over prompts: k1 sums log pi - log ref over the tokens, k3 sums exp(-l) - 1 + l of the same l.
    ``_low`` and ``_high``: 95 % Wilson interval.
    """

    step: int
    policy_version: int
    proxy_mean: float
    kl_sft: float
    response_tokens_mean: float
    kl_sft_k3: float
    kl_anchor: float
    """From the anchor that is live when the samples are scored."""
    kl_anchor_k3: float
    gold_mean: float | None = None
    gold_mean_even: float | None = None  # of every other prompt from the first, and
    gold_mean_odd: float | None = None  # of the rest: one half can choose what the other reports
    gold_se: float | None = None
    gold_win_rate: float | None = None
    """Against the SFT model's responses of the first evaluation; a tie counts half."""
    gold_win_rate_low: float | None = None
    gold_win_rate_high: float | None = None
    gold_win_rate_reference: float | None = None
    """Against the prompts' reference responses, of the prompts that have one; a tie counts half."""
    gold_win_rate_reference_low: float | None = None
    gold_win_rate_reference_high: float | None = None
    rm_accuracy: float | None = None
    """Share of on-policy pairs (gold ties left out) that the live RM orders as gold does."""
    rm_accuracy_by_gap: list[float | None] | None = None
    """The same of each third of the pairs by the size of gold's difference, the smallest first."""
    rm_pairs_by_gap: list[int] | None = None
    """Pairs in each third."""
    rm_pair_loss: float | None = None
    """Bradley-Terry loss of the live RM on these pairs with gold's preferences, nats a pair."""
    reward_spread: float | None = None
    """MetaRM's J: mean over prompts with two samples of sigmoid|r1 - r2| / 2 of the live RM, in [0.25, 0.5)."""
    proxy_gold_spearman: float | None = None
    """Rank correlation over prompts; None where one of the two does not vary."""
    proxy_length_correlation: float | None = None
    """Rank correlation of proxy and response tokens."""
    distinct_1: float | None = None
    """Distinct token ids as a share of all response tokens, EOS left out."""
    distinct_2: float | None = None
    """The same of pairs of neighbouring tokens."""
    judge: JudgeStatistics | None = None
    """Where gold is a judge: of the labels and all evaluations since its process started."""
    seconds: float = 0.0
