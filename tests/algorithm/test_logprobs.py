"""Token log-probs and their sums."""

import math

import pytest
import torch

from ocrm_ray.algorithm.logprobs import head_logprobs, log_collision, sequence_logprobs, token_entropy


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    return head_logprobs(torch.nn.Identity(), logits, tokens, temperature, 4)[0]


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs_equal_float64_log_softmax(temperature: float, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn(15, 50, generator=generator)).to(dtype)
    tokens = torch.randint(50, (15,), generator=generator)
    expected = torch.log_softmax(logits.double() / temperature, dim=-1)[torch.arange(15), tokens]
    result = token_logprobs(logits, tokens, temperature)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-5)


def test_token_logprobs_stay_accurate_where_logits_share_a_large_offset():
    logits = torch.tensor([[4096.0, 4097.0]])
    result = token_logprobs(logits, torch.tensor([0]), 1.0)
    assert result.item() == pytest.approx(-math.log1p(math.e), rel=1e-6)


def test_gradient_of_a_token_logprob_is_onehot_minus_softmax_over_temperature():
    logits = torch.tensor([[0.3, -1.0, 2.0]], requires_grad=True)
    token_logprobs(logits, torch.tensor([2]), 0.5).sum().backward()
    expected = (torch.tensor([0.0, 0.0, 1.0]) - torch.softmax(logits[0] / 0.5, dim=-1)) / 0.5
    torch.testing.assert_close(logits.grad[0], expected.detach())


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        token_logprobs(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), temperature)


def test_entropy_of_hand_computed_distributions():
    uniform, certain, coin = [0.0] * 4, [0.0, -math.inf, -math.inf, -math.inf], [0.0, 0.0, -math.inf, -math.inf]
    result = token_entropy(torch.tensor([uniform, certain, coin]), 1.0)
    torch.testing.assert_close(result, torch.tensor([math.log(4), 0.0, math.log(2)]))


def test_entropy_is_taken_at_the_temperature():
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    probabilities = torch.softmax(logits.double() / 0.7, dim=-1)
    expected = -(probabilities * probabilities.log()).sum(dim=-1)
    torch.testing.assert_close(token_entropy(logits, 0.7).double(), expected, rtol=1e-6, atol=1e-6)


def test_collision_of_hand_computed_distributions():
    uniform, certain, coin = [0.0] * 4, [0.0, -math.inf, -math.inf, -math.inf], [0.0, 0.0, -math.inf, -math.inf]
    thirds = [math.log(2), 0.0, -math.inf, -math.inf]
    result = log_collision(torch.tensor([uniform, certain, coin, thirds]), 1.0)
    torch.testing.assert_close(result.exp(), torch.tensor([1 / 4, 1.0, 1 / 2, 5 / 9]))


@pytest.mark.parametrize("temperature", [0.01, 0.7, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collision_equals_the_float64_sum_of_squared_probabilities(temperature: float, dtype: torch.dtype):
    logits = (10 * torch.randn(15, 50, generator=torch.Generator().manual_seed(3))).to(dtype)
    expected = torch.softmax(logits.double() / temperature, dim=-1).square().sum(dim=-1).log()
    result = log_collision(logits, temperature)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


def through_a_head(chunk_size: int, temperature: float = 0.7, statistic=token_entropy):
    """Log-probs, statistic and gradients (of hidden states and of the head), and how many rows each call of it had."""
    generator = torch.Generator().manual_seed(2)
    hidden, upstream = torch.randn(11, 6, generator=generator).requires_grad_(), torch.randn(11, generator=generator)
    weight = torch.randn(50, 6, generator=generator).requires_grad_()
    tokens, rows = torch.randint(50, (11,), generator=generator), []

    def head(part: torch.Tensor) -> torch.Tensor:
        rows.append(len(part))
        return part @ weight.T

    found, statistics = head_logprobs(head, hidden, tokens, temperature, chunk_size, statistic=statistic)
    found.backward(upstream)
    return (found.detach(), statistics, hidden.grad, weight.grad), rows


@pytest.mark.parametrize("chunk_size", [1, 4, 10])
@pytest.mark.parametrize("statistic", [token_entropy, log_collision])
def test_chunks_of_the_head_change_neither_values_nor_gradients(chunk_size: int, statistic):
    in_chunks, whole = (through_a_head(size, statistic=statistic)[0] for size in (chunk_size, 11))
    for value, expected in zip(in_chunks, whole, strict=True):
        torch.testing.assert_close(value, expected)


def test_statistic_through_the_head_is_that_of_its_logits_at_the_temperature():
    generator = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(7, 6, generator=generator), torch.randn(50, 6, generator=generator)
    tokens = torch.zeros(7, dtype=torch.long)
    _, found = head_logprobs(lambda part: part @ weight.T, hidden, tokens, 0.5, 4, statistic=log_collision)
    expected = torch.softmax((hidden @ weight.T).double() / 0.5, dim=-1).square().sum(dim=-1).log()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_gradient_through_the_head_is_the_closed_form_in_float64():
    generator = torch.Generator().manual_seed(2)
    hidden, upstream = torch.randn(11, 6, generator=generator).double(), torch.randn(11, generator=generator).double()
    weight, tokens = torch.randn(50, 6, generator=generator).double(), torch.randint(50, (11,), generator=generator)
    of_logits = torch.nn.functional.one_hot(tokens, 50) - torch.softmax(hidden @ weight.T / 0.7, dim=-1)
    of_logits *= upstream[:, None] / 0.7
    _, _, of_hidden, of_weight = through_a_head(4)[0]
    torch.testing.assert_close(of_hidden.double(), of_logits @ weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(of_weight.double(), of_logits.T @ hidden, atol=1e-5, rtol=1e-5)


def test_every_chunk_but_the_last_is_computed_again_and_none_is_larger():
    assert through_a_head(4)[1] == [4, 4, 3, 4, 4]
    assert through_a_head(11)[1] == [11]


def test_backward_pass_does_not_compute_the_statistic_again():
    calls = []
    through_a_head(4, statistic=lambda logits, *args: calls.append(len(logits)) or token_entropy(logits, *args))
    assert calls == [4, 4, 3]


def test_only_the_last_chunk_of_logits_is_kept_for_the_backward_pass():
    kept = {}
    hidden, head = torch.randn(12, 6, requires_grad=True), torch.nn.Linear(6, 50)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.data_ptr(), tensor), lambda t: t
    ):
        head_logprobs(head, hidden, torch.zeros(12, dtype=torch.long), 1.0, 4)
    assert [tensor.shape for tensor in kept.values() if tensor.shape[1:] == (50,) and len(tensor) != 6] == [(4, 50)]


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
