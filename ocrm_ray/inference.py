"""Whole tables of sequences through a network without gradient, in chunks of similar length that ``pool`` bounds."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ocrm_ray.algorithm.logprobs import sequence_logprobs
from ocrm_ray.batches import PaddedBatch, SequenceTable, cut_rows
from ocrm_ray.config import Pool
from ocrm_ray.networks import last_token_scores, response_logprobs, response_values
from ocrm_ray.records import FloatArray, IntArray


def table_logprobs(
    model: Any, table: SequenceTable, temperature: float, pool: Pool, rows: IntArray | None = None
) -> list[FloatArray]:
    """Log-probs [T] of the response of each row, or of each of ``rows``."""
    return _each(model, table, rows, pool, lambda batch: response_logprobs(model, batch, temperature))


def table_values(model: Any, table: SequenceTable, pool: Pool) -> list[FloatArray]:
    """A critic's values [T] of the states behind each row's response tokens."""
    return _each(model, table, None, pool, lambda batch: response_values(model, batch))


def row_sums(model: Any, table: SequenceTable, rows: IntArray, temperature: float, pool: Pool) -> Tensor:
    """Summed response log-probs, float32 [N] on the CPU, of table rows ``rows`` [N]."""

    def sums(batch: PaddedBatch) -> Tensor:
        return sequence_logprobs(response_logprobs(model, batch, temperature), batch.response_mask)

    return torch.stack(_each(model, table, rows, pool, sums))


def table_scores(model: Any, table: SequenceTable, pool: Pool) -> Tensor:
    """A reward model's raw scores at the last token, float32 [N] on the CPU."""
    return torch.stack(_each(model, table, None, pool, lambda batch: last_token_scores(model, batch)))


@torch.no_grad()
def _each(
    model: Any, table: SequenceTable, rows: IntArray | None, pool: Pool, compute: Callable[[PaddedBatch], Tensor]
) -> list[Any]:
    """What ``compute`` gives, [B] or [B, T], for each row, or each of ``rows``, in their order and on the CPU."""
    rows = np.arange(len(table)) if rows is None else rows
    device = next(model.parameters()).device
    results: dict[int, Any] = {}
    for chunk in table.chunks(rows, pool.batch_size, pool.batch_tokens):
        batch = table.batch(rows[chunk]).to(device)
        values = compute(batch)
        cut = cut_rows(values, batch.response_mask) if values.ndim == 2 else values.cpu()
        results.update(zip(chunk, cut, strict=True))
    return [results[position] for position in range(len(rows))]
