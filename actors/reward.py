"""Reward models: servers that score under the live and a staged one, and the refitter that trains the next."""

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from actors.reward_fit import FitData, RewardFit
from actors.training_engine import join_process_group, start_process, training_device
from ocrm_ray.algorithm.reward_ensemble import aggregate
from ocrm_ray.algorithm.reward_scores import calibration, recentre
from ocrm_ray.batches import SequenceTable
from ocrm_ray.config import RewardTraining, RunConfig
from ocrm_ray.networks import ScalarModel, load_reward_model, load_tokenizer, reward_members, table_scores
from ocrm_ray.preferences import read_pairs
from ocrm_ray.records import Calibration, FloatArray, RefitReport, RefitRequest, Sequence
from ocrm_ray.reward_learning import ResponseGroups, calibration_sequences, interleaved
from ocrm_ray.stages import stage_paths

LIVE = "live"
MEMBER_SEEDS = 7919
"""Between the seeds of an ensemble's members."""


@dataclass(eq=False)
class RewardServer:
    """Scores, calibrated on the frozen set; a candidate is loaded into a slot beside the live model.

    ``reward_path``: the first one. ``stage`` may run on a second thread: ``score`` reads the mapping of slots once.
    """

    config: RunConfig
    reward_path: str

    def __post_init__(self) -> None:
        self._slots: dict[str, list[tuple[ScalarModel, Calibration]]] = {}

    def start(self) -> None:
        """Load the first reward model and calibrate it."""
        config = self.config
        start_process(config, config.pools.reward)
        self._pad_id = load_tokenizer(
            reward_members(self.reward_path)[0], trust_remote_code=config.trust_remote_code
        ).pad_token_id
        pairs = read_pairs(config.stage_root / "pairs" / "train.jsonl")
        self._calibration_set = self._table(calibration_sequences(pairs, config.reward.num_calibration))
        self._slots = {LIVE: self._load(self.reward_path)}

    def score(self, sequences: Seq[Sequence], slot: str = LIVE) -> FloatArray:
        """Calibrated scores [N], read at the last token; ``slot``: ``live`` or a promotion_id."""
        slots = self._slots
        assert slot in slots, f"no reward model in slot {slot}"
        settings, table = self.config.reward, self._table(sequences)
        members = [(table_scores(model, table, self.config.pools.reward), found) for model, found in slots[slot]]
        if len(members) == 1:
            ((scores, found),) = members
            return recentre(scores, found.mean, found.std, settings.scale == "calibration_std").numpy()
        scaled = torch.stack([recentre(scores, found.mean, found.std, scale=True) for scores, found in members])
        ensemble = settings.ensemble
        total = aggregate(scaled, ensemble.aggregate, ensemble.variance_coefficient)
        common = 1.0 if settings.scale == "calibration_std" else fmean(found.std for _, found in members)
        return (common * total).numpy()

    def stage(self, promotion_id: str, refit: RefitReport) -> Calibration:
        """Load a candidate beside the live model and calibrate it; of an ensemble the members' mean calibration."""
        candidate, live = self._load(refit.path), self._slots[LIVE]
        self._slots = {name: held for name, held in self._slots.items() if held is live} | {promotion_id: candidate}
        found = [of_member for _, of_member in candidate]
        return Calibration(fmean(each.mean for each in found), fmean(each.std for each in found))

    def commit(self, promotion_id: str, reward_version: int) -> None:
        """The staged model, if there is one of this promotion, is live, under both names. Again: no effect."""
        live = self._slots[LIVE]
        if (staged := self._slots.get(promotion_id, live)) is not live:
            self._slots = {LIVE: staged, promotion_id: staged}

    def _table(self, sequences: Seq[Sequence]) -> SequenceTable:
        return SequenceTable(sequences, self._pad_id, self.config.share_prompts)

    def _load(self, path: str | Path) -> list[tuple[ScalarModel, Calibration]]:
        """The model, or an ensemble's members."""
        dtype, trust, members = self.config.pools.reward.dtype, self.config.trust_remote_code, []
        for folder in reward_members(path):
            model = load_reward_model(folder, dtype=dtype, trust_remote_code=trust)
            model = model.requires_grad_(False).to(training_device())
            found = calibration(table_scores(model, self._calibration_set, self.config.pools.reward))
            members.append((model, Calibration(*found)))
        return members


