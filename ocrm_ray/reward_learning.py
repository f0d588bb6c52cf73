"""Fitting a reward model to preference pairs, without the loop: batches, loss, order, learning rate, accuracy.

Row 2i of a pair table is the chosen response of pair i, row 2i + 1 the rejected one.
"""

import math
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from ocrm_ray.algorithm.reward_scores import bradley_terry_loss
from ocrm_ray.algorithm.reward_spread import reward_spread
from ocrm_ray.batches import SequenceTable
from ocrm_ray.preferences import Pair
from ocrm_ray.records import IntArray, Sequence


def interleaved(pairs: Seq[Pair]) -> list[Sequence]:
    """chosen, rejected, chosen, ... of the pairs in order: 2N sequences."""
    return [sequence for pair in pairs for sequence in (pair.chosen, pair.rejected)]


def pair_table(pairs: Seq[Pair], pad_id: int, share_prompts: bool) -> SequenceTable:
    """The pairs' 2N sequences, as tensors are cut from them."""
    return SequenceTable(interleaved(pairs), pad_id, share_prompts)


def pair_rows(indices: IntArray) -> IntArray:
    """Table rows [2N] of pairs ``indices`` [N]: all chosen, then all rejected."""
    return np.concatenate([2 * indices, 2 * indices + 1])


def pair_lengths(table: SequenceTable) -> IntArray:
    """Tokens [N] of each pair, both its sequences together, and the prompt once where it is shared."""
    lengths: IntArray = table.lengths.reshape(-1, 2).sum(axis=1)
    return lengths - table.prompt_lengths[::2] if table.share_prompts else lengths


def weighted_pair_loss(scores: Tensor, weights: Tensor | None, batch_size: int) -> Tensor:
    """Bradley-Terry loss of n pairs as part of an optimiser batch of ``batch_size`` pairs.

    ``scores`` [2n] in the order of ``pair_rows``, ``weights`` [n] or None. The parts of a batch sum to its mean.
    """
    chosen, rejected = scores.chunk(2)
    return bradley_terry_loss(chosen, rejected, weights) * (len(chosen) / batch_size)


def epoch_batches(num_pairs: int, batch_size: int, num_epochs: int, seed: int) -> list[IntArray]:
    """Positions of every optimiser batch: each epoch a new order by ``seed``, its last batch possibly smaller."""
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(num_pairs).astype(np.int64) for _ in range(num_epochs)]
    return [order[start : start + batch_size] for order in orders for start in range(0, num_pairs, batch_size)]


def cosine_factor(step: int, num_steps: int) -> float:
    """Factor of the learning rate at ``step`` (from 0) of ``num_steps``: half a cosine from 1 towards 0."""
    return (1 + math.cos(math.pi * step / num_steps)) / 2


def pair_accuracy(scores: Tensor) -> float:
    """Share of pairs whose chosen response scores higher; a tie counts half. ``scores`` [2N], interleaved."""
    chosen, rejected = scores.view(-1, 2).unbind(1)
    return float(((chosen > rejected).double() + (chosen == rejected).double() / 2).mean())


def calibration_sequences(pairs: Seq[Pair], num_sequences: int) -> list[Sequence]:
    """The frozen calibration set: responses of the first pairs, interleaved, at most ``num_sequences``."""
    return interleaved(pairs[: (num_sequences + 1) // 2])[:num_sequences]


class ResponseGroups:
    """The different responses to each prompt, of prompts with two at least, as ``table`` in the order of groups."""

    def __init__(self, groups: Seq[Seq[Sequence]], pad_id: int, share_prompts: bool) -> None:
        different = [list(dict.fromkeys(group)) for group in groups]
        kept = [group for group in different if len(group) > 1]
        self.table = SequenceTable([sequence for group in kept for sequence in group], pad_id, share_prompts)
        ends = np.cumsum([len(group) for group in kept])
        self._rows = np.split(np.arange(len(self.table)), ends[:-1])[: len(kept)]

    def __len__(self) -> int:
        return len(self._rows)

    def draw(self, num_groups: int, rng: np.random.Generator) -> list[IntArray]:
        """Table rows of each of ``num_groups`` groups, or of all there are."""
        return [self._rows[number] for number in rng.permutation(len(self))[:num_groups]]

    def draw_views(self, num_groups: int, rng: np.random.Generator) -> IntArray:
        """Table rows [2n]: one response of each drawn group, then another of each."""
        views = np.array([rng.permutation(rows)[:2] for rows in self.draw(num_groups, rng)], dtype=np.int64)
        return views.T.reshape(-1)


def group_spread(scores: Tensor, groups: Seq[IntArray]) -> Tensor:
    """MetaRM's J, summed over groups: ``scores`` [N] of all their responses, in order."""
    parts = torch.split(scores, [len(group) for group in groups])
    return torch.stack([reward_spread(part[None]) for part in parts]).sum()
