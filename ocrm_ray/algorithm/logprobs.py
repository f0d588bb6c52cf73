"""Log-probabilities of response tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**24
"""Most logits of a chunk: 64 MiB in float32."""
_CACHED_LOGITS = 2**18


def head_logprobs(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    tokens: Tensor,
    temperature: float,
    chunk_size: int,
    *,
    statistic: Callable[[Tensor, float], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(log-probs of ``tokens`` [N], statistic), float32 [N], under softmax(head(``hidden`` [N, H]) / temperature).

    No more than ``chunk_size`` rows of logits exist at a time: every chunk but the last is computed again in the
    backward pass. ``statistic``: ``token_entropy`` or ``log_collision`` of the logits; it has no gradient.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")

    def of_chunk(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden)
        logprobs: Tensor = _TokenLogprobs.apply(logits, tokens, temperature)  # type: ignore[no-untyped-call]
        # Last, behind all that the backward pass needs: there it is not computed again.
        return logprobs, statistic(logits.detach(), temperature) if statistic else logprobs.new_empty(0)

    chunks = list(zip(torch.split(hidden, chunk_size), torch.split(tokens, chunk_size), strict=True))
    parts = [checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks[:-1]]
    parts.append(of_chunk(*chunks[-1]))
    logprobs, statistics = (torch.cat(values) for values in zip(*parts, strict=True))
    return logprobs, statistics if statistic else None


class _TokenLogprobs(torch.autograd.Function):
    """Log-probs [N] of tokens [N] under softmax(logits [N, V] / temperature); computed in float32, some rows at a time.

    Nothing but the logits is kept, in their own precision.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        parts = zip(_blocks(logits), torch.split(tokens, _rows(logits)), strict=True)
        logprobs = torch.cat([_log_softmax(rows, temperature).gather(1, said[:, None])[:, 0] for rows, said in parts])
        ctx.save_for_backward(logits, tokens)
        ctx.temperature = temperature
        return logprobs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        logits, tokens = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        slope, size = upstream[:, None] / ctx.temperature, _rows(logits)
        vectors = zip(torch.split(tokens[:, None], size), torch.split(slope, size), strict=True)
        for rows, target, (said, factor) in zip(_blocks(logits), _blocks(gradient), vectors, strict=True):
            of_rows = _log_softmax(rows, ctx.temperature).exp_().mul_(-factor).scatter_add_(1, said, factor)
            target.copy_(of_rows)
        return gradient, None, None


def token_entropy(logits: Tensor, temperature: float) -> Tensor:
    """Entropy in nats, float32 [N], of softmax(``logits`` [N, V] / temperature); logits may be -inf."""
    lowest = torch.finfo(torch.float32).min
    tables = (_log_softmax(rows, temperature) for rows in _blocks(logits))
    return -torch.cat([torch.linalg.vecdot(table.exp(), table.clamp(min=lowest)) for table in tables])


def log_collision(logits: Tensor, temperature: float) -> Tensor:
    """log of the sum of squared probabilities, float32 [N], of softmax(``logits`` [N, V] / temperature).

    The chance that two draws agree: minus the Renyi entropy of order 2. Logits may be -inf.
    """
    return torch.cat([torch.logsumexp(2 * _log_softmax(rows, temperature), dim=-1) for rows in _blocks(logits)])


def _rows(logits: Tensor) -> int:
    """Rows of logits whose float32 copies stay in a CPU's cache, where several passes over them cost little."""
    return max(1, _CACHED_LOGITS // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)


def _blocks(logits: Tensor) -> Sequence[Tensor]:
    return torch.split(logits, _rows(logits))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.float()
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def sequence_logprobs(token_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Sums [B] of ``token_logprobs`` [B, T] where ``mask`` [B, T]; in float32 or the better type of the input."""
    assert token_logprobs.shape == mask.shape
    dtype = torch.promote_types(token_logprobs.dtype, torch.float32)
    return token_logprobs.masked_fill(~mask, 0.0).sum(dim=-1, dtype=dtype)
