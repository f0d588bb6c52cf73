"""Reward models: servers that score under the live and a staged one, and the refitter that trains the next."""

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from actors.training_engine import EngineSettings, TrainingEngine, start_process, training_device
from ocrm_ray.algorithm.reward_scores import calibration, recentre
from ocrm_ray.batches import SequenceTable, length_chunks
from ocrm_ray.config import RewardTraining, RunConfig
from ocrm_ray.networks import ScalarModel, last_token_scores, load_reward_model, load_tokenizer, table_scores
from ocrm_ray.preferences import read_pairs
from ocrm_ray.records import Calibration, FloatArray, IntArray, RefitReport, RefitRequest, Sequence
from ocrm_ray.reward_learning import (
    calibration_sequences,
    cosine_factor,
    epoch_batches,
    pair_accuracy,
    pair_lengths,
    pair_rows,
    pair_table,
    weighted_pair_loss,
)
from ocrm_ray.stages import stage_paths

LIVE = "live"


@dataclass(eq=False)
class RewardServer:
    """Scores, calibrated on the frozen set; a candidate is loaded into a slot beside the live model.

    ``reward_path``: the first one. ``stage`` may run on a second thread: ``score`` reads the mapping of slots once.
    """

    config: RunConfig
    reward_path: str

    def __post_init__(self) -> None:
        self._slots: dict[str, tuple[ScalarModel, Calibration]] = {}

    def start(self) -> None:
        """Load the first reward model and calibrate it."""
        config = self.config
        start_process(config.pools.reward.threads_per_actor, config.seed)
        self._pad_id = load_tokenizer(self.reward_path, trust_remote_code=config.trust_remote_code).pad_token_id
        pairs = read_pairs(config.stage_root / "pairs" / "train.jsonl")
        self._calibration_set = self._table(calibration_sequences(pairs, config.reward.num_calibration))
        self._slots = {LIVE: self._load(self.reward_path)}

    def score(self, sequences: Seq[Sequence], slot: str = LIVE) -> FloatArray:
        """Calibrated scores [N], read at the last token; ``slot``: ``live`` or a promotion_id."""
        slots = self._slots
        assert slot in slots, f"no reward model in slot {slot}"
        model, found = slots[slot]
        scores = table_scores(model, self._table(sequences), self.config.pools.reward)
        return recentre(scores, found.mean, found.std, self.config.reward.scale == "calibration_std").numpy()

    def stage(self, promotion_id: str, refit: RefitReport) -> Calibration:
        """Load a candidate beside the live model and calibrate it."""
        candidate, live = self._load(refit.path), self._slots[LIVE]
        self._slots = {name: held for name, held in self._slots.items() if held is live} | {promotion_id: candidate}
        return candidate[1]

    def commit(self, promotion_id: str, reward_version: int) -> None:
        """The staged model, if there is one of this promotion, is live, under both names. Again: no effect."""
        live = self._slots[LIVE]
        if (staged := self._slots.get(promotion_id, live)) is not live:
            self._slots = {LIVE: staged, promotion_id: staged}

    def _table(self, sequences: Seq[Sequence]) -> SequenceTable:
        return SequenceTable(sequences, self._pad_id, self.config.share_prompts)

    def _load(self, path: str | Path) -> tuple[ScalarModel, Calibration]:
        dtype = self.config.pools.reward.dtype
        model = load_reward_model(path, dtype=dtype, trust_remote_code=self.config.trust_remote_code)
        model = model.requires_grad_(False).to(training_device())
        mean, std = calibration(table_scores(model, self._calibration_set, self.config.pools.reward))
        return model, Calibration(mean, std)


