"""The backward pass of attention against float64, beside that of torch's own kernel."""

import json

import pytest
import torch
from tiny_models import EOS, build_policy, build_tokenizer, pad_batch
from torch.nn.functional import scaled_dot_product_attention

from ocrm_ray import attention
from ocrm_ray.networks import load_causal_lm, response_logprobs, save_model
from ocrm_ray.records import Sequence

SEQUENCES = [Sequence((5, 6, 7), (8, 9, 10, EOS), True), Sequence((11,), (12, EOS), True)]


def gradients(attend, dtype, num_groups):
    """Of queries, keys and values of 6 heads over ``num_groups`` groups, in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, heads, 20, 16) for heads in (6, num_groups, num_groups, 6)]
    *inputs, upstream = (torch.randn(shape, generator=generator).bfloat16().to(dtype) for shape in shapes)
    inputs = [tensor.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in inputs]
    output = attend(*inputs)
    output.backward(upstream)
    return [tensor.grad.double() for tensor in inputs]


def fused(query, key, value):
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)


def with_products(query, key, value):
    return attention._Causal.apply(query, key, value, None, 0.3)


def two_responses_to_one_prompt(num_rows):
    """[num_rows, 1, 20, 20]: 6 tokens of prompt, then 9 of one response and 5 of the other."""
    part = torch.tensor([0] * 6 + [1] * 9 + [2] * 5)
    return ((part[:, None] == part) | (part == 0)).tril().expand(num_rows, 1, 20, 20)


@pytest.mark.parametrize("num_groups", [1, 2, 6])
def test_gradient_is_that_of_attention_in_float64(num_groups):
    expected = gradients(fused, torch.float64, num_groups)
    for gradient, other in zip(gradients(with_products, torch.float64, num_groups), expected, strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("num_groups", [2, 6])
def test_gradient_under_a_mask_is_that_of_attention_in_float64(num_groups):
    mask = two_responses_to_one_prompt(3)
    found, expected = (
        gradients(attend, torch.float64, num_groups)
        for attend in (
            lambda *inputs: attention._Causal.apply(*inputs, mask, 0.3),
            lambda *inputs: scaled_dot_product_attention(*inputs, attn_mask=mask, scale=0.3, enable_gqa=True),
        )
    )
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("num_groups", [2, 6])
def test_in_bfloat16_it_is_about_as_exact_as_the_fused_kernel(num_groups):
    exact = gradients(fused, torch.float64, num_groups)
    errors = [
        [(gradient - other).norm() / other.norm() for gradient, other in zip(found, exact, strict=True)]
        for found in (gradients(attend, torch.bfloat16, num_groups) for attend in (with_products, fused))
    ]
    assert all(ours < 2 * theirs for ours, theirs in zip(*errors, strict=True))


def test_loaded_network_trains_through_it_in_bfloat16_only(tmp_path, monkeypatch):
    save_model(build_policy(), build_tokenizer(), tmp_path / "lm")
    calls, original = [], attention._Causal.backward
    backward = staticmethod(lambda ctx, upstream: calls.append(upstream.dtype) or original(ctx, upstream))
    monkeypatch.setattr(attention._Causal, "backward", backward)
    for dtype in ("float32", "bfloat16"):
        model = load_causal_lm(tmp_path / "lm", dtype=dtype, trust_remote_code=False)
        response_logprobs(model, pad_batch(SEQUENCES, EOS), 1.0).sum().backward()
    assert calls == [torch.bfloat16] * 2


def test_saved_folder_does_not_name_it(tmp_path):
    save_model(build_policy(), build_tokenizer(), tmp_path / "lm")
    model = load_causal_lm(tmp_path / "lm", dtype="bfloat16", trust_remote_code=False)
    assert model.network.config._attn_implementation == attention.NAME
    save_model(model, build_tokenizer(), tmp_path / "again")
    assert attention.NAME not in json.dumps(json.loads((tmp_path / "again" / "config.json").read_text()))
