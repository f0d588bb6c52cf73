"""Measuring held-out samples: gold and win rates, the reward model on on-policy pairs, KL, diversity."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import Any

import numpy as np

from ocrm_ray.gold import GoldScorer
from ocrm_ray.judge import Judge
from ocrm_ray.records import EvaluationReport, FloatArray, Prompt, Sample, Sequence
from ocrm_ray.sample_statistics import (
    PairOrder,
    Values,
    distinct_share,
    kl_estimates,
    mean_spread,
    spearman,
    wilson_interval,
    win_rate,
)

SampleRow = dict[str, object]


@dataclass
class HeldoutEvaluator:
    """Turns the samples of fixed prompts into a report and the rows that people read.

    The first sample of every prompt is what is measured; a prompt's second sample only serves the on-policy pairs,
    so that no prompt counts twice. Gold may be None: its fields are None then.
    """

    prompts: Seq[Prompt]
    tokenizer: Any
    gold: GoldScorer | None
    num_samples_saved: int
    sft_gold: Values | None = field(default=None, init=False)
    """Gold scores [N] of the first evaluation."""

    def evaluate(
        self,
        step: int,
        samples: Seq[tuple[Sample, ...]],
        proxy: Seq[FloatArray],
        sft_logprobs: Seq[Seq[FloatArray]],
        anchor_logprobs: Seq[Seq[FloatArray]],
    ) -> tuple[EvaluationReport, list[SampleRow]]:
        """Measure one or two samples of every prompt: their proxy scores, log-probs [T] under SFT model and anchor.

        The first evaluation's scores become ``sft_gold``. The caller fills ``seconds``.
        """
        assert len(self.prompts) == len(samples) == len(proxy) == len(sft_logprobs) == len(anchor_logprobs)
        first = [prompt_samples[0] for prompt_samples in samples]
        first_proxy = [float(scores[0]) for scores in proxy]
        lengths = [len(sample.sequence.response_ids) for sample in first]
        words = [sample.sequence.response_ids[: -1 if sample.sequence.has_eos else None] for sample in first]
        responses = [self.texts([each.sequence for each in prompt_samples]) for prompt_samples in samples]
        gold = None if self.gold is None else self._gold_scores(self.gold, responses)
        kl_sft, kl_sft_k3 = _mean_kl(first, sft_logprobs)
        kl_anchor, kl_anchor_k3 = _mean_kl(first, anchor_logprobs)
        report = EvaluationReport(
            step=step,
            policy_version=min(sample.first_version for sample in first),
            proxy_mean=_mean(first_proxy),
            kl_sft=kl_sft,
            kl_sft_k3=kl_sft_k3,
            kl_anchor=kl_anchor,
            kl_anchor_k3=kl_anchor_k3,
            response_tokens_mean=_mean(lengths),
            reward_spread=mean_spread(_pairs(proxy)),
            proxy_length_correlation=spearman(first_proxy, lengths),
            distinct_1=distinct_share(words, 1),
            distinct_2=distinct_share(words, 2),
            **({} if gold is None else self._gold_measures(gold, proxy)),
        )
        rows: list[SampleRow] = [
            {
                "step": step,
                "prompt": prompt.text,
                "response": responses[index][0],
                "proxy": first_proxy[index],
                "gold": None if gold is None else gold[index][0],
                "length": lengths[index],
            }
            for index, prompt in enumerate(self.prompts[: self.num_samples_saved])
        ]
        return report, rows

    def texts(self, sequences: Seq[Sequence]) -> list[str]:
        """Responses as gold reads them."""
        ids = [list(sequence.response_ids) for sequence in sequences]
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _gold_scores(self, gold: GoldScorer, responses: list[list[str]]) -> list[list[float]]:
        """Gold scores shaped like ``responses``, from one call of the scorer."""
        owners = [prompt for prompt, texts in zip(self.prompts, responses, strict=True) for _ in texts]
        references = [prompt.reference for prompt in owners]
        scores = iter(gold([prompt.text for prompt in owners], list(chain(*responses)), references))
        return [list(islice(scores, len(texts))) for texts in responses]

    @cached_property
    def _reference_gold(self) -> Values:
        """Gold scores [N] of the prompts' own references, NaN where there is none.

        The scorer gets a reference as response and as reference: a judge, who finds them equal, is not asked.
        """
        assert self.gold is not None
        known = {index: p.reference.strip() for index, p in enumerate(self.prompts) if p.reference is not None}
        scores = np.full(len(self.prompts), np.nan)
        if known:
            texts, references = [self.prompts[index].text for index in known], list(known.values())
            scores[list(known)] = self.gold(texts, references, [*references])
        return scores

    def _gold_measures(self, gold: list[list[float]], proxy: Seq[FloatArray]) -> dict[str, Any]:
        first = np.array([scores[0] for scores in gold])
        if self.sft_gold is None:
            self.sft_gold = first
        has_reference = np.isfinite(self._reference_gold)
        order = PairOrder(_pairs(gold), _pairs(proxy))
        by_gap, pairs_by_gap = order.by_gap()
        return {
            "gold_mean": float(first.mean()),
            "gold_mean_even": float(first[::2].mean()),
            "gold_mean_odd": float(first[1::2].mean()) if len(first) > 1 else None,
            "gold_se": float(first.std(ddof=1) / np.sqrt(len(first))) if len(first) > 1 else None,
            **_win_rate_fields("gold_win_rate", first, self.sft_gold),
            **_win_rate_fields("gold_win_rate_reference", first[has_reference], self._reference_gold[has_reference]),
            "rm_accuracy": order.accuracy(),
            "rm_accuracy_by_gap": by_gap,
            "rm_pairs_by_gap": pairs_by_gap,
            "rm_pair_loss": order.loss(),
            "proxy_gold_spearman": spearman([scores[0] for scores in proxy], first),
            "judge": self.gold.statistics if isinstance(self.gold, Judge) else None,
        }


def _win_rate_fields(name: str, gold: Values, baseline: Values) -> dict[str, float]:
    """The share and its interval; nothing where there is nothing to compare."""
    if not len(gold):
        return {}
    share = win_rate(gold, baseline)
    low, high = wilson_interval(share, len(gold))
    return {name: share, f"{name}_low": low, f"{name}_high": high}


def _mean_kl(first: Seq[Sample], logprobs: Seq[Seq[FloatArray]]) -> tuple[float, float]:
    """Means over prompts of k1 and k3, nats a response."""
    terms = [kl_estimates(sample.logprobs, under[0]) for sample, under in zip(first, logprobs, strict=True)]
    k1, k3 = np.mean(terms, axis=0)
    return float(k1), float(k3)


def _pairs(scores: Seq[Any]) -> list[Any]:
    """Those of the prompts with two samples."""
    return [each for each in scores if len(each) > 1]


def _mean(values: Seq[float]) -> float:
    return float(np.mean(values, dtype=np.float64))
