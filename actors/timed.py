"""Actors that only take time: what a rehearsal has in the place of networks. They load no torch.

Each answers like the actor that it stands for, with records of the right size, after seconds that it draws.
"""

import asyncio
import random
from collections import defaultdict
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np

from actors.request_desk import RequestDesk
from ocrm_ray import records
from ocrm_ray.config import Duration, Rehearsal, Rollout
from ocrm_ray.records import FloatArray

NUM_PAIRS = 2048
"""Training pairs of a rehearsal: they share ``ratio_s``."""


class TimedActor:
    """Draws seconds, takes them and books them."""

    def __init__(self, rehearsal: Rehearsal, rollout: Rollout, seed: int) -> None:
        self._rehearsal = rehearsal
        self._rollout = rollout
        self._random = random.Random(seed)
        self._one_message = asyncio.Lock()
        self._booked: dict[str, list[tuple[float, float]]] = defaultdict(list)

    async def start(self, *_: object) -> None:
        """Done at once; so are all methods that are this one under another name."""

    async def booked(self) -> dict[str, list[tuple[float, float]]]:
        """(start on this machine's monotonic clock, seconds) of all that was drawn, by kind of work.

        Of ``staleness``: (time, updates) of each rollout trained on.
        """
        return dict(self._booked)

    async def logprobs(self, sequences: Seq[records.Sequence]) -> list[FloatArray]:
        """Of the probe's responses, at once."""
        return _logprobs(sequences)

    def _draw(self, duration: Duration, num_prompts: float) -> float:
        factor = self._random.lognormvariate(-(duration.jitter**2) / 2, duration.jitter)
        is_late = self._random.random() < duration.tail_share
        return (duration.call_s + duration.item_s * num_prompts) * factor * (duration.tail_factor if is_late else 1.0)

    async def _take(self, work: str, seconds: float) -> None:
        """Messages to one actor are answered one after the other."""
        async with self._one_message:
            self._booked[work].append((_now(), seconds))
            await asyncio.sleep(seconds)

    def _num_prompts(self, sequences: Seq[records.Sequence]) -> float:
        return len(sequences) / self._rollout.samples_per_prompt


class TimedEngine(TimedActor, RequestDesk):
    """``GenerationActor``: a request keeps one of the engine's slots for a drawn time, and for the pauses in it."""

    def __init__(self, rehearsal: Rehearsal, rollout: Rollout, seed: int) -> None:
        TimedActor.__init__(self, rehearsal, rollout, seed)
        RequestDesk.__init__(self)
        self._slots = asyncio.Semaphore(rehearsal.engine_slots)
        self._version = 0
        self._paused_s = self._paused_until = 0.0

    close, score = TimedActor.start, TimedActor.logprobs

    async def load_weights(self, weights: records.PolicyWeights) -> records.PublishReport:
        """Running requests stand still for the last ``pause_s`` of it, and go on under the new version."""
        seconds, pause_s = self._rehearsal.publish_s, self._rehearsal.pause_s
        self._booked["publish"].append((_now(), seconds))
        await asyncio.sleep(seconds - pause_s)
        self._paused_s, self._paused_until = self._paused_s + pause_s, _now() + pause_s
        await asyncio.sleep(pause_s)
        self._version = weights.version
        return records.PublishReport(weights.version, weights.num_bytes, seconds, pause_s)

    async def sample(self, request: records.GenerationRequest) -> tuple[records.Sample, ...]:
        async with self._slots:
            first_version = self._version
            await self._decode()
        prompt, length = request.prompt.token_ids, self._rollout.max_new_tokens
        sequences = [records.Sequence(prompt, (0,) * length, has_eos=True) for _ in range(request.num_samples)]
        answers = zip(sequences, _logprobs(sequences), strict=True)
        return tuple(records.Sample(*answer, first_version, self._version) for answer in answers)

    async def _decode(self) -> None:
        """Take a drawn time; what is left of a pause comes before it, a later one holds it up."""
        started, paused_s = _now(), self._paused_s
        seconds = left_s = max(0.0, self._paused_until - started) + self._draw(self._rehearsal.generate, 1)
        try:
            while left_s > 0:
                await asyncio.sleep(left_s)
                left_s, paused_s = self._paused_s - paused_s, self._paused_s
                seconds += left_s
        finally:
            self._booked["generation"].append((started, min(seconds, _now() - started)))


class TimedPolicy(TimedActor):
    """``PolicyActor``."""

    _version = 0
    release_weights = send_weights = stage = commit = save = close = TimedActor.start

    async def update(self, rollouts: Seq[records.Rollout]) -> records.UpdateReport:
        self._booked["staleness"] += [(_now(), self._version - rollout.first_version) for rollout in rollouts]
        seconds = self._draw(self._rehearsal.train, len(rollouts))
        await self._take("policy", seconds)
        self._version += 1
        return records.UpdateReport(self._version, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, seconds)

    async def export_weights(self) -> records.PolicyWeights:
        return records.PolicyWeights(self._version, Path(), int(self._rehearsal.weights_gib * 2**30))


class TimedScorer(TimedActor):
    """``ScoringActor``; ``score`` under one model takes half of what anchor and SFT take together."""

    load_snapshot = stage_anchor = commit = close = TimedActor.start

    async def score(self, sequences: Seq[records.Sequence], models: Seq[str]) -> list[list[FloatArray]]:
        seconds = self._draw(self._rehearsal.score, self._num_prompts(sequences) * len(models) / 2)
        await self._take("scoring", seconds)
        return [_logprobs(sequences) for _ in models]

    async def pair_logprobs(self, weights: records.PolicyWeights | None, indices: records.IntArray) -> FloatArray:
        await self._take("ratios", self._rehearsal.ratio_s * len(indices) / NUM_PAIRS)
        return np.zeros((len(indices), 2), dtype=np.float32)

    pair_alignments = pair_logprobs


class TimedServer(TimedActor):
    """``RewardServer``."""

    commit = TimedActor.start

    async def score(self, sequences: Seq[records.Sequence], slot: str) -> FloatArray:
        await self._take("reward", self._draw(self._rehearsal.reward, self._num_prompts(sequences)))
        return np.zeros(len(sequences), dtype=np.float32)

    async def stage(self, promotion_id: str, refit: records.RefitReport) -> records.Calibration:
        return records.Calibration(0.0, 1.0)


class TimedRefitter(TimedActor):
    """``RewardRefitter``."""

    async def refit(self, request: records.RefitRequest) -> records.RefitReport:
        seconds = self._rehearsal.refit_s
        await self._take("refit", seconds)
        return records.RefitReport(request.reward_version, Path(), 0.0, 0.5, seconds)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _logprobs(sequences: Seq[records.Sequence]) -> list[FloatArray]:
    return [np.zeros(len(sequence.response_ids), dtype=np.float32) for sequence in sequences]
