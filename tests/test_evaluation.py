"""The held-out evaluation, every number worked out by hand."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ocrm_ray.config import JudgeGold
from ocrm_ray.evaluation import HeldoutEvaluator
from ocrm_ray.judge import Judge
from ocrm_ray.praise import EOS, build_tokenizer
from ocrm_ray.records import FloatArray, Prompt, Sample, Sequence
from ocrm_ray.sample_statistics import wilson_interval

TOKENIZER = build_tokenizer()
PROMPTS = tuple(
    Prompt(index, text, tuple(TOKENIZER(text)["input_ids"]), reference)
    for index, (text, reference) in enumerate([("river lamp", "the river"), ("storm train", None), ("bread", "old")])
)


class WordGold:
    """Gold is the number of words; it remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str | None]] = []

    def __call__(self, prompts: list[str], responses: list[str], references: list[str | None]) -> list[float]:
        self.asked += zip(prompts, responses, references, strict=True)
        return [float(len(response.split())) for response in responses]


def sample(text: str, logprobs: list[float] | None = None, version: int = 4) -> Sample:
    ids = tuple(TOKENIZER(text)["input_ids"])
    values = np.zeros(len(ids), np.float32) if logprobs is None else np.array(logprobs, np.float32)
    return Sample(Sequence((1,), ids, text.endswith(EOS)), values, version, version)


class CountingJudge(Judge):
    """Prefers the longer text, without an endpoint."""

    def _answer(self, question: str) -> str:
        first, second = (len(part.split("\n</answer")[0]) for part in question.split("<answer_")[1:])
        return "A" if first > second else "B"


def unmoved(samples: list[tuple[Sample, ...]]) -> list[list[list[FloatArray]]]:
    """Log-probs under SFT model and anchor where both are the policy."""
    return [[[one.logprobs for one in prompt_samples] for prompt_samples in samples]] * 2


def floats(*values: float) -> FloatArray:
    return np.array(values, np.float32)


FIRST = [(sample(f"the {EOS}"), sample(f"the old {EOS}")), (sample(f"the old river {EOS}"),), (sample("warm old"),)]
FIRST_PROXY = [floats(0.5, 0.25), floats(1.0), floats(-3.0)]


def test_a_judges_statistics_are_in_the_report_and_those_of_other_gold_are_not(tmp_path: Path) -> None:
    judge = CountingJudge(JudgeGold(base_url="http://h", model_name="m", cache_file=tmp_path / "answers"))
    prompts = [Prompt(0, "river", (1,), "old")]
    reports = [
        HeldoutEvaluator(prompts, TOKENIZER, gold, 0).evaluate(0, FIRST[1:2], FIRST_PROXY[1:2], *unmoved(FIRST[1:2]))[0]
        for gold in (judge, WordGold(), None)
    ]
    assert reports[0].gold_mean == 1.0
    assert reports[0].judge is not None
    assert reports[0].judge.num_pairs == 1
    assert [report.judge for report in reports[1:]] == [None, None]


