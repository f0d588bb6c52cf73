"""Measuring held-out samples: gold, win rate against the SFT model, the reward model's on-policy accuracy, KL."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from ocrm_ray.gold import GoldScorer
from ocrm_ray.records import EvaluationReport, FloatArray, Prompt, Sample

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
    sft_gold: npt.NDArray[np.float64] | None = field(default=None, init=False)
    """Gold scores [N] of the first evaluation."""

    def evaluate(
        self, step: int, samples: Seq[tuple[Sample, ...]], proxy: Seq[FloatArray], sft_logprobs: Seq[Seq[FloatArray]]
    ) -> tuple[EvaluationReport, list[SampleRow]]:
        """Measure one or two samples of every prompt, with their proxy scores and SFT log-probs [T].

        ``kl_sft`` is the mean over prompts of sum_t(log pi - log pi_sft) (the k1 estimator, in nats a response);
        the first evaluation's scores become ``sft_gold``. The caller fills ``seconds``.
        """
        assert len(self.prompts) == len(samples) == len(proxy) == len(sft_logprobs)
        first = [prompt_samples[0] for prompt_samples in samples]
        ids = [[list(sample.sequence.response_ids) for sample in prompt_samples] for prompt_samples in samples]
        texts = [self.tokenizer.batch_decode(each, skip_special_tokens=True) for each in ids]
        responses = [[text.strip() for text in prompt_texts] for prompt_texts in texts]
        gold = None if self.gold is None else self._gold_scores(self.gold, responses)
        report = EvaluationReport(
            step=step,
            policy_version=min(sample.first_version for sample in first),
            proxy_mean=_mean([scores[0] for scores in proxy]),
            kl_sft=_mean([_log_ratio(sample, sft[0]) for sample, sft in zip(first, sft_logprobs, strict=True)]),
            response_tokens_mean=_mean([len(sample.sequence.response_ids) for sample in first]),
            **({} if gold is None else self._gold_measures(gold, proxy)),
        )
        rows: list[SampleRow] = [
            {
                "step": step,
                "prompt": prompt.text,
                "response": responses[index][0],
                "proxy": float(proxy[index][0]),
                "gold": None if gold is None else gold[index][0],
                "length": len(first[index].sequence.response_ids),
            }
            for index, prompt in enumerate(self.prompts[: self.num_samples_saved])
        ]
        return report, rows

    def _gold_scores(self, gold: GoldScorer, responses: list[list[str]]) -> list[list[float]]:
        """Gold scores shaped like ``responses``, from one call of the scorer."""
        owners = [prompt for prompt, texts in zip(self.prompts, responses, strict=True) for _ in texts]
        references = [prompt.reference for prompt in owners]
        scores = iter(gold([prompt.text for prompt in owners], list(chain(*responses)), references))
        return [list(islice(scores, len(texts))) for texts in responses]

    def _gold_measures(self, gold: list[list[float]], proxy: Seq[FloatArray]) -> dict[str, Any]:
        first = np.array([scores[0] for scores in gold])
        if self.sft_gold is None:
            self.sft_gold = first
        pairs = [[np.asarray(scores) for scores in scored if len(scores) > 1] for scored in (gold, proxy)]
        return {
            "gold_mean": float(first.mean()),
            "gold_mean_even": _mean(first[::2]),
            "gold_mean_odd": _mean(first[1::2]) if len(first) > 1 else None,
            "gold_se": float(first.std(ddof=1) / np.sqrt(len(first))) if len(first) > 1 else None,
            "gold_win_rate": win_rate(first, self.sft_gold),
            "rm_accuracy": pair_accuracy(pairs[0], pairs[1]),
        }


def win_rate(gold: npt.NDArray[np.float64], baseline: npt.NDArray[np.float64]) -> float:
    """Share of the prompts [N] on which ``gold`` is above ``baseline``; a tie counts half."""
    assert gold.shape == baseline.shape
    return float((1 + np.sign(gold - baseline)).mean() / 2)


def pair_accuracy(gold: npt.ArrayLike, proxy: npt.ArrayLike) -> float | None:
    """Share of pairs [N, 2] that proxy orders as gold does, a proxy tie counting half; gold ties are left out.

    None if no pair is left.
    """
    ours, theirs = (np.sign(np.diff(np.reshape(scores, (-1, 2)))) for scores in (gold, proxy))
    decided = ours != 0
    return _mean((1 + ours * theirs)[decided] / 2) if decided.any() else None


def _log_ratio(sample: Sample, sft_logprobs: FloatArray) -> float:
    assert sample.logprobs.shape == sft_logprobs.shape
    return float(np.sum(sample.logprobs, dtype=np.float64) - np.sum(sft_logprobs, dtype=np.float64))


def _mean(values: Any) -> float:
    return float(np.mean(values, dtype=np.float64))
