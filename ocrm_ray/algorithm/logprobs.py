"""Log-probabilities of response tokens."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**24
"""Most logits of a chunk: 64 MiB in float32."""
_CACHED = 2**18


def head_logprobs(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    tokens: Tensor,
    temperature: float,
    chunk_size: int,
    *,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(log-probs of ``tokens`` [N], entropy), float32 [N], under softmax(head(``hidden`` [N, H]) / temperature).

    No more than ``chunk_size`` rows of logits exist at a time: every chunk but the last is computed again in the
    backward pass. The entropy, in nats, has no gradient.
    """

    def of_chunk(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        table = log_probabilities(head(hidden), temperature)
        logprobs = token_logprobs(table, tokens)
        # Last, behind all that the backward pass needs: there it is not computed again.
        return logprobs, token_entropy(table.detach()) if with_entropy else table.new_empty(0)

    chunks = list(zip(torch.split(hidden, chunk_size), torch.split(tokens, chunk_size), strict=True))
    parts = [checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks[:-1]]
    parts.append(of_chunk(*chunks[-1]))
    logprobs, entropy = (torch.cat(values) for values in zip(*parts, strict=True))
    return logprobs, entropy if with_entropy else None


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(``logits`` / temperature) over the last dimension, in float32."""
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    logits = logits.float()
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def token_logprobs(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """[...] of ``log_probabilities`` [..., V] at ``tokens`` [...]."""
    return log_probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def token_entropy(log_probabilities: Tensor) -> Tensor:
    """Entropy in nats, [N], of ``log_probabilities`` [N, V] (-inf is allowed), in blocks that stay in cache."""
    lowest = torch.finfo(log_probabilities.dtype).min
    blocks = torch.split(log_probabilities, max(1, _CACHED // log_probabilities.shape[-1]))
    return -torch.cat([torch.linalg.vecdot(block.exp(), block.clamp(min=lowest)) for block in blocks])


def sequence_logprobs(token_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Sums [B] of ``token_logprobs`` [B, T] where ``mask`` [B, T]; in float32 or the better type of the input."""
    assert token_logprobs.shape == mask.shape
    dtype = torch.promote_types(token_logprobs.dtype, torch.float32)
    return token_logprobs.masked_fill(~mask, 0.0).sum(dim=-1, dtype=dtype)
