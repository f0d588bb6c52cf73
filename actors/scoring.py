"""Log-probs under networks that do not train: the SFT model, the anchor, and snapshots of the policy."""

import copy
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from actors.training_engine import start_process, training_device
from actors.weight_transport import WeightReader
from ocrm_ray.batches import SequenceTable
from ocrm_ray.checkpoints import ANCHOR, STATE
from ocrm_ray.config import RunConfig
from ocrm_ray.networks import load_causal_lm, load_tokenizer, row_log_weights, row_sums, save_model, table_logprobs
from ocrm_ray.preferences import read_pairs
from ocrm_ray.records import FloatArray, IntArray, PolicyWeights, Sequence
from ocrm_ray.reward_learning import pair_rows, pair_table

LIVE, SFT = "live", "sft"


@dataclass(eq=False)
class ScoringActor:
    """Holds the SFT model, the live anchor (at first the SFT model itself), one staged anchor, one snapshot.

    ``stage_anchor`` may run on a second thread: the slots are one mapping, which ``score`` reads once.
    """

    config: RunConfig
    sft_path: str
    anchor_path: str | None = None
    """Of a resumed run, if it is not the SFT model."""

    def __post_init__(self) -> None:
        self._anchors: dict[str, Any] = {}
        self._snapshot: tuple[int, Any] | None = None
        self._reader = WeightReader()

    def start(self) -> None:
        """Load the SFT model, which is the first anchor."""
        pool = self.config.pools.scoring
        start_process(self.config, pool)
        self._tokenizer = load_tokenizer(self.sft_path, trust_remote_code=self.config.trust_remote_code)
        self._sft = self._load(self.sft_path)
        self._anchors = {LIVE: self._load(self.anchor_path) if self.anchor_path else self._sft}

    def score(self, sequences: Seq[Sequence], models: Seq[str] = (LIVE, SFT)) -> list[list[FloatArray]]:
        """For each of ``models`` log-probs [T] at the rollout temperature: ``sft``, ``live`` or a promotion_id.

        Models that are the same network are computed once.
        """
        table = SequenceTable(sequences, self._tokenizer.pad_token_id, self.config.share_prompts)
        slots, temperature = self._anchors | {SFT: self._sft}, self.config.rollout.temperature
        assert slots.keys() >= set(models), f"no anchor in slot {set(models) - slots.keys()}"
        networks = [slots[model] for model in models]
        rows = {
            id(network): table_logprobs(network, table, temperature, self.config.pools.scoring)
            for network in dict.fromkeys(networks)
        }
        return [rows[id(network)] for network in networks]

    def load_snapshot(self, weights: PolicyWeights) -> None:
        """Hold the snapshot, so that its file may go; it takes the place of an earlier one."""
        self._snapshot = None
        self._snapshot = weights.version, self._copy_of(weights)

    def pair_logprobs(self, weights: PolicyWeights | None, indices: IntArray) -> FloatArray:
        """Summed log-probs [N, 2] of (chosen, rejected) of training pairs ``indices`` [N].

        Under the snapshot at the rollout temperature, or with None under who wrote the pairs at theirs.
        """
        if weights is None:
            network, temperature = self._behaviour, self.config.pairs.temperature
        else:
            network, temperature = self._of_snapshot(weights), self.config.rollout.temperature
        sums = row_sums(network, self._pairs, pair_rows(indices), temperature, self.config.pools.scoring)
        return _by_pair(sums)

    def pair_alignments(self, weights: PolicyWeights, indices: IntArray) -> FloatArray:
        """As the protocol says: float32 [N, 2]."""
        network, temperature = self._of_snapshot(weights), self.config.rollout.temperature
        return _by_pair(
            row_log_weights(network, self._pairs, pair_rows(indices), temperature, self.config.pools.scoring)
        )

    def stage_anchor(self, promotion_id: str, weights: PolicyWeights) -> None:
        """Load a snapshot beside the live anchor."""
        staged, live = self._copy_of(weights), self._anchors[LIVE]
        self._anchors = {name: anchor for name, anchor in self._anchors.items() if anchor is live} | {
            promotion_id: staged
        }

    def commit(self, promotion_id: str, anchor_version: int) -> None:
        """The staged anchor, if there is one of this promotion, is live, under both names. Again: no effect."""
        live = self._anchors[LIVE]
        if (staged := self._anchors.get(promotion_id, live)) is not live:
            self._anchors = {LIVE: staged, promotion_id: staged}

    def capture(self) -> None:
        """Keep the live anchor for ``write_anchor``: anchors are replaced, never changed."""
        self._captured = self._anchors[LIVE]

    def write_anchor(self, folder: Path, anchor_version: int) -> None:
        """As the protocol says; a model folder."""
        anchor = self._captured
        del self._captured
        if anchor_version:
            save_model(anchor, self._tokenizer, folder / STATE / ANCHOR)

    def _of_snapshot(self, weights: PolicyWeights) -> Any:
        if self._snapshot is None or self._snapshot[0] != weights.version:
            self.load_snapshot(weights)
        assert self._snapshot is not None
        return self._snapshot[1]

    def _load(self, path: str) -> Any:
        dtype = self.config.pools.scoring.dtype
        network = load_causal_lm(path, dtype=dtype, trust_remote_code=self.config.trust_remote_code)
        return network.requires_grad_(False).to(training_device())

    def _copy_of(self, weights: PolicyWeights) -> Any:
        # the copy's parameters are empty ones: they are about to be overwritten
        empty = {id(old): nn.Parameter(torch.empty_like(old), requires_grad=False) for old in self._sft.parameters()}
        network = copy.deepcopy(self._sft, empty)
        with self._reader.read(weights) as tensors:
            network.network.load_state_dict(tensors)
        return network

    @cached_property
    def _pairs(self) -> SequenceTable:
        pairs = read_pairs(self.config.stage_root / "pairs" / "train.jsonl")
        return pair_table(pairs, self._tokenizer.pad_token_id, self.config.share_prompts)

    @cached_property
    def _behaviour(self) -> Any:
        """Pairs of unknown origin are weighted as if the SFT model had written them, where that is allowed."""
        origin = self.config.pairs.behaviour
        return self._sft if origin in ("sft", "unknown") else self._load(origin)


def _by_pair(values: torch.Tensor) -> FloatArray:
    """[2N] in the order of ``pair_rows`` as [N, 2]."""
    return np.ascontiguousarray(values.view(2, -1).T.numpy())