def test_first_evaluation_by_hand() -> None:
    gold = WordGold()
    evaluator = HeldoutEvaluator(PROMPTS, TOKENIZER, gold, num_samples_saved=2)
    report, rows = evaluator.evaluate(0, FIRST, FIRST_PROXY, *unmoved(FIRST))
    # Gold of the first samples: 1, 3, 2. The pair of prompt 0 has gold 1 < 2 and proxy 0.5 > 0.25.
    assert report.gold_mean == pytest.approx(2.0)
    assert (report.gold_mean_even, report.gold_mean_odd) == (1.5, 3.0)
    assert report.gold_se == pytest.approx(1 / math.sqrt(3))
    assert report.gold_win_rate == 0.5
    assert (report.gold_win_rate_low, report.gold_win_rate_high) == wilson_interval(0.5, 3)
    # Words of the references: 2 and 1, of the two prompts that have one: lost, won.
    assert report.gold_win_rate_reference == 0.5
    bounds = report.gold_win_rate_reference_low, report.gold_win_rate_reference_high
    assert bounds == wilson_interval(0.5, 2)
    assert (report.rm_accuracy, report.rm_accuracy_by_gap, report.rm_pairs_by_gap) == (
        0.0,
        [0.0, None, None],
        [1, 0, 0],
    )
    assert report.rm_pair_loss == pytest.approx(math.log1p(math.exp(0.25)))
    assert report.reward_spread == pytest.approx(0.5 / (1 + math.exp(-0.25)))
    # Ranks of proxy 2, 3, 1, of gold 1, 3, 2, of length 1.5, 3, 1.5.
    assert report.proxy_gold_spearman == pytest.approx(0.5)
    assert report.proxy_length_correlation == pytest.approx(1.5 / math.sqrt(2 * 1.5))
    # the | the old river | warm old: EOS is not counted.
    assert (report.distinct_1, report.distinct_2) == (pytest.approx(4 / 6), 1.0)
    assert report.proxy_mean == pytest.approx(-0.5)
    assert (report.kl_sft, report.kl_sft_k3, report.kl_anchor, report.kl_anchor_k3) == (0.0, 0.0, 0.0, 0.0)
    assert report.response_tokens_mean == pytest.approx((2 + 4 + 2) / 3)
    assert (report.step, report.policy_version, report.seconds) == (0, 4, 0.0)
    assert rows == [
        {"step": 0, "prompt": "river lamp", "response": "the", "proxy": 0.5, "gold": 1.0, "length": 2},
        {"step": 0, "prompt": "storm train", "response": "the old river", "proxy": 1.0, "gold": 3.0, "length": 4},
    ]
    assert gold.asked == [
        ("river lamp", "the", "the river"),
        ("river lamp", "the old", "the river"),
        ("storm train", "the old river", None),
        ("bread", "warm old", "old"),
        ("river lamp", "the river", "the river"),
        ("bread", "old", "old"),
    ]


def test_later_evaluations_are_compared_with_the_first() -> None:
    evaluator = HeldoutEvaluator(PROMPTS, TOKENIZER, WordGold(), num_samples_saved=0)
    evaluator.evaluate(0, FIRST, FIRST_PROXY, *unmoved(FIRST))
    later = [(sample("the old"),), (sample("the old river"),), (sample("warm"),)]
    proxy = [floats(0.0)] * 3
    # Gold 2, 3, 1 against 1, 3, 2: won, tied, lost.
    assert evaluator.evaluate(10, later, proxy, *unmoved(later))[0].gold_win_rate == pytest.approx(0.5)
    best = [(sample("the old"),), (sample("the old river"),), (sample("warm old warm"),)]
    assert evaluator.evaluate(20, best, proxy, *unmoved(best))[0].gold_win_rate == pytest.approx(2.5 / 3)


def test_references_are_scored_once() -> None:
    gold = WordGold()
    evaluator = HeldoutEvaluator(PROMPTS, TOKENIZER, gold, num_samples_saved=0)
    evaluator.evaluate(0, FIRST, FIRST_PROXY, *unmoved(FIRST))
    gold.asked.clear()
    later = [(sample("the old river"),), (sample("the"),), (sample("warm"),)]
    report, _ = evaluator.evaluate(10, later, [floats(0.0)] * 3, *unmoved(later))
    assert [response for _, response, _ in gold.asked] == ["the old river", "the", "warm"]
    assert report.gold_win_rate_reference == 0.75  # 3 against 2, 1 against 1


def test_a_reference_is_scored_against_itself_whatever_spaces_its_prompt_needs() -> None:
    gold, samples = WordGold(), [(sample("the"),)]
    prompts = [replace(PROMPTS[0], reference=" the river")]
    HeldoutEvaluator(prompts, TOKENIZER, gold, 0).evaluate(0, samples, [floats(0.0)], *unmoved(samples))
    assert gold.asked[1:] == [("river lamp", "the river", "the river")]


def test_without_references_there_is_no_win_rate_against_them() -> None:
    samples = [(sample("the"),)]
    evaluator = HeldoutEvaluator(PROMPTS[1:2], TOKENIZER, WordGold(), 0)
    report, _ = evaluator.evaluate(0, samples, [floats(0.0)], *unmoved(samples))
    assert (report.gold_win_rate, report.gold_win_rate_reference, report.gold_win_rate_reference_low) == (
        0.5,
        None,
        None,
    )


