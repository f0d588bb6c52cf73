"""The four pools as the coordinator sees them, the evaluator, and the stages' cluster: protocols, nothing of Ray.

``actors.groups`` implements them over Ray actors, ``tests/fakes.py`` in process. Every call has a deadline of
its own inside the pool; an actor's failure surfaces as that call's exception.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ocrm_ray.checked_files import Entry
from ocrm_ray.checkpoints import Checkpoint
from ocrm_ray.metrics import Observer
from ocrm_ray.progress import ProgressState
from ocrm_ray.records import (
    Calibration,
    EvaluationReport,
    FloatArray,
    GenerationRequest,
    IntArray,
    PolicyWeights,
    Prompt,
    PublishReport,
    RefitReport,
    RefitRequest,
    Rollout,
    Sample,
    Sequence,
    UpdateReport,
)


class GenerationPool(Protocol):
    """vLLM engines. Weights are swapped in flight; running requests survive it."""

    async def generate(self, request: GenerationRequest) -> tuple[Sample, ...]:
        """Sample; returns when the last of the request's samples is finished."""

    async def abort(self, request_id: str) -> None:
        """Drop a request; its ``generate`` raises ``asyncio.CancelledError`` or has been cancelled by the caller."""

    async def load_weights(self, weights: PolicyWeights) -> PublishReport:
        """Put the weights live on every engine and stamp later tokens with their version."""

    async def score(self, sequences: Seq[Sequence]) -> list[FloatArray]:
        """Teacher-forced log-probs [T] of the responses at temperature 1, by the path that sampling takes: those of
        the first engine, then those of the next, and so on."""

    async def sleep(self) -> None:
        """Leave the GPUs' memory to others, once no request is running; only ``wake`` may come next."""

    async def wake(self) -> None:
        """Take the memory back, with the weights that were live."""


class PolicyPool(Protocol):
    """DeepSpeed engines: the policy, and for PPO its critic."""

    async def update(self, rollouts: Seq[Rollout]) -> UpdateReport:
        """One policy update, v -> v + 1. Refuses rollouts whose scores are not of the live RM and anchor."""

    async def learn_pairs(self, indices: IntArray, anchor_logprobs: FloatArray) -> UpdateReport:
        """One update, v -> v + 1, on training pairs ``indices`` [N], whose summed log-probs under the SFT model are
        ``anchor_logprobs`` [N, 2]: DPO or WPO."""

    async def export_weights(self) -> PolicyWeights:
        """Copy the present weights to where engines and scorers can read them; later updates do not change them."""

    async def send_weights(self, weights: PolicyWeights) -> None:
        """Take part in a transfer that needs both sides (NCCL), beside ``load_weights``; else nothing."""

    async def release_weights(self, weights: PolicyWeights) -> None:
        """Nobody reads the exported weights any more: their place may be written again."""

    async def logprobs(self, sequences: Seq[Sequence]) -> list[FloatArray]:
        """Log-probs [T] of the responses at temperature 1 under the present weights."""

    async def stage(self, promotion_id: str, refit: RefitReport | None) -> None:
        """Prepare what a promotion changes in the trainer (critic weights); off the critical path."""

    async def commit(self, promotion_id: str, reward_version: int, anchor_version: int) -> None:
        """Make the staged critic live, reset the optimiser if so configured, expect the new versions. Idempotent."""

    async def capture(self) -> None:
        """Copy out what a checkpoint holds of the trainer; call between two updates."""

    async def write_checkpoint(self, folder: Path, snapshot: PolicyWeights | None) -> dict[str, Entry]:
        """Write what was captured into a checkpoint's folder, and the ``snapshot`` of a correction in flight.

        Returns entries of those files that are on the disk already, by their paths in the folder.
        """

    async def saved_snapshot(self) -> PolicyWeights:
        """That snapshot, of the checkpoint from which the trainer went on, exported again."""

    async def save(self, name: str, weights: PolicyWeights | None = None) -> None:
        """Write the policy, as it is or as it was exported, as a Hugging Face model folder ``name`` of the run."""


