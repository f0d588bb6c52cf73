"""Whole tables of sequences through a network, in chunks of similar length."""

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
    """Log-probs [T] of the response of each row, or of each of ``rows``; without gradient."""
    rows = np.arange(len(table)) if rows is None else rows
    return _arrays(table, rows, pool, lambda batch: response_logprobs(model, batch.to(_device(model)), temperature))


def table_values(model: Any, table: SequenceTable, pool: Pool) -> list[FloatArray]:
    """A critic's values [T] of the states behind each row's response tokens; without gradient."""
    return _arrays(table, np.arange(len(table)), pool, lambda batch: response_values(model, batch.to(_device(model))))


@torch.no_grad()
def row_sums(model: Any, table: SequenceTable, rows: IntArray, temperature: float, pool: Pool) -> Tensor:
    """Summed response log-probs, float32 [N] on the CPU, of table rows ``rows`` [N]; without gradient."""

    def sums(batch: PaddedBatch) -> Tensor:
        batch = batch.to(_device(model))
        return sequence_logprobs(response_logprobs(model, batch, temperature), batch.response_mask)

    chunks = table.chunks(rows, pool.batch_size, pool.batch_tokens)
    return _numbers(table, rows, chunks, sums)


def row_scores(model: Any, table: SequenceTable, rows: IntArray, max_rows: int, max_tokens: int) -> Tensor:
    """A reward model's raw scores at the last token, float32 [N] on the CPU, of table rows ``rows`` [N]."""
    chunks = table.chunks(rows, max_rows, max_tokens)
    return _numbers(table, rows, chunks, lambda batch: last_token_scores(model, batch.to(_device(model))))


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


@torch.no_grad()
def _arrays(
    table: SequenceTable, rows: IntArray, pool: Pool, compute: Callable[[PaddedBatch], Tensor]
) -> list[FloatArray]:
    results: dict[int, FloatArray] = {}
    for chunk in table.chunks(rows, pool.batch_size, pool.batch_tokens):
        batch = table.batch(rows[chunk])
        results.update(zip(chunk, cut_rows(compute(batch), batch.response_lengths), strict=True))
    return [results[index] for index in range(len(rows))]


def _numbers(
    table: SequenceTable, rows: IntArray, chunks: list[list[int]], compute: Callable[[PaddedBatch], Tensor]
) -> Tensor:
    numbers = torch.cat([compute(table.batch(rows[chunk])) for chunk in chunks]).cpu()
    return numbers[torch.from_numpy(np.argsort(np.concatenate(chunks)))]
