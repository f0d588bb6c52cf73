"""Publishing policy weights to the engines, and the alarm for engines that go on with old ones.

A publish can fail without an error: a tied head left behind, a reload that did nothing, prefixes of the KV cache
that were computed with the old weights. Each shows as a gap between the log-probs of engine and trainer.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ocrm_ray.config import Probe
from ocrm_ray.errors import StaleWeightsError
from ocrm_ray.pools import GenerationPool, PolicyPool
from ocrm_ray.records import FloatArray, PolicyWeights, PublishReport, Sequence


def probe_position(sequence: Sequence) -> int:
    """Index in the response of the token whose log-prob an engine reads through its prefix cache.

    The last token before EOS: it sees most of the cached tokens, while EOS itself is often certain, and the
    log-prob of a certain token does not move with the weights.
    """
    return max(0, len(sequence.response_ids) - (2 if sequence.has_eos else 1))


class Gap(NamedTuple):
    """Mean absolute difference of engine and trainer log-probs, in nats a token; the largest of all engines.

    ``tokens``: over all tokens. ``cached``: over the token of each sequence that was read through the prefix
    cache, apart because the mean over all tokens would dilute it.
    """

    tokens: float
    cached: float


@dataclass(frozen=True, slots=True)
class Exported:
    """Weights on their way; ``trainer``: their log-probs of the probe's sequences, where a probe is due."""

    weights: PolicyWeights
    trainer: tuple[FloatArray, ...] | None
    seconds: float


@dataclass(eq=False)
class WeightPublisher:
    """Brings the policy's weights into the engines and keeps them as long as someone reads them.

    ``export`` between two updates, then ``put_live`` beside the next one, one at a time: with two buffers one is
    read while the other is written. ``emit(event, **fields)`` receives ``weights_published`` and ``probe_measured``.
    """

    generation: GenerationPool
    policy: PolicyPool
    probe: Probe
    emit: Callable[..., None]

    def __post_init__(self) -> None:
        self._sequences: tuple[Sequence, ...] = ()
        self._bound: Gap | None = None
        self._num_exports = 0
        self._latest: PolicyWeights | None = None
        self._kept: dict[int, PolicyWeights] = {}
        self._holds: Counter[int] = Counter()

    async def start(self, sequences: Seq[Sequence]) -> Gap:
        """Measure the baseline gap on ``sequences``, which every later probe scores again.

        Call it while the engines run the very weights that the trainer has, before the first publish.
        """
        assert sequences, "the probe needs at least one sequence"
        self._sequences = tuple(sequences)
        baseline = await self._measure(await self.policy.logprobs(self._sequences))
        self._bound = Gap(*(max(self.probe.factor * gap, self.probe.floor) for gap in baseline))
        return baseline

    async def resume(self, sequences: Seq[Sequence], bound: Seq[float]) -> None:
        """Instead of ``start`` in a run that goes on: bring its weights into engines that have others, and probe."""
        self._sequences, self._bound = tuple(sequences), Gap(*bound)
        await self.put_live(await self.export())

    def adopt(self, weights: PolicyWeights) -> PolicyWeights:
        """Keep weights that the trainer has exported of its own, held once."""
        self._kept[weights.version], self._holds[weights.version] = weights, 1
        return weights

    @property
    def bound(self) -> Gap:
        """Of every later probe's gap."""
        assert self._bound is not None, "start() or resume() finds it"
        return self._bound

    async def export(self) -> Exported:
        """The present weights; also how the trainer scores the probe, for the first export and every ``every``-th."""
        assert self._bound is not None, "start() comes before export()"
        started = time.monotonic()
        weights = await self.policy.export_weights()
        is_due = self._num_exports % self.probe.every == 0
        trainer = tuple(await self.policy.logprobs(self._sequences)) if is_due else None
        self._num_exports += 1
        previous, self._latest = self._latest, weights
        self._kept[weights.version] = weights
        self._holds[weights.version] = 2  # as the latest, and until it is live
        if previous is not None:
            await self.release(previous.version)
        return Exported(weights, trainer, time.monotonic() - started)

    async def put_live(self, exported: Exported) -> PublishReport:
        """Load exported weights into every engine, and probe them where that is due.

        A probe over its bound loads them once more. Raises StaleWeightsError if the next probe is over it too.
        """
        weights = exported.weights
        report = await self._load(exported)
        if exported.trainer is not None and await self._stale(weights.version, exported.trainer):
            report = await self._load(exported)
            if message := await self._stale(weights.version, exported.trainer):
                raise StaleWeightsError(message)
        await self.release(weights.version)
        return report

    def hold(self, version: int | None = None) -> PolicyWeights:
        """Keep weights, those exported last or ``version``, until ``release`` is called as often as ``hold`` was."""
        assert self._latest is not None, "nothing is exported yet"
        weights = self._latest if version is None else self._kept[version]
        self._holds[weights.version] += 1
        return weights

    async def release(self, version: int) -> None:
        """Give a hold back; without any the weights' place is free for later ones."""
        assert self._holds[version] > 0, f"version {version} is not held"
        self._holds[version] -= 1
        if not self._holds[version]:
            await self.policy.release_weights(self._kept.pop(version))

    async def _load(self, exported: Exported) -> PublishReport:
        weights, started = exported.weights, time.monotonic()
        report, _ = await asyncio.gather(self.generation.load_weights(weights), self.policy.send_weights(weights))
        report = replace(report, seconds=exported.seconds + time.monotonic() - started)
        self.emit(
            "weights_published",
            policy_version=weights.version,
            bytes=weights.num_bytes,
            seconds=report.seconds,
            export_s=exported.seconds,
            transfer_s=report.transfer_s,
            repack_s=report.repack_s,
            pause_s=report.pause_s,
        )
        return report

    async def _stale(self, version: int, trainer: Seq[FloatArray]) -> str | None:
        """Probe: what to say of the gap that is largest against its bound, if it is over it."""
        assert self._bound is not None
        pairs = zip(await self._measure(trainer), self._bound, strict=True)
        # a gap of NaN is not within any bound, and is reported rather than hidden by a finite one
        gap, bound = max(pairs, key=lambda pair: pair[0] / pair[1] if np.isfinite(pair[0]) else np.inf)
        self.emit("probe_measured", policy_version=version, gap=gap, bound=bound)
        if gap <= bound:
            return None
        return (
            f"engine and trainer disagree after version {version} was put live twice: mean log-prob gap {gap:.3g}, "
            f"bound {bound:.3g} nats a token. The engine runs on old weights: look whether the exported file holds "
            "every weight (a tied lm_head under its own name), whether the engine's take_weights put them live, and "
            "whether its prefix cache was cleared; events.jsonl has the earlier probe_measured gaps."
        )

    async def _measure(self, trainer: Seq[FloatArray]) -> Gap:
        engine = await self.generation.score(self._sequences)
        engines = [engine[start : start + len(trainer)] for start in range(0, len(engine), len(trainer))]
        # numpy's maximum, which a NaN wins
        return Gap(*np.max([self._gap(answers, trainer) for answers in engines], axis=0).tolist())

    def _gap(self, engine: Seq[FloatArray], trainer: Seq[FloatArray]) -> Gap:
        gaps = [np.abs(a - b) for a, b in zip(engine, trainer, strict=True)]
        cached = [gap[probe_position(sequence)] for gap, sequence in zip(gaps, self._sequences, strict=True)]
        return Gap(*(float(np.mean(values, dtype=np.float64)) for values in (np.concatenate(gaps), cached)))
