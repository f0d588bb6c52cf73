"""Whole tables of sequences through a network, in chunks of similar length and without gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ocrm_ray.algorithm.logprobs import sequence_logprobs
from ocrm_ray.batches import PaddedBatch, SequenceTable, cut_rows, length_chunks
from ocrm_ray.networks import last_token_scores, response_logprobs, response_values
from ocrm_ray.records import FloatArray, IntArray


def table_logprobs(model: Any, table: SequenceTable, temperature: float, batch_size: int) -> list[FloatArray]:
    """Log-probs [T] of the response of each row."""
    return _rows(table, batch_size, lambda batch: response_logprobs(model, batch.to(_device(model)), temperature))


def table_values(model: Any, table: SequenceTable, batch_size: int) -> list[FloatArray]:
    """A critic's values [T] of the states behind each row's response tokens."""
    return _rows(table, batch_size, lambda batch: response_values(model, batch.to(_device(model))))


def row_sums(model: Any, table: SequenceTable, rows: IntArray, temperature: float, batch_size: int) -> Tensor:
    """Summed response log-probs, float32 [N] on the CPU, of table rows ``rows`` [N]."""

    def sums(batch: PaddedBatch) -> Tensor:
        batch = batch.to(_device(model))
        return sequence_logprobs(response_logprobs(model, batch, temperature), batch.response_mask)

    return _numbers(table, rows, batch_size, sums)


def row_scores(model: Any, table: SequenceTable, rows: IntArray, batch_size: int) -> Tensor:
    """A reward model's raw scores at the last token, float32 [N] on the CPU, of table rows ``rows`` [N]."""
    return _numbers(table, rows, batch_size, lambda batch: last_token_scores(model, batch.to(_device(model))))


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


@torch.no_grad()
def _rows(table: SequenceTable, batch_size: int, compute: Callable[[PaddedBatch], Tensor]) -> list[FloatArray]:
    results: dict[int, FloatArray] = {}
    for chunk in length_chunks(table.lengths, batch_size):
        batch = table.batch(chunk)
        results.update(zip(chunk, cut_rows(compute(batch), batch.response_lengths), strict=True))
    return [results[index] for index in range(len(table))]


@torch.no_grad()
def _numbers(table: SequenceTable, rows: IntArray, batch_size: int, compute: Callable[[PaddedBatch], Tensor]) -> Tensor:
    result = torch.empty(len(rows))
    for chunk in length_chunks(table.lengths[rows], batch_size):
        result[chunk] = compute(table.batch(rows[chunk])).cpu()
    return result
