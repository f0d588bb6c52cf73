"""PPO's critic: a copy of a reward model, read at every token and trained in an engine of its own."""

from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from actors.training_engine import EngineSettings, TrainingEngine
from ocrm_ray.algorithm.calibration import calibration, recentre
from ocrm_ray.batches import SequenceTable, pad_rows
from ocrm_ray.config import RunConfig
from ocrm_ray.inference import row_scores, table_values
from ocrm_ray.networks import load_reward_model, response_values
from ocrm_ray.policy_learning import MicroBatch, value_loss


class Critic:
    """Values in the units of the calibrated reward: the shift (and scale) found at the start stays for good."""

    def __init__(self, config: RunConfig, folder: str | Path, calibration_set: SequenceTable) -> None:
        """``folder``: the reward model to start from."""
        self._policy = config.policy
        self._pool = config.pools.policy
        self._scaled = config.reward.scale == "calibration_std"
        dtype = self._pool.dtype
        model = load_reward_model(folder, dtype=dtype, trust_remote_code=config.trust_remote_code)
        settings = EngineSettings(
            learning_rate=self._policy.critic_learning_rate,
            max_grad_norm=self._policy.max_grad_norm,
            zero_stage=self._policy.zero_stage,
            dtype=dtype,
            beta2=self._policy.adam_beta2,
            checkpointing=self._policy.gradient_checkpointing,
        )
        self._engine = TrainingEngine(model, settings)
        rows = np.arange(len(calibration_set))
        with torch.no_grad():
            scores = row_scores(
                self._engine.forward, calibration_set, rows, self._pool.batch_size, self._pool.batch_tokens
            )
        self._mean, self._std = calibration(scores)

    def values(self, table: SequenceTable) -> Tensor:
        """Values [N, T] on the CPU of the states behind the response tokens; anything past a response's end."""
        return self._calibrated(pad_rows(table_values(self._engine.forward, table, self._pool)))

    def update(self, micros: Seq[MicroBatch], factor: float) -> float:
        """One optimiser step on a minibatch; returns its value loss."""
        total = 0.0
        for number, micro in enumerate(micros, start=1):
            loss = value_loss(self._calibrated(response_values(self._engine.forward, micro.batch)), micro, self._policy)
            self._engine.accumulate(self._policy.value_coefficient * loss, is_last=number == len(micros))
            total += loss.item()
        self._engine.step(factor)
        return total

    def close(self) -> None:
        self._engine.close()

    def _calibrated(self, values: Tensor) -> Tensor:
        return recentre(values, self._mean, self._std, self._scaled)
