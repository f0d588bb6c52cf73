"""What the stages ask of a cluster: the work that needs networks, in verbs."""

from collections.abc import Callable
from typing import Protocol

from ocrm_ray.pools import Pools
from ocrm_ray.progress import ProgressState
from ocrm_ray.records import FloatArray, GenerationRequest, Sample

Show = Callable[[ProgressState], None]
"""Receives progress, to be shown where the user is."""


class Cluster(Protocol):
    """Starts actors as they are needed; ``close`` ends all that is left."""

    async def train_sft(self, show: Show) -> dict[str, object]:
        """Fine-tune the base model on the training prompts' references, into the SFT stage's folder; its figures."""

    async def sample(self, request: GenerationRequest) -> tuple[Sample, ...]:
        """Sample from the SFT model."""

    async def gold(self, prompts: list[str], responses: list[str], references: list[str | None]) -> list[float]:
        """Gold scores [N]."""

    async def train_reward(self, show: Show) -> dict[str, object]:
        """Train the first reward model on all training pairs, into the reward stage's folder; returns its figures."""

    async def behaviour_logprobs(self, num_pairs: int, show: Show) -> FloatArray:
        """Summed log-probs [N, 2] of the training pairs under who wrote them, at their own temperature."""

    async def pools(self) -> Pools:
        """The pools of RL, ready: the policy is the SFT model at version 0, the first reward model is live."""

    async def close(self) -> None:
        """End every process."""
