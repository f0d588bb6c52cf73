"""Whole tables of sequences through a network without gradient, in chunks of similar length that ``pool`` bounds."""

from collections.abc import Callable, Iterable
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

    def compute(batch: PaddedBatch) -> list[FloatArray]:
        return cut_rows(response_logprobs(model, batch, temperature), batch.response_mask)

    return _each(model, table, rows, pool, compute)


def table_values(model: Any, table: SequenceTable, pool: Pool) -> list[FloatArray]:
    """A critic's values [T] of the states behind each row's response tokens."""
    return _each(model, table, None, pool, lambda batch: cut_rows(response_values(model, batch), batch.response_mask))


def row_sums(model: Any, table: SequenceTable, rows: IntArray, temperature: float, pool: Pool) -> Tensor:
    """Summed response log-probs, float32 [N] on the CPU, of table rows ``rows`` [N]."""

    def compute(batch: PaddedBatch) -> Tensor:
        return sequence_logprobs(response_logprobs(model, batch, temperature), batch.response_mask).cpu()

    return torch.stack(_each(model, table, rows, pool, compute))


def table_scores(model: Any, table: SequenceTable, pool: Pool) -> Tensor:
    """A reward model's raw scores at the last token, float32 [N] on the CPU."""
    return torch.stack(_each(model, table, None, pool, lambda batch: last_token_scores(model, batch).cpu()))


@torch.no_grad()
def _each(
    model: Any, table: SequenceTable, rows: IntArray | None, pool: Pool, compute: Callable[[PaddedBatch], Iterable[Any]]
) -> list[Any]:
    """What ``compute`` gives for each row, or each of ``rows``, in their order."""
    rows = np.arange(len(table)) if rows is None else rows
    device = next(model.parameters()).device
    results: dict[int, Any] = {}
    for chunk in table.chunks(rows, pool.batch_size, pool.batch_tokens):
        results.update(zip(chunk, compute(table.batch(rows[chunk]).to(device)), strict=True))
    return [results[position] for position in range(len(rows))]
