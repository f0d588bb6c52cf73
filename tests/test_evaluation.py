"""The held-out evaluation, every number worked out by hand."""

import math

import numpy as np
import pytest

from ocrm_ray.evaluation import HeldoutEvaluator, pair_accuracy, win_rate
from ocrm_ray.praise import EOS, build_tokenizer
from ocrm_ray.records import FloatArray, Prompt, Sample, Sequence

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


def zeros(samples: list[tuple[Sample, ...]]) -> list[list[FloatArray]]:
    return [[np.zeros_like(one.logprobs) for one in prompt_samples] for prompt_samples in samples]


def floats(*values: float) -> FloatArray:
    return np.array(values, np.float32)


FIRST = [(sample(f"the {EOS}"), sample(f"the old {EOS}")), (sample(f"the old river {EOS}"),), (sample("warm old"),)]
FIRST_PROXY = [floats(0.5, 0.25), floats(1.0), floats(-3.0)]


def test_first_evaluation_by_hand() -> None:
    gold = WordGold()
    evaluator = HeldoutEvaluator(PROMPTS, TOKENIZER, gold, num_samples_saved=2)
    report, rows = evaluator.evaluate(0, FIRST, FIRST_PROXY, zeros(FIRST))
    # Gold of the first samples: 1, 3, 2. The pair of prompt 0 has gold 1 < 2 and proxy 0.5 > 0.25.
    assert report.gold_mean == pytest.approx(2.0)
    assert (report.gold_mean_even, report.gold_mean_odd) == (1.5, 3.0)
    assert report.gold_se == pytest.approx(1 / math.sqrt(3))
    assert report.gold_win_rate == 0.5
    assert report.rm_accuracy == 0.0
    assert report.proxy_mean == pytest.approx(-0.5)
    assert report.kl_sft == 0.0
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
    ]


def test_later_evaluations_are_compared_with_the_first() -> None:
    evaluator = HeldoutEvaluator(PROMPTS, TOKENIZER, WordGold(), num_samples_saved=0)
    evaluator.evaluate(0, FIRST, FIRST_PROXY, zeros(FIRST))
    later = [(sample("the old"),), (sample("the old river"),), (sample("warm"),)]
    proxy = [floats(0.0)] * 3
    # Gold 2, 3, 1 against 1, 3, 2: won, tied, lost.
    assert evaluator.evaluate(10, later, proxy, zeros(later))[0].gold_win_rate == pytest.approx(0.5)
    best = [(sample("the old"),), (sample("the old river"),), (sample("warm old warm"),)]
    assert evaluator.evaluate(20, best, proxy, zeros(best))[0].gold_win_rate == pytest.approx(2.5 / 3)


def test_kl_is_the_mean_over_prompts_of_the_summed_log_ratio() -> None:
    samples = [
        (sample("the old", [-1.0, -2.0]), sample("the", [-100.0])),
        (sample("the", [-0.5]),),
        (sample("the old river", [-1.0, -1.0, -1.0]),),
    ]
    sft = [[floats(-1.5, -2.5), floats(0.0)], [floats(-0.25)], [floats(-2.0, -2.0, -0.5)]]
    proxy = [floats(0.0, 0.0), floats(0.0), floats(0.0)]
    report, _ = HeldoutEvaluator(PROMPTS, TOKENIZER, None, 0).evaluate(1, samples, proxy, sft)
    # (1.0 - 0.25 + 1.5) / 3; the second sample of prompt 0 does not count.
    assert report.kl_sft == pytest.approx(2.25 / 3)


def test_without_gold_its_fields_are_none_and_the_rest_is_there() -> None:
    evaluator = HeldoutEvaluator(PROMPTS, TOKENIZER, None, num_samples_saved=5)
    report, rows = evaluator.evaluate(3, FIRST, FIRST_PROXY, zeros(FIRST))
    assert (report.gold_mean, report.gold_se, report.gold_win_rate, report.rm_accuracy) == (None, None, None, None)
    assert report.proxy_mean == pytest.approx(-0.5)
    assert [row["gold"] for row in rows] == [None, None, None]
    assert evaluator.sft_gold is None


def test_without_second_samples_there_is_no_accuracy() -> None:
    samples = [(one[0],) for one in FIRST]
    evaluator = HeldoutEvaluator(PROMPTS, TOKENIZER, WordGold(), 0)
    assert evaluator.evaluate(0, samples, [floats(0.0)] * 3, zeros(samples))[0].rm_accuracy is None


def test_a_single_prompt_has_no_standard_error() -> None:
    evaluator = HeldoutEvaluator(PROMPTS[:1], TOKENIZER, WordGold(), 0)
    report, _ = evaluator.evaluate(0, FIRST[:1], FIRST_PROXY[:1], zeros(FIRST[:1]))
    assert (report.gold_mean, report.gold_mean_even, report.gold_mean_odd, report.gold_se) == (1.0, 1.0, None, None)


def test_the_version_is_that_of_the_oldest_token() -> None:
    samples = [(sample("the", version=7),), (sample("the", version=6),), (sample("the", version=7),)]
    report, _ = HeldoutEvaluator(PROMPTS, TOKENIZER, None, 0).evaluate(7, samples, [floats(0.0)] * 3, zeros(samples))
    assert report.policy_version == 6


def test_an_empty_response_is_measured() -> None:
    samples = [(sample(EOS),), (sample(EOS),), (sample("the"),)]
    evaluator = HeldoutEvaluator(PROMPTS, TOKENIZER, WordGold(), 3)
    report, rows = evaluator.evaluate(0, samples, [floats(0.0)] * 3, zeros(samples))
    assert [row["response"] for row in rows] == ["", "", "the"]
    assert report.gold_mean == pytest.approx(1 / 3)


def test_rows_hold_plain_numbers_for_json() -> None:
    _, rows = HeldoutEvaluator(PROMPTS, TOKENIZER, WordGold(), 3).evaluate(0, FIRST, FIRST_PROXY, zeros(FIRST))
    assert {type(value) for row in rows for value in row.values()} == {int, float, str}


def test_win_rate_counts_a_tie_half() -> None:
    assert win_rate(np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 2.0, 4.0, 0.0])) == pytest.approx(2 / 4)


def test_pair_accuracy_leaves_gold_ties_out_and_counts_proxy_ties_half() -> None:
    gold = [(1.0, 2.0), (2.0, 1.0), (1.0, 1.0), (3.0, 1.0)]
    proxy = [(0.1, 0.3), (0.1, 0.3), (9.0, 0.0), (0.5, 0.5)]
    assert pair_accuracy(gold, proxy) == pytest.approx((1 + 0 + 0.5) / 3)
    assert pair_accuracy([(1.0, 1.0)], [(0.0, 1.0)]) is None
    assert pair_accuracy([], []) is None
