"""One fit of one reward model to preference pairs, as the correction's strategy says."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.engine_settings import EngineSettings
from actors.training_engine import TrainingEngine
from ocrm_ray import ranks
from ocrm_ray.algorithm.multiview import MultiView, grown_coefficient
from ocrm_ray.algorithm.reward_spread import ascent_step
from ocrm_ray.batches import SequenceTable, length_chunks
from ocrm_ray.config import MetaStep, RepresentationLoss, RewardTraining, RunConfig
from ocrm_ray.networks import last_token_scores, last_token_states, load_reward_model, table_scores
from ocrm_ray.records import FloatArray, IntArray
from ocrm_ray.reward_learning import (
    ResponseGroups,
    cosine_factor,
    epoch_batches,
    group_spread,
    pair_accuracy,
    pair_lengths,
    pair_rows,
    weighted_pair_loss,
)

Part = Callable[[], Tensor]
"""One forward pass: a share of an optimiser batch's loss."""


@dataclass(frozen=True, slots=True)
class FitData:
    """Pairs ``indices`` [N] of ``train`` with ``weights`` [N] (None: all 1), held-out ones, on-policy responses."""

    train: SequenceTable
    indices: IntArray
    weights: FloatArray | None
    heldout: SequenceTable
    groups: ResponseGroups | None = None


