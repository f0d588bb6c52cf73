"""PPO's critic: a copy of a reward model, read at every token and trained in an engine of its own."""

from collections.abc import Sequence as Seq
from pathlib import Path

from torch import Tensor

from actors.training_engine import EngineSettings, TrainingEngine
from ocrm_ray.algorithm.reward_scores import calibration, recentre
from ocrm_ray.batches import SequenceTable, pad_rows
from ocrm_ray.config import RunConfig
from ocrm_ray.networks import load_reward_model, response_values, table_scores, table_values
from ocrm_ray.policy_learning import MicroBatch, value_loss


class Critic:
    """Values in the units of the calibrated reward: the shift (and scale) found at the start stays for good."""

    def __init__(self, config: RunConfig, folder: str | Path, calibration_set: SequenceTable) -> None:
        """``folder``: the reward model to start from."""
        self._policy = config.policy
        self._pool = config.pools.policy
        self._scaled = config.reward.scale == "calibration_std"
        policy, dtype = config.policy, self._pool.dtype
        model = load_reward_model(folder, dtype=dtype, trust_remote_code=config.trust_remote_code)
        settings = EngineSettings.of(
            policy, learning_rate=policy.critic_learning_rate, dtype=dtype, beta2=policy.adam_beta2
        )
        self._engine = TrainingEngine(model, settings)
        self._mean, self._std = calibration(table_scores(self._engine.forward, calibration_set, self._pool))

    def values(self, table: SequenceTable) -> Tensor:
        """Values [N, T] on the CPU of the states behind the response tokens; anything past a response's end."""
        return self._calibrated(pad_rows(table_values(self._engine.forward, table, self._pool)))

    def update(self, micros: Seq[MicroBatch], factor: float) -> float:
        """One optimiser step on a minibatch; returns its value loss."""

        def loss_of(micro: MicroBatch) -> Tensor:
            values = response_values(self._engine.forward, micro.batch)
            return value_loss(self._calibrated(values), micro, self._policy)

        total = self._engine.accumulate(micros, loss_of, self._policy.value_coefficient)
        self._engine.step(factor)
        return total

    def close(self) -> None:
        self._engine.close()

    def _calibrated(self, values: Tensor) -> Tensor:
        return recentre(values, self._mean, self._std, self._scaled)