@dataclass(eq=False)
class RewardRefitter:
    """Trains reward models, one after another in one process: the first one, then a candidate for each correction.

    Where several ranks are such an actor each, all are asked for the same fits in the same order.

    ``reward_path``: the first reward model; None where it is still to be trained.
    """

    config: RunConfig
    sft_path: str
    reward_path: str | None
    run_dir: Path

    def __post_init__(self) -> None:
        self._fitting: RewardFit | None = None
        self._num_fitted = 0

    def progress(self) -> tuple[int, int]:
        """Optimiser steps (done, in all) of the fit that goes on; may be asked from another thread."""
        done, in_all = (0, 0) if self._fitting is None else self._fitting.progress
        return done + self._num_fitted * in_all, in_all * self.config.reward.ensemble.num_members

    def start(self) -> None:
        """Read the pairs."""
        start_process(self.config, self.config.pools.reward)
        join_process_group(self.config.deadlines.request_s)
        self._tokenizer = load_tokenizer(self.sft_path, trust_remote_code=self.config.trust_remote_code)
        folder = self.config.stage_root / "pairs"
        train, heldout = (interleaved(read_pairs(folder / name)) for name in ("train.jsonl", "heldout.jsonl"))
        self._sequences, self._train, self._heldout = train, self._table(train), self._table(heldout)

    def fit_first(self) -> RefitReport:
        """The first reward model, version 0: all pairs alike, from its own initial weights, into the stage folder."""
        indices = np.arange(len(self._train) // 2)
        request = RefitRequest(0, indices, None, self.config.seed)
        paths = stage_paths(self.config)
        return self._fit(request, self.config.reward.training, paths.reward_base, Path(paths.reward))

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
        """Every member of the ensemble, one after another; the figures are means over them."""
        started = time.perf_counter()
        num_members = self.config.reward.ensemble.num_members
        starts = reward_members(initial)
        folders = [folder / f"member-{number}" for number in range(num_members)] if num_members > 1 else [folder]
        data, found = self._data(request), []
        for number, member_folder in enumerate(folders):
            self._num_fitted = number
            self._fitting = self._member(request, training, data, number)
            found.append(self._fitting.run(starts[number % len(starts)], member_folder, self._tokenizer))
        figures = {name: fmean(of_member[name] for of_member in found) for name in found[0]}
        loss, accuracy = figures.pop("loss"), figures.pop("heldout_accuracy")
        seconds = time.perf_counter() - started
        return RefitReport(request.reward_version, folder, loss, accuracy, seconds, figures)

    def _member(self, request: RefitRequest, training: RewardTraining, data: FitData, number: int) -> RewardFit:
        correction, seed = self.config.correction, request.seed + MEMBER_SEEDS * number
        uses_groups = data.groups is not None
        meta = correction.metarm if uses_groups and correction.strategy == "metarm" else None
        views = correction.rlp_uml if uses_groups and correction.strategy == "rlp_uml" else None
        return RewardFit(self.config, training, data, seed, meta, views)

    def _data(self, request: RefitRequest) -> FitData:
        """The request's pairs, the extra ones behind those of the run, and its groups if two have two responses."""
        train, indices, weights = self._train, request.indices, request.weights
        if request.extra_pairs:
            train = self._table([*self._sequences, *chain.from_iterable(request.extra_pairs)])
            indices = np.concatenate([indices, np.arange(len(self._train) // 2, len(train) // 2)])
            assert weights is None, "extra pairs come without weights"
        groups = ResponseGroups(request.groups, self._tokenizer.pad_token_id, self.config.share_prompts)
        return FitData(train, indices, weights, self._heldout, groups if len(groups) > 1 else None)

    def _table(self, sequences: Seq[Sequence]) -> SequenceTable:
        return SequenceTable(sequences, self._tokenizer.pad_token_id, self.config.share_prompts)
