"""Weights of preference pairs by how close each response is to what the policy itself would say.

WPO (arXiv 2406.11827), sampled alignment: a response weighs exp of the mean over its tokens of log pi(y_t) less
log sum_v pi(v)^2, a pair the product. Bounded, and no ratio: who wrote the pairs does not enter.
"""

from torch import Tensor


def response_log_weights(token_logprobs: Tensor, log_collisions: Tensor, mask: Tensor) -> Tensor:
    """[B] from log-probs and ``log_collision`` of the response tokens, [B, T] where ``mask``; without gradient.

    Each response has at least one token.
    """
    assert token_logprobs.shape == log_collisions.shape == mask.shape
    terms = (token_logprobs - log_collisions).detach().masked_fill(~mask, 0.0)
    return terms.sum(dim=-1) / mask.sum(dim=-1)


def pair_log_weights(responses: Tensor, cap: bool) -> Tensor:
    """[N] from the log-weights [N, 2] of (chosen, rejected); ``cap``: at most weight 1, as in the published code."""
    assert responses.shape == (len(responses), 2), f"one row (chosen, rejected) a pair: {tuple(responses.shape)}"
    log_weights = responses.sum(dim=1)
    return log_weights.clamp(max=0.0) if cap else log_weights