@dataclass(eq=False)
class RewardFit:
    """``run`` trains; ``progress`` is (optimiser steps done, in all). ``seed``: of the order and of a new head.

    ``meta``, ``views``: how the groups of responses are used, MetaRM's way or RLP's; not both.
    """

    config: RunConfig
    training: RewardTraining
    data: FitData
    seed: int
    meta: MetaStep | None = None
    views: RepresentationLoss | None = None
    progress: tuple[int, int] = (0, 0)
    _sums: dict[str, list[float]] = field(default_factory=dict)

    def run(self, initial: str, folder: Path, tokenizer: Any) -> dict[str, float]:
        """Train what is at ``initial`` and save it; ``loss`` (of the last epoch's pairs, each taken when it was
        trained on), ``heldout_accuracy``, and what the strategy has to tell."""
        dtype, trust = self.config.pools.reward.dtype, self.config.trust_remote_code
        model = load_reward_model(initial, dtype=dtype, trust_remote_code=trust, head_seed=self.seed)
        training = self.training
        settings = EngineSettings.of(
            self.config.policy,
            learning_rate=training.learning_rate,
            max_grad_norm=training.max_grad_norm,
            dtype=dtype,
            weight_decay=training.weight_decay,
            zero_stage=self.config.refit_zero_stage,
            lora=self.config.reward.lora,
        )
        self._engine = TrainingEngine(model, settings)
        self._rng = np.random.default_rng([self.seed, 5])
        self._lengths = pair_lengths(self.data.train)
        if self.views is not None:
            self._prepare_views(self.views)
        try:
            loss = self._epochs()
            accuracy = pair_accuracy(table_scores(self._engine.forward, self.data.heldout, self.config.pools.reward))
            self._engine.save(tokenizer, folder)
        finally:
            self._engine.close()
        told = {name: fmean(values) for name, values in self._sums.items()}
        return {"loss": loss, "heldout_accuracy": accuracy, **told}

    def _epochs(self) -> float:
        training, num_pairs = self.training, len(self.data.indices)
        batches = epoch_batches(num_pairs, training.batch_size, training.num_epochs, self.seed)
        last_epoch = len(batches) - len(batches) // training.num_epochs
        loss, self.progress = 0.0, (0, len(batches))
        for step, batch in enumerate(batches):
            batch_loss = self._step(batch, cosine_factor(step, len(batches)))
            self.progress = (step + 1, len(batches))
            if step >= last_epoch:
                loss += batch_loss * len(batch) / num_pairs
        return loss

    def _step(self, batch: IntArray, factor: float) -> float:
        """One optimiser step on pairs at positions ``batch``; returns their mean loss."""
        parts = self._pair_parts(batch)
        if self.meta is not None:
            with self._engine.moved(self._moves(self.meta)):
                loss = self._engine.accumulate(parts, _call)
            self._engine.step(factor)
            return loss
        if self.views is None:
            loss = self._engine.accumulate(parts, _call)
            self._engine.step(factor)
            return loss
        rows = self._groups.draw_views(self.views.num_prompts, self._rng)
        if ranks.rank() == 0:  # whose networks for it are the only ones that learn
            parts.append(partial(self._view_loss, self.views, rows))
        total = self._engine.accumulate(parts, _call)
        self._engine.step(factor)
        self._view_optimizer.step()
        self._view_optimizer.zero_grad()
        return total - self._sums.get("view_loss", [0.0])[-1] * self.views.coefficient

    def _pair_parts(self, batch: IntArray) -> list[Part]:
        pairs = self.data.indices[batch]
        weights = None if self.data.weights is None else self.data.weights[batch]
        chunks = length_chunks(self._lengths[pairs], self.training.micro_batch_size, self.training.micro_batch_tokens)

        def loss_of(chunk: list[int]) -> Tensor:
            micro = self.data.train.batch(pair_rows(pairs[chunk])).to(self._engine.device)
            part = None if weights is None else torch.from_numpy(weights[chunk]).to(self._engine.device)
            return weighted_pair_loss(last_token_scores(self._engine.forward, micro), part, len(pairs))

        return [partial(loss_of, chunk) for chunk in chunks]

    @property
    def _groups(self) -> ResponseGroups:
        assert self.data.groups is not None
        return self.data.groups

    def _moves(self, meta: MetaStep) -> list[Tensor]:
        """Towards a wider spread of the rewards of some prompts' responses, in forward passes like those of pairs."""
        drawn, training = self._groups.draw(meta.num_prompts, self._rng), self.training
        sizes = np.array([len(rows) for rows in drawn])
        lengths = np.array([self._groups.table.lengths[rows].sum() for rows in drawn])
        cut = length_chunks(lengths, 2 * training.micro_batch_size, training.micro_batch_tokens, sizes)
        chunks = [[drawn[number] for number in chunk] for chunk in cut]

        def spread(groups: Seq[IntArray]) -> Tensor:
            micro = self._groups.table.batch(np.concatenate(groups)).to(self._engine.device)
            found = group_spread(last_token_scores(self._engine.module, micro), groups) / len(drawn)
            spreads.append(found.item())
            return found

        spreads: list[float] = []
        gradients = self._engine.gradients(chunks, spread)
        self._tell("reward_spread", ranks.add_up(torch.tensor(sum(spreads), dtype=torch.float64)).item())
        moments = self._engine.second_moments() if meta.step == "preconditioned" else None
        return ascent_step(gradients, meta.step, meta.eta, moments)

    def _prepare_views(self, views: RepresentationLoss) -> None:
        """Networks of the representation loss alone: made anew for each fit, and dropped after it."""
        generator_state = torch.get_rng_state()
        torch.manual_seed(self.seed)
        hidden_size = self._engine.network.config.get_text_config().hidden_size
        self._multiview = MultiView(hidden_size, views.latent_size).to(self._engine.device)
        torch.set_rng_state(generator_state)
        # Adam takes no notice that the engine makes losses as many times as large as there are ranks
        self._view_optimizer = torch.optim.Adam(self._multiview.parameters(), views.learning_rate)

    def _view_loss(self, views: RepresentationLoss, rows: IntArray) -> Tensor:
        micro = self._groups.table.batch(rows).to(self._engine.device)
        states = last_token_states(self._engine.forward, micro)
        # ZeRO 2 wants gradients of the same parameters, the head's too, from every rank's pass
        of_head: Tensor = 0.0 * self._engine.network.score(states).sum()
        first, second = states.float().chunk(2)
        shape = (2, len(first), views.latent_size)
        noise = torch.from_numpy(self._rng.standard_normal(shape, dtype=np.float32)).to(self._engine.device)
        done, in_all = self.progress
        loss: Tensor = self._multiview(first, second, noise, grown_coefficient(done / in_all))
        self._tell("view_loss", loss.item())
        return views.coefficient * loss + of_head

    def _tell(self, name: str, value: float) -> None:
        self._sums.setdefault(name, []).append(value)


def _call(part: Part) -> Tensor:
    return part()