@dataclass(eq=False)
class RewardRefitter:
    """Trains reward models, one after another in one process: the first one, then a candidate for each correction.

    ``reward_path``: the first reward model; None where it is still to be trained.
    """

    config: RunConfig
    sft_path: str
    reward_path: str | None
    run_dir: Path
    _progress: tuple[int, int] = (0, 0)

    def progress(self) -> tuple[int, int]:
        """Optimiser steps (done, in all) of the fit that goes on; may be asked from another thread."""
        return self._progress

    def start(self) -> None:
        """Read the pairs."""
        start_process(self.config.pools.reward.threads_per_actor, self.config.seed)
        self._tokenizer = load_tokenizer(self.sft_path, trust_remote_code=self.config.trust_remote_code)
        folder = self.config.stage_root / "pairs"
        self._train, self._heldout = (
            pair_table(read_pairs(folder / name), self._tokenizer.pad_token_id, self.config.share_prompts)
            for name in ("train.jsonl", "heldout.jsonl")
        )
        self._lengths = pair_lengths(self._train)

    def fit_first(self) -> RefitReport:
        """The first reward model, version 0: all pairs alike, from its own initial weights, into the stage folder."""
        indices = np.arange(len(self._train) // 2)
        request = RefitRequest(0, indices, None, self.config.seed)
        paths = stage_paths(self.config)
        return self._fit(request, self.config.reward.training, paths.reward_base, paths.root / "reward")

    def refit(self, request: RefitRequest) -> RefitReport:
        """A candidate for a correction, into ``reward/vN`` of the run folder."""
        folder = self.run_dir / "reward" / f"v{request.reward_version}"
        return self._fit(request, self.config.correction.training, self._initial_path(request.reward_version), folder)

    def _initial_path(self, reward_version: int) -> str:
        match self.config.correction.rm_init:
            case "sft":
                return self.sft_path
            case "base":
                return stage_paths(self.config).reward_base
            case "previous":
                # The candidate is always the successor of the live model.
                if reward_version > 1:
                    return str(self.run_dir / "reward" / f"v{reward_version - 1}")
                assert self.reward_path is not None
                return self.reward_path

    def _fit(self, request: RefitRequest, training: RewardTraining, initial: str, folder: Path) -> RefitReport:
        started = time.perf_counter()
        dtype = self.config.pools.reward.dtype
        trust = self.config.trust_remote_code
        model = load_reward_model(initial, dtype=dtype, trust_remote_code=trust, head_seed=self.config.seed)
        settings = EngineSettings.of(
            self.config.policy,
            learning_rate=training.learning_rate,
            max_grad_norm=training.max_grad_norm,
            dtype=dtype,
            weight_decay=training.weight_decay,
        )
        engine = TrainingEngine(model, settings)
        try:
            loss = self._train_epochs(engine, request, training)
            accuracy = pair_accuracy(table_scores(engine.forward, self._heldout, self.config.pools.reward))
            engine.save(self._tokenizer, folder)
        finally:
            engine.close()
        seconds = time.perf_counter() - started
        return RefitReport(request.reward_version, folder, loss, accuracy, seconds)

    def _train_epochs(self, engine: TrainingEngine, request: RefitRequest, training: RewardTraining) -> float:
        """Mean loss of the last epoch's pairs, each taken when it was trained on."""
        num_pairs = len(request.indices)
        batches = epoch_batches(num_pairs, training.batch_size, training.num_epochs, request.seed)
        last_epoch = len(batches) - len(batches) // training.num_epochs
        loss = 0.0
        for step, batch in enumerate(batches):
            weights = None if request.weights is None else request.weights[batch]
            batch_loss = self._train_batch(engine, request.indices[batch], weights, training)
            engine.step(cosine_factor(step, len(batches)))
            self._progress = (step + 1, len(batches))
            if step >= last_epoch:
                loss += batch_loss * len(batch) / num_pairs
        return loss

    def _train_batch(
        self, engine: TrainingEngine, pairs: IntArray, weights: FloatArray | None, training: RewardTraining
    ) -> float:
        """Accumulate the gradient of one optimiser batch of pairs; returns its mean loss."""
        chunks = length_chunks(self._lengths[pairs], training.micro_batch_size, training.micro_batch_tokens)

        def loss_of(chunk: list[int]) -> torch.Tensor:
            batch = self._train.batch(pair_rows(pairs[chunk])).to(engine.device)
            part = None if weights is None else torch.from_numpy(weights[chunk]).to(engine.device)
            return weighted_pair_loss(last_token_scores(engine.forward, batch), part, len(pairs))

        return engine.accumulate(chunks, loss_of)
