"""Masks, token log-probs and their sums."""

import math

import pytest
import torch

from ocrm_ray.algorithm.logprobs import eos_mask, sequence_logprobs, token_entropy, token_logprobs


def masked_rows(response_ids: list[list[int]], lengths: list[int], eos_ids: tuple[int, ...]) -> list[list[int]]:
    return eos_mask(torch.tensor(response_ids), torch.tensor(lengths), eos_ids).int().tolist()


def test_mask_includes_the_first_eos_and_nothing_after_it():
    assert masked_rows([[5, 2, 7, 2], [2, 5, 5, 5], [5, 5, 5, 2]], [4, 4, 4], (2,)) == [
        [1, 1, 0, 0],
        [1, 0, 0, 0],
        [1, 1, 1, 1],
    ]


def test_whichever_of_several_eos_ids_comes_first_ends_the_response():
    assert masked_rows([[5, 3, 2, 5], [5, 5, 2, 3]], [4, 4], (2, 3)) == [[1, 1, 0, 0], [1, 1, 1, 0]]


def test_a_response_without_eos_counts_to_its_length():
    assert masked_rows([[5, 6, 7, 8], [5, 6, 7, 8]], [4, 2], (2,)) == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_without_eos_ids_only_lengths_count():
    assert masked_rows([[2, 2, 2], [2, 2, 2]], [3, 1], ()) == [[1, 1, 1], [1, 0, 0]]


def test_padding_equal_to_eos_is_not_part_of_the_response():
    assert masked_rows([[5, 6, 2, 2], [5, 6, 2, 2], [2, 2, 2, 2]], [2, 3, 0], (2,)) == [
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [0, 0, 0, 0],
    ]


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs_equal_float64_log_softmax(temperature: float, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn(3, 5, 50, generator=generator)).to(dtype)
    tokens = torch.randint(50, (3, 5), generator=generator)
    oracle = torch.log_softmax(logits.double() / temperature, dim=-1)
    expected = torch.tensor([[oracle[b, t, tokens[b, t]] for t in range(5)] for b in range(3)], dtype=torch.float64)
    result = token_logprobs(logits, tokens, temperature)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-5)


def test_token_logprobs_stay_accurate_where_logits_share_a_large_offset():
    logits = torch.tensor([[[4096.0, 4097.0]]])
    result = token_logprobs(logits, torch.tensor([[0]]), 1.0)
    assert result.item() == pytest.approx(-math.log1p(math.e), rel=1e-6)


def test_gradient_of_a_token_logprob_is_onehot_minus_softmax_over_temperature():
    logits = torch.tensor([[[0.3, -1.0, 2.0]]], requires_grad=True)
    token_logprobs(logits, torch.tensor([[2]]), 0.5).sum().backward()
    expected = (torch.tensor([0.0, 0.0, 1.0]) - torch.softmax(logits[0, 0] / 0.5, dim=-1)) / 0.5
    torch.testing.assert_close(logits.grad[0, 0], expected.detach())


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        token_logprobs(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long), temperature)


def test_entropy_of_hand_computed_distributions():
    uniform, certain, coin = [0.0] * 4, [0.0, -math.inf, -math.inf, -math.inf], [0.0, 0.0, -math.inf, -math.inf]
    result = token_entropy(torch.tensor([[uniform, certain, coin]]), 1.0)
    torch.testing.assert_close(result, torch.tensor([[math.log(4), 0.0, math.log(2)]]))


def test_entropy_is_taken_at_the_temperature():
    logits = torch.tensor([[[1.0, -2.0, 0.5]]])
    probabilities = torch.softmax(logits.double() / 0.7, dim=-1)
    expected = -(probabilities * probabilities.log()).sum(dim=-1)
    torch.testing.assert_close(token_entropy(logits, 0.7).double(), expected, rtol=1e-6, atol=1e-6)


def test_sequence_logprobs_sum_what_is_unmasked_only():
    values = torch.tensor([[-1.0, -2.0, -4.0], [-1.0, math.nan, -math.inf], [-1.0, -2.0, -4.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    assert sequence_logprobs(values, mask).tolist() == [-7.0, -1.0, 0.0]


def test_sequence_logprobs_of_bfloat16_tokens_are_summed_in_float32():
    values = torch.full((1, 1000), -0.40625, dtype=torch.bfloat16)  # exact in bfloat16, its sum is not
    result = sequence_logprobs(values, torch.ones(1, 1000, dtype=torch.bool))
    assert result.dtype == torch.float32
    assert result.item() == -406.25


def test_long_sums_equal_the_float64_reference():
    values = -torch.rand(4, 400, generator=torch.Generator().manual_seed(1)) * 2
    result = sequence_logprobs(values, torch.ones(4, 400, dtype=torch.bool))
    torch.testing.assert_close(result.double(), values.double().sum(dim=1), rtol=1e-6, atol=0)