class ScoringPool(Protocol):
    """Log-probs under the SFT model, the anchor and snapshots of the policy."""

    async def score(self, sequences: Seq[Sequence], models: Seq[str] = ("live", "sft")) -> list[list[FloatArray]]:
        """For each of ``models`` log-probs [T] of each sequence at the rollout temperature. A model is ``sft``,
        ``live`` (the anchor) or a staged promotion_id, which stays a name of the live anchor after its commit, for
        requests on their way."""

    async def pair_logprobs(self, weights: PolicyWeights | None, indices: IntArray) -> FloatArray:
        """Summed log-probs [N, 2] of (chosen, rejected) of training pairs: under a snapshot at the rollout
        temperature, or with None under the behaviour model at the pairs' temperature."""

    async def pair_alignments(self, weights: PolicyWeights, indices: IntArray) -> FloatArray:
        """How typical of a snapshot the responses of training pairs are, [N, 2]: log-prob less the logarithm of the
        chance that two draws agree, a mean over tokens, at the rollout temperature."""

    async def stage_anchor(self, promotion_id: str, weights: PolicyWeights) -> None:
        """Load a snapshot beside the live anchor."""

    async def discard(self) -> None:
        """What is staged never goes live: its correction has failed."""

    async def commit(self, promotion_id: str, anchor_version: int) -> None:
        """Make the staged anchor live, if one was staged. Idempotent."""

    async def capture(self) -> None:
        """Keep the live anchor, for ``write_anchor``, whatever goes live meanwhile."""

    async def write_anchor(self, folder: Path, anchor_version: int) -> None:
        """Write what was captured into a checkpoint's folder; nothing for version 0, the SFT model."""


class RewardPool(Protocol):
    """Live reward models that serve, and a refit that trains beside them."""

    async def score(self, sequences: Seq[Sequence], slot: str = "live") -> FloatArray:
        """Calibrated scores [N], read at the last token. ``slot`` is ``live`` or a staged promotion_id, which stays
        a name of the live RM after its commit, for requests on their way."""

    async def refit(self, request: RefitRequest) -> RefitReport:
        """Train a candidate; serving goes on."""

    async def stage(self, promotion_id: str, refit: RefitReport) -> Calibration:
        """Load the candidate into a shadow slot of every server and calibrate it on the frozen set."""

    async def discard(self) -> None:
        """What is staged never goes live: its correction has failed."""

    async def commit(self, promotion_id: str, reward_version: int) -> None:
        """Make the staged candidate live, if one was staged. Idempotent."""


class Evaluator(Protocol):
    """Measures held-out samples; an actor of its own."""

    async def evaluate(
        self,
        step: int,
        samples: Seq[tuple[Sample, ...]],
        proxy: Seq[FloatArray],
        sft_logprobs: Seq[Seq[FloatArray]],
        anchor_logprobs: Seq[Seq[FloatArray]],
    ) -> tuple[EvaluationReport, list[dict[str, object]]]:
        """``samples[i]`` are the samples of evaluation prompt i, with their proxy scores and their log-probs under
        the SFT model and the anchor. Returns the report and the rows of samples.jsonl."""

    async def gold_of(self, prompts: Seq[Prompt], sequences: Seq[Sequence]) -> list[float]:
        """Gold scores [N] of the responses; ``prompts[i]`` is what ``sequences[i]`` answers."""

    async def clusters(self, groups: Seq[Seq[Sequence]]) -> list[list[int]]:
        """Which cluster each response of a group is in: those of one cluster say the same."""


@dataclass(frozen=True, slots=True)
class Pools:
    """The four pools, and who measures held-out samples."""

    generation: GenerationPool
    policy: PolicyPool
    scoring: ScoringPool
    reward: RewardPool
    evaluator: Evaluator


Show = Callable[[ProgressState], None]
"""Receives progress, to be shown where the user is."""


class Cluster(Protocol):
    """What the stages ask of a cluster: the work that needs networks, in verbs.

    Actors start as they are needed; ``close`` ends all that is left.
    """

    saved: Checkpoint | None
    """From which the pools of a resumed run go on."""
    observe: Observer
    """Is told the figures of RL as they come."""

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

    async def listen(self, emit: Callable[..., None]) -> None:
        """``emit(event, **fields)`` is told from now on what becomes of the pools' processes."""

    async def close(self, is_done: bool = False) -> None:
        """End every process; ``is_done``: but those that another run can go on with, for this one went well."""
