"""Publishing policy weights to the engines, and the alarm for engines that go on with old ones.

A publish can fail without an error: a tied head left behind, a reload that did nothing, prefixes of the KV cache
that were computed with the old weights. Each shows as a gap between the log-probs of engine and trainer.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

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


@dataclass(frozen=True, slots=True)
class Gap:
    """Mean absolute difference of engine and trainer log-probs, in nats a token; the largest of all engines.

    ``tokens``: over all tokens. ``cached``: over the token of each sequence that was read through the prefix
    cache, apart because the mean over all tokens would dilute it.
    """

    tokens: float
    cached: float


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """One probe: the gap that is largest against its bound, and that bound (nats a token)."""

    version: int
    gap: float
    bound: float
    within: bool


class WeightPublisher:
    """Brings the policy's weights into the engines and keeps their files as long as someone reads them.

    ``publish`` must not run beside a policy update: the probe compares the engines with the trainer's weights.
    """

    def __init__(self, generation: GenerationPool, policy: PolicyPool, probe: Probe, emit: Callable[..., None]) -> None:
        """``emit(event, **fields)`` receives ``weights_published`` and ``probe_measured``."""
        self._generation = generation
        self._policy = policy
        self._probe = probe
        self._emit = emit
        self._sequences: tuple[Sequence, ...] = ()
        self._bound: Gap | None = None
        self._num_publishes = 0
        self._latest: PolicyWeights | None = None
        self._files: dict[int, PolicyWeights] = {}
        self._holds: Counter[int] = Counter()
        self.last_probe: ProbeResult | None = None

    async def start(self, sequences: Seq[Sequence]) -> Gap:
        """Measure the baseline gap on ``sequences``, which every later probe scores again.

        Call it while the engines run the very weights that the trainer has, before the first publish.
        """
        assert sequences, "the probe needs at least one sequence"
        self._sequences = tuple(sequences)
        baseline = await self._measure()
        self._bound = Gap(
            tokens=max(self._probe.factor * baseline.tokens, self._probe.floor),
            cached=max(self._probe.factor * baseline.cached, self._probe.floor),
        )
        return baseline

    async def publish(self) -> PublishReport:
        """Export the present weights and put them live; probe the first publish and then every ``probe.every``-th.

        A probe over its bound puts the file live once more. Raises StaleWeightsError if the next probe is over it too.
        """
        assert self._bound is not None, "start() comes before publish()"
        started = time.monotonic()
        weights = await self._policy.export_weights()
        report = await self._load(weights, started)
        due = self._num_publishes % self._probe.every == 0
        self._num_publishes += 1
        if due and not (await self._run_probe(weights.version)).within:
            report = await self._load(weights, time.monotonic())
            result = await self._run_probe(weights.version)
            if not result.within:
                raise StaleWeightsError(_stale_message(result))
        self._latest = weights
        self._files[weights.version] = weights
        await self._delete_unheld()
        return report

    def hold(self) -> PolicyWeights:
        """Keep the file of the latest published version until ``release`` is called as often as ``hold`` was."""
        assert self._latest is not None, "nothing is published yet"
        self._holds[self._latest.version] += 1
        return self._latest

    async def release(self, version: int) -> None:
        """Give a hold back; the file goes when nobody holds it and a later version is published."""
        assert self._holds[version] > 0, f"version {version} is not held"
        self._holds[version] -= 1
        await self._delete_unheld()

    async def _load(self, weights: PolicyWeights, started: float) -> PublishReport:
        loaded = await self._generation.load_weights(weights)
        report = replace(loaded, seconds=time.monotonic() - started)
        self._emit(
            "weights_published",
            policy_version=weights.version,
            bytes=weights.num_bytes,
            seconds=report.seconds,
            pause_s=report.pause_s,
        )
        return report

    async def _delete_unheld(self) -> None:
        assert self._latest is not None
        unheld = [version for version in self._files if not self._holds[version] and version != self._latest.version]
        # taken out before the first await: a release may come while a publish deletes
        for weights in [self._files.pop(version) for version in unheld]:
            await self._policy.release_weights(weights)

    async def _run_probe(self, version: int) -> ProbeResult:
        assert self._bound is not None
        gap = await self._measure()
        pairs = [(gap.tokens, self._bound.tokens), (gap.cached, self._bound.cached)]
        # a gap of NaN is not within any bound, and is reported rather than hidden by a finite one
        worst, bound = max(pairs, key=lambda pair: pair[0] / pair[1] if np.isfinite(pair[0]) else np.inf)
        result = ProbeResult(version=version, gap=worst, bound=bound, within=worst <= bound)
        self.last_probe = result
        self._emit("probe_measured", policy_version=version, gap=result.gap, bound=result.bound)
        return result

    async def _measure(self) -> Gap:
        engine, trainer = await asyncio.gather(
            self._generation.score(self._sequences), self._policy.logprobs(self._sequences)
        )
        engines = [engine[start : start + len(trainer)] for start in range(0, len(engine), len(trainer))]
        gaps = [self._gap(answers, trainer) for answers in engines]
        # numpy's maximum, which a NaN wins
        return Gap(*np.max([(gap.tokens, gap.cached) for gap in gaps], axis=0).tolist())

    def _gap(self, engine: Seq[FloatArray], trainer: Seq[FloatArray]) -> Gap:
        gaps = [np.abs(a - b) for a, b in zip(engine, trainer, strict=True)]
        cached = [gap[probe_position(sequence)] for gap, sequence in zip(gaps, self._sequences, strict=True)]
        return Gap(tokens=_mean(np.concatenate(gaps)), cached=_mean(cached))


def _mean(values: FloatArray | Iterable[np.float32]) -> float:
    return float(np.mean(np.asarray(values, dtype=np.float64)))


def _stale_message(result: ProbeResult) -> str:
    return (
        f"engine and trainer disagree after version {result.version} was put live twice: mean log-prob gap "
        f"{result.gap:.3g}, bound {result.bound:.3g} nats a token. The engine runs on old weights: look whether the "
        "exported file holds every weight (a tied lm_head under its own name), whether the engine's receive_weights "
        "reloaded them, and whether its prefix cache was cleared; events.jsonl has the earlier probe_measured gaps."
    )
