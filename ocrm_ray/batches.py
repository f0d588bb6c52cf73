"""Sequences as tensors: ragged storage, right-padded batches, chunks of similar length.

Networks here are causal and rows padded on the right, so padding can never reach a real token: it needs no attention
mask, and its id may equal EOS. Responses to one prompt may share a row: then a mask hides them from each other.
"""

from collections import defaultdict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ocrm_ray import ranks
from ocrm_ray.records import FloatArray, IntArray, Sequence

ROW_TOKENS = 512
"""Responses to one prompt fill a row up to about here: attention costs the square, the prompt is saved but once."""
MAX_PADDING = 0.05
SMALL_BLOCK = 192
"""Tokens below which a block of its own costs more than padding."""


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """B sequences in R rows, the longest first, padded on the right to L tokens; T is the longest response.

    ``mask`` [R, 1, L, L]: True where a token sees another; None where each row is one sequence. ``tokens``,
    ``positions`` [R, L]: ids, and places in the sequence; ``row_lengths`` [R]: without padding. ``response_mask``
    [B, T]: True on response tokens; ``places``, ``predicting`` [B, T]: of each in the flattened rows, and of the output
    that predicts it, behind a response's end as for its last token. On one device.
    """

    mask: Tensor | None
    tokens: Tensor
    positions: Tensor
    row_lengths: Tensor
    response_mask: Tensor
    places: Tensor
    predicting: Tensor

    @property
    def last_places(self) -> Tensor:
        """[B]: index of each sequence's last token in the flattened rows."""
        return self.places[:, -1]

    def response_tokens(self) -> tuple[Tensor, Tensor]:
        """[N] each, of the response tokens, sequence after sequence: index of what predicts it; the token itself."""
        return self.predicting[self.response_mask], self.tokens.flatten()[self.places[self.response_mask]]

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


class SequenceTable:
    """Sequences with at least one prompt and one response token each, from which batches are cut.

    ``prompt_lengths``, ``response_lengths``, ``lengths`` [N]: tokens of each, and of both together.
    """

    def __init__(self, sequences: Seq[Sequence], pad_id: int, share_prompts: bool) -> None:
        """``share_prompts``: neighbours with the same prompt go into one row of a batch, behind one copy of it."""
        self._pad_id = pad_id
        self.share_prompts = share_prompts
        self._tokens = [np.array((*s.prompt_ids, *s.response_ids), dtype=np.int32) for s in sequences]
        self.prompt_lengths: IntArray = np.array([len(s.prompt_ids) for s in sequences], dtype=np.int64)
        self.response_lengths: IntArray = np.array([len(s.response_ids) for s in sequences], dtype=np.int64)
        assert (self.prompt_lengths > 0).all(), "a sequence has an empty prompt"
        assert (self.response_lengths > 0).all(), "a sequence has an empty response"
        self.lengths: IntArray = self.prompt_lengths + self.response_lengths
        is_new = [not share_prompts or a.prompt_ids != b.prompt_ids for a, b in pairwise(sequences)]
        self._prompts = np.cumsum([True, *is_new])

    def __len__(self) -> int:
        return len(self.lengths)

    def chunks(self, indices: IntArray, max_sequences: int, max_tokens: int) -> list[list[int]]:
        """Positions in ``indices`` of this rank's share, as ``length_chunks`` cuts them; a row is in one chunk."""
        rows, lengths = self._rows(indices)
        cut = length_chunks(lengths, max_sequences, max_tokens, np.array([len(row) for row in rows]))
        return [[position for number in chunk for position in rows[number]] for chunk in cut]

    def batch(self, indices: IntArray | Seq[int]) -> PaddedBatch:
        """The sequences ``indices``, in that order, on the CPU."""
        indices = np.asarray(indices, dtype=np.int64)
        assert indices.size, "a batch needs at least one sequence"
        rows, lengths = self._rows(indices)
        longest_first = np.argsort(-lengths, kind="stable")
        shape = (len(rows), int(lengths.max()))
        tokens, positions, parts = (np.full(shape, fill) for fill in (self._pad_id, 0, -1))
        responses = self.response_lengths[indices, None]
        steps = np.arange(responses.max())
        places = np.minimum(steps, responses - 1)
        predicting = np.empty_like(places)
        for row, members in enumerate(rows[number] for number in longest_first):
            place = prompt = int(self.prompt_lengths[indices[members[0]]])
            tokens[row, :prompt], parts[row, :prompt] = self._tokens[indices[members[0]]][:prompt], 0
            positions[row, :prompt] = np.arange(prompt)
            for part, member in enumerate(members, start=1):
                sequence = self._tokens[indices[member]]
                end = place + len(sequence) - prompt
                tokens[row, place:end], parts[row, place:end] = sequence[prompt:], part
                positions[row, place:end] = np.arange(prompt, len(sequence))
                places[member] += row * shape[1] + place
                predicting[member] = row * shape[1] + prompt - 1, *places[member, :-1]
                place = end
        visibility = _visibility(torch.from_numpy(parts)) if len(rows) < len(indices) else None
        arrays = (tokens, positions, lengths[longest_first], steps < responses, places, predicting)
        return PaddedBatch(visibility, *map(torch.from_numpy, arrays))

    def _rows(self, indices: IntArray) -> tuple[list[list[int]], IntArray]:
        """(positions in ``indices`` of each row's sequences, the rows' tokens)."""
        rows: dict[tuple[int, int], list[int]] = {}
        lengths: dict[tuple[int, int], int] = {}
        said: defaultdict[int, int] = defaultdict(int)
        columns = (self._prompts, self.prompt_lengths, self.response_lengths)
        of_each = zip(*(column[indices].tolist() for column in columns), strict=True)
        for position, (prompt, prompt_length, response_length) in enumerate(of_each):
            row = prompt, said[prompt] // max(ROW_TOKENS - prompt_length, 1)
            rows.setdefault(row, []).append(position)
            lengths[row] = lengths.get(row, prompt_length) + response_length
            said[prompt] += response_length
        return list(rows.values()), np.array(list(lengths.values()))


def _visibility(parts: Tensor) -> Tensor:
    """[R, 1, L, L] from ``parts`` [R, L]: a token sees earlier ones of its own part and of part 0, the prompt."""
    own = (parts[:, :, None] == parts[:, None, :]) | (parts == 0)[:, None, :]
    return own.tril()[:, None]


def length_chunks(
    lengths: IntArray, max_sequences: int, max_tokens: int, sizes: IntArray | None = None
) -> list[list[int]]:
    """Indices of rows with ``lengths`` tokens and ``sizes`` (1) sequences, longest first, as forward passes take them.

    A chunk has at most ``max_sequences`` and ``max_tokens``, padding included; one larger row goes alone. Where several
    ranks train together, of n rows by length each has every n-th, and a rank may have fewer chunks than another.
    """
    sizes = np.ones_like(lengths) if sizes is None else sizes
    chunks: list[list[int]] = []
    width = count = 0
    for index in np.argsort(-lengths, kind="stable")[ranks.rank() :: ranks.num_ranks()].tolist():
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


def cut_rows(values: Tensor, mask: Tensor) -> list[FloatArray]:
    """Rows of a [B, T] tensor, each cut to where ``mask`` is True: float32 arrays that own their memory."""
    table = values.detach().to("cpu", torch.float32).numpy()
    return [row[keep] for row, keep in zip(table, mask.cpu().numpy(), strict=True)]
