"""Sequences as tensors: ragged storage, right-padded batches, chunks of similar length.

Networks here are causal and rows padded on the right, so padding can never reach a real token: it needs no attention
mask, and its id may equal EOS. Responses to one prompt may share a row: then a mask hides them from each other.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, replace
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ocrm_ray.records import FloatArray, IntArray, Sequence

ROW_TOKENS = 512
"""Responses to one prompt fill a row up to about here: attention costs the square, the prompt is saved but once."""
MAX_PADDING = 0.05
SMALL_BLOCK = 192
"""Tokens below which a block of its own costs more than padding."""


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """B sequences in R rows, the longest first, padded on the right to L tokens; T is the longest response.

    ``tokens``, ``positions`` [R, L]: ids, and places in the sequence; ``row_lengths`` [R]: without padding. ``mask``
    [R, 1, L, L]: True where a token sees another; None where each row is one sequence. ``prompt_ends``, ``starts``
    [B]: the prompt's last and the response's first token, as indices into the flattened rows. On one device.
    """

    tokens: Tensor
    positions: Tensor
    row_lengths: Tensor
    mask: Tensor | None
    prompt_ends: Tensor
    starts: Tensor
    response_lengths: Tensor

    @property
    def response_mask(self) -> Tensor:
        """[B, T] bool: True on response tokens."""
        return self._steps < self.response_lengths[:, None]

    @property
    def last_places(self) -> Tensor:
        """[B]: index of each sequence's last token in the flattened rows."""
        return self.starts + self.response_lengths - 1

    def predicting_places(self) -> Tensor:
        """[B, T]: index of the output that predicts each response token; inside the row where T is padding."""
        steps = torch.minimum(self._steps, self.response_lengths[:, None] - 1)
        return torch.where(steps == 0, self.prompt_ends[:, None], self.starts[:, None] + steps - 1)

    def response_tokens(self) -> tuple[Tensor, Tensor]:
        """[N] each, of the response tokens, sequence after sequence: index of what predicts it; the token itself."""
        mask = self.response_mask
        places = (self.starts[:, None] + self._steps)[mask]
        return self.predicting_places()[mask], self.tokens.flatten()[places]

    def blocks(self) -> list[tuple[slice, int]]:
        """(rows, width): the rows in blocks cut to their longest, so that little of them is padding."""
        blocks: list[tuple[slice, int]] = []
        start = used = 0
        for row, length in enumerate(self.row_lengths.tolist()):
            width = blocks[-1][1] if blocks else length
            size = (row - start) * width
            if not blocks or (size >= SMALL_BLOCK and size + width - used - length > MAX_PADDING * (size + width)):
                blocks.append((slice(row, row), length))
                start, used = row, 0
            blocks[-1] = (slice(start, row + 1), blocks[-1][1])
            used += length
        return blocks

    def to(self, device: torch.device) -> "PaddedBatch":
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in moved.items() if value is not None})

    @property
    def _steps(self) -> Tensor:
        return torch.arange(int(self.response_lengths.max()), device=self.tokens.device)[None]