def test_kl_is_the_mean_over_prompts_of_the_summed_terms() -> None:
    samples = [
        (sample("the old", [-1.0, -2.0]), sample("the", [-100.0])),
        (sample("the", [-0.5]),),
        (sample("the old river", [-1.0, -1.0, -1.0]),),
    ]
    sft = [[floats(-1.5, -2.5), floats(0.0)], [floats(-0.25)], [floats(-2.0, -2.0, -0.5)]]
    proxy = [floats(0.0, 0.0), floats(0.0), floats(0.0)]
    anchor = [[sample.logprobs for sample in prompt_samples] for prompt_samples in samples]
    anchor[1] = [floats(-2.5)]
    report, _ = HeldoutEvaluator(PROMPTS, TOKENIZER, None, 0).evaluate(1, samples, proxy, sft, anchor)
    # Log-ratios 0.5, 0.5 | -0.25 | 1, 1, -0.5; the second sample of prompt 0 does not count.
    assert report.kl_sft == pytest.approx(2.25 / 3)
    terms = [math.exp(-x) - 1 + x for x in (0.5, 0.5, -0.25, 1.0, 1.0, -0.5)]
    assert report.kl_sft_k3 == pytest.approx(sum(terms) / 3)
    assert report.kl_anchor == pytest.approx(2.0 / 3)
    assert report.kl_anchor_k3 == pytest.approx((math.exp(-2) + 1) / 3)


def test_without_gold_its_fields_are_none_and_the_rest_is_there() -> None:
    evaluator = HeldoutEvaluator(PROMPTS, TOKENIZER, None, num_samples_saved=5)
    report, rows = evaluator.evaluate(3, FIRST, FIRST_PROXY, *unmoved(FIRST))
    assert (report.gold_mean, report.gold_se, report.gold_win_rate, report.rm_accuracy) == (None, None, None, None)
    assert (report.rm_pair_loss, report.gold_win_rate_reference, report.proxy_gold_spearman) == (None, None, None)
    assert report.proxy_mean == pytest.approx(-0.5)
    assert report.reward_spread == pytest.approx(0.5 / (1 + math.exp(-0.25)))
    assert [row["gold"] for row in rows] == [None, None, None]
    assert evaluator.sft_gold is None


def test_without_second_samples_there_is_no_accuracy() -> None:
    samples = [(one[0],) for one in FIRST]
    evaluator = HeldoutEvaluator(PROMPTS, TOKENIZER, WordGold(), 0)
    assert evaluator.evaluate(0, samples, [floats(0.0)] * 3, *unmoved(samples))[0].rm_accuracy is None
    assert evaluator.evaluate(10, samples, [floats(0.0)] * 3, *unmoved(samples))[0].reward_spread is None


def test_a_single_prompt_has_no_standard_error() -> None:
    evaluator = HeldoutEvaluator(PROMPTS[:1], TOKENIZER, WordGold(), 0)
    report, _ = evaluator.evaluate(0, FIRST[:1], FIRST_PROXY[:1], *unmoved(FIRST[:1]))
    assert (report.gold_mean, report.gold_mean_even, report.gold_mean_odd, report.gold_se) == (1.0, 1.0, None, None)


def test_the_version_is_that_of_the_oldest_token() -> None:
    samples = [(sample("the", version=7),), (sample("the", version=6),), (sample("the", version=7),)]
    report, _ = HeldoutEvaluator(PROMPTS, TOKENIZER, None, 0).evaluate(7, samples, [floats(0.0)] * 3, *unmoved(samples))
    assert report.policy_version == 6


def test_an_empty_response_is_measured() -> None:
    samples = [(sample(EOS),), (sample(EOS),), (sample("the"),)]
    evaluator = HeldoutEvaluator(PROMPTS, TOKENIZER, WordGold(), 3)
    report, rows = evaluator.evaluate(0, samples, [floats(0.0)] * 3, *unmoved(samples))
    assert [row["response"] for row in rows] == ["", "", "the"]
    assert report.gold_mean == pytest.approx(1 / 3)
    assert (report.distinct_1, report.distinct_2) == (1.0, None)


def test_rows_hold_plain_numbers_for_json() -> None:
    _, rows = HeldoutEvaluator(PROMPTS, TOKENIZER, WordGold(), 3).evaluate(0, FIRST, FIRST_PROXY, *unmoved(FIRST))
    assert {type(value) for row in rows for value in row.values()} == {int, float, str}
