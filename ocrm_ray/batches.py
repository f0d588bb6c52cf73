"""Sequences as tensors: ragged storage, right-padded batches, chunks of similar length.

Networks here are causal and batches padded on the right, so padding can never reach a real token: no attention
mask is needed, and the padding id may equal EOS.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ocrm_ray.records import FloatArray, IntArray, Sequence

MAX_PADDING = 0.05
SMALL_BLOCK = 192
"""Tokens below which a block of its own costs more than padding."""


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """B sequences, padded on the right to L tokens; T is the longest response.

    ``tokens`` [B, L], ``prompt_lengths`` [B] and ``response_lengths`` [B] are int64 tensors on one device; the
    response of row i occupies columns ``prompt_lengths[i]`` up to ``prompt_lengths[i] + response_lengths[i]``.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor

    @property
    def response_mask(self) -> Tensor:
        """[B, T] bool: True on response tokens."""
        steps = torch.arange(int(self.response_lengths.max()), device=self.tokens.device)
        return steps < self.response_lengths[:, None]

    @property
    def last_positions(self) -> Tensor:
        """[B]: the column of each row's last token."""
        return self.prompt_lengths + self.response_lengths - 1

    def response_tokens(self) -> tuple[Tensor, Tensor]:
        """Of the N response tokens, row after row: places in the flattened batch that predict them, and themselves."""
        rows, steps = self.response_mask.nonzero(as_tuple=True)
        columns = self.prompt_lengths[rows] + steps
        return rows * self.tokens.shape[1] + columns - 1, self.tokens[rows, columns]

    def predicting_positions(self) -> Tensor:
        """[B, T]: the column whose output predicts each response token, held inside the row where T is padding."""
        steps = torch.arange(int(self.response_lengths.max()), device=self.tokens.device)
        return torch.minimum(self.prompt_lengths[:, None] - 1 + steps, self.last_positions[:, None] - 1)

    def blocks(self) -> "list[PaddedBatch]":
        """The rows in order, in blocks cut to their longest: with little padding if rows are sorted by length."""
        lengths = (self.last_positions + 1).tolist()
        starts, width, used = [0], 0, 0
        for row, length in enumerate(lengths):
            rows, wider = row - starts[-1], max(width, length)
            padding = (rows + 1) * wider - used - length
            if rows * width >= SMALL_BLOCK and padding > MAX_PADDING * (rows + 1) * wider:
                starts.append(row)
                wider, used = length, 0
            width, used = wider, used + length
        parts = zip(starts, [*starts[1:], len(lengths)], strict=True)
        return [
            PaddedBatch(self.tokens[i:j, : max(lengths[i:j])], self.prompt_lengths[i:j], self.response_lengths[i:j])
            for i, j in parts
        ]

    def to(self, device: torch.device) -> "PaddedBatch":
        return PaddedBatch(self.tokens.to(device), self.prompt_lengths.to(device), self.response_lengths.to(device))


class SequenceTable:
    """Sequences as one flat token array, so that a batch is cut without a Python loop over rows.

    Every sequence needs at least one prompt and one response token.
    """

    def __init__(self, sequences: Seq[Sequence], pad_id: int) -> None:
        self._pad_id = pad_id
        self.prompt_lengths: IntArray = _lengths(sequence.prompt_ids for sequence in sequences)
        self.response_lengths: IntArray = _lengths(sequence.response_ids for sequence in sequences)
        assert (self.prompt_lengths > 0).all(), "a sequence has an empty prompt"
        assert (self.response_lengths > 0).all(), "a sequence has an empty response"
        self.lengths: IntArray = self.prompt_lengths + self.response_lengths
        rows = (chain(sequence.prompt_ids, sequence.response_ids) for sequence in sequences)
        self._flat: npt.NDArray[np.int32] = np.fromiter(
            chain.from_iterable(rows), dtype=np.int32, count=int(self.lengths.sum())
        )
        self._starts: IntArray = np.cumsum(self.lengths) - self.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: IntArray | Seq[int]) -> PaddedBatch:
        """The rows ``indices``, in that order, on the CPU."""
        rows = np.asarray(indices, dtype=np.int64)
        assert rows.size, "a batch needs at least one row"
        lengths = self.lengths[rows]
        columns = np.arange(lengths.max())
        inside = columns < lengths[:, None]
        places = np.where(inside, self._starts[rows][:, None] + columns, 0)
        tokens = np.where(inside, self._flat[places], self._pad_id).astype(np.int64)
        return PaddedBatch(
            torch.from_numpy(tokens),
            torch.from_numpy(self.prompt_lengths[rows]),
            torch.from_numpy(self.response_lengths[rows]),
        )


def length_chunks(lengths: IntArray, max_rows: int, max_tokens: int) -> list[list[int]]:
    """Indices of ``lengths``, longest first (ties in order), in chunks that a forward pass takes.

    A chunk has at most ``max_rows`` rows and ``max_tokens`` tokens, padding included; one longer sequence goes alone.
    """
    chunks: list[list[int]] = []
    width = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        if not chunks or len(chunks[-1]) == max_rows or width * (len(chunks[-1]) + 1) > max_tokens:
            chunks.append([])
            width = int(lengths[index])
        chunks[-1].append(index)
    return chunks


def pad_rows(rows: Seq[FloatArray]) -> Tensor:
    """Float32 arrays of different lengths as one [B, T] tensor, zero where a row has ended."""
    padded = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.float32)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(padded)


def cut_rows(values: Tensor, lengths: Tensor) -> list[FloatArray]:
    """Rows of a [B, T] tensor, each cut to its own length: float32 arrays that own their memory."""
    table = values.detach().to("cpu", torch.float32).numpy()
    return [row[:length].copy() for row, length in zip(table, lengths.tolist(), strict=True)]


def _lengths(rows: object) -> IntArray:
    return np.fromiter((len(row) for row in rows), dtype=np.int64)  # type: ignore[attr-defined]
