"""Log-probabilities of response tokens, and the mask that says which tokens belong to a response."""

from collections.abc import Sequence

import torch
from torch import Tensor


def eos_mask(response_ids: Tensor, lengths: Tensor, eos_ids: Sequence[int]) -> Tensor:
    """True [B, T] up to and including the first EOS, and nowhere at or past ``lengths`` [B].

    ``response_ids`` [B, T] are right padded; padding may equal an EOS id. A response without any of ``eos_ids``
    (there may be several, or none) counts to its length.
    """
    positions = torch.arange(response_ids.shape[1], device=response_ids.device)
    within = positions < lengths.unsqueeze(1)
    stops = torch.tensor(tuple(eos_ids), dtype=response_ids.dtype, device=response_ids.device)
    is_eos = torch.isin(response_ids, stops)
    num_eos_before = is_eos.cumsum(dim=1) - is_eos.long()
    return within & (num_eos_before == 0)


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probabilities, float32 [B, T], of ``tokens`` [B, T] under softmax(``logits`` [B, T, V] / temperature)."""
    assert logits.shape[:-1] == tokens.shape, f"logits {tuple(logits.shape)} against tokens {tuple(tokens.shape)}"
    return _log_softmax(logits, temperature).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def token_entropy(logits: Tensor, temperature: float) -> Tensor:
    """Entropy in nats, float32 [B, T], of softmax(``logits`` [B, T, V] / temperature)."""
    terms: Tensor = torch.special.entr(_log_softmax(logits, temperature).exp())
    return terms.sum(dim=-1)


def sequence_logprobs(token_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Sums [B] of ``token_logprobs`` [B, T] where ``mask`` [B, T]; in float32 or the better type of the input."""
    assert token_logprobs.shape == mask.shape
    dtype = torch.promote_types(token_logprobs.dtype, torch.float32)
    return token_logprobs.masked_fill(~mask, 0.0).sum(dim=-1, dtype=dtype)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return torch.log_softmax(logits.float() / temperature, dim=-1)