class SequenceTable:
    """Sequences as one flat token array, so that a batch is cut without a Python loop over rows.

    Every sequence needs at least one prompt and one response token.
    """

    def __init__(self, sequences: Seq[Sequence], pad_id: int, share_prompts: bool) -> None:
        """``share_prompts``: neighbours with the same prompt go into one row of a batch, behind one copy of it."""
        self._pad_id = pad_id
        self.share_prompts = share_prompts
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
        is_new = (not share_prompts or a.prompt_ids != b.prompt_ids for a, b in pairwise(sequences))
        self._prompts: IntArray = np.cumsum(np.fromiter(chain([False], is_new), dtype=np.int64, count=len(self)))

    def __len__(self) -> int:
        return len(self.lengths)

    def chunks(self, indices: IntArray, max_sequences: int, max_tokens: int) -> list[list[int]]:
        """Positions in ``indices``, longest rows first, as ``length_chunks`` cuts them; a row is in one chunk."""
        order, row = self._rows(indices)
        firsts = np.flatnonzero(np.diff(row, prepend=-1))
        chosen = indices[order]
        lengths = self.prompt_lengths[chosen[firsts]] + np.add.reduceat(self.response_lengths[chosen], firsts)
        members = np.split(order, firsts[1:])
        sizes = np.array([len(member) for member in members])
        cut = length_chunks(lengths, max_sequences, max_tokens, sizes)
        return [np.concatenate([members[number] for number in chunk]).tolist() for chunk in cut]

    def batch(self, indices: IntArray | Seq[int]) -> PaddedBatch:
        """The sequences ``indices``, in that order, on the CPU."""
        indices = np.asarray(indices, dtype=np.int64)
        assert indices.size, "a batch needs at least one sequence"
        order, row = self._rows(indices)
        chosen = indices[order]
        firsts = np.flatnonzero(np.diff(row, prepend=-1))
        prompts, responses = self.prompt_lengths[chosen], self.response_lengths[chosen]
        before = np.cumsum(responses) - responses
        columns = prompts + before - before[firsts][row]
        lengths = np.maximum.reduceat(columns + responses, firsts)
        by_length = np.argsort(-lengths, kind="stable")
        row, width = np.argsort(by_length)[row], int(lengths.max())
        tokens, positions = (np.full((len(firsts), width), fill) for fill in (self._pad_id, 0))
        parts = np.full((len(firsts), width), -1)

        def place(owner: IntArray, lengths: IntArray, column: IntArray, source: IntArray, position: IntArray) -> None:
            """Write token i of each of ``owner``'s stretches to ``column + i`` of its row."""
            which = np.repeat(np.arange(len(owner)), lengths)
            step = np.arange(len(which)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            target = row[owner][which], column[which] + step
            tokens[target] = self._flat[source[which] + step]
            positions[target] = position[which] + step
            parts[target] = owner[which] + 1 if lengths is responses else 0

        zeros = np.zeros(len(firsts), dtype=np.int64)
        place(firsts, prompts[firsts], zeros, self._starts[chosen[firsts]], zeros)
        place(np.arange(len(order)), responses, columns, self._starts[chosen] + prompts, prompts)
        back = np.argsort(order)
        return PaddedBatch(
            torch.from_numpy(tokens),
            torch.from_numpy(positions),
            torch.from_numpy(lengths[by_length]),
            _visibility(torch.from_numpy(parts)) if len(firsts) < len(order) else None,
            torch.from_numpy((row * width + prompts - 1)[back]),
            torch.from_numpy((row * width + columns)[back]),
            torch.from_numpy(responses[back]),
        )

    def _rows(self, indices: IntArray) -> tuple[IntArray, IntArray]:
        """(order, row): ``indices[order]`` are sorted by prompt, and go into rows ``row`` = 0, 0, 1, ..."""
        order = np.argsort(self._prompts[indices], kind="stable")
        chosen = indices[order]
        prompt, responses = self._prompts[chosen], self.response_lengths[chosen]
        is_new = np.diff(prompt, prepend=-1) != 0
        before = np.cumsum(responses) - responses
        before -= before[is_new][np.cumsum(is_new) - 1]
        part = before // np.maximum(ROW_TOKENS - self.prompt_lengths[chosen], 1)
        return order, np.cumsum(is_new | (np.diff(part, prepend=0) != 0)) - 1


def _visibility(parts: Tensor) -> Tensor:
    """[R, 1, L, L] from ``parts`` [R, L]: a token sees earlier ones of its own part and of part 0, the prompt."""
    own = (parts[:, :, None] == parts[:, None, :]) | (parts == 0)[:, None, :]
    return own.tril()[:, None]


def length_chunks(
    lengths: IntArray, max_sequences: int, max_tokens: int, sizes: IntArray | None = None
) -> list[list[int]]:
    """Indices of rows with ``lengths`` tokens and ``sizes`` (1) sequences, longest first, as forward passes take them.

    A chunk has at most ``max_sequences`` and ``max_tokens``, padding included; one larger row goes alone.
    """
    sizes = np.ones_like(lengths) if sizes is None else sizes
    chunks: list[list[int]] = []
    width = count = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        is_full = chunks and (width * (len(chunks[-1]) + 1) > max_tokens or count + sizes[index] > max_sequences)
        if not chunks or is_full:
            chunks.append([])
            width, count = int(lengths[index]), 0
        chunks[-1].append(index)
        count += int(sizes[index])
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
