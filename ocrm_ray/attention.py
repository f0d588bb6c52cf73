"""Attention whose backward pass is a few matrix products: in bfloat16 on CPUs torch's fused one takes twice as long.

The forward pass stays Hugging Face's ``sdpa``; the backward pass computes the probabilities again.
"""

from typing import Any

import torch
from torch import Tensor

NAME = "sdpa_with_products"
_MAX_SCORES = 2**26


def use_products(network: Any) -> None:
    """Give this backward pass to a Hugging Face network that attends by ``sdpa`` on the CPU."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if network.config._attn_implementation == "sdpa" and not torch.cuda.is_available():
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        network.set_attn_implementation(NAME)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers expects of an attention function: [B, H, L, D] each -> [B, L, H, D]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    is_causal = getattr(module, "is_causal", True) and options.get("is_causal") is not False
    is_ours = attention_mask is None or attention_mask.dtype == torch.bool
    is_plain = is_causal and is_ours and not options.get("dropout") and options.get("position_bias") is None
    is_small = query.shape[0] * query.shape[1] * query.shape[2] ** 2 <= _MAX_SCORES
    if not (is_plain and is_small and query.dtype == torch.bfloat16 and query.requires_grad):
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    attended: Tensor = _Causal.apply(query, key, value, attention_mask, scale)  # type: ignore[no-untyped-call]
    return attended.transpose(1, 2).contiguous(), None


class _Causal(torch.autograd.Function):
    """Attention of queries [B, H, L, D] to keys and values [B, G, L, D], H a multiple of G.

    ``mask`` [B, 1, L, L]: True where a query sees a key; None: all up to its own place.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, mask = ctx.saved_tensors
        length, num_groups = query.shape[2], key.shape[1]
        heads = query.shape[1] // num_groups
        key, value = key.flatten(0, 1), value.flatten(0, 1)
        # The heads that share a key are rows of one product: [B G, H / G L, D].
        queries, upstream = ((tensor.reshape(len(key), heads * length, -1)) for tensor in (query * ctx.scale, upstream))
        sees = mask if mask is not None else query.new_ones((1, 1, length, length), dtype=torch.bool).tril()
        scores = (queries @ key.mT).view(len(query), num_groups, heads, length, length)
        probabilities = scores.masked_fill_(~sees[:, :, None], -torch.inf).view(len(key), -1, length).softmax(-1)
        of_value = probabilities.mT @ upstream
        of_scores = torch._softmax_backward_data(upstream @ value.mT, probabilities, -1, query.dtype)
        of_key, of_query = of_scores.mT @ queries, of_scores @ key * ctx.scale
        groups = (len(query), num_groups, length, -1)
        return of_query.view(query.shape), of_key.view(groups), of_value.view(groups), None, None
