"""In-process pools with levers: every duration, failure and answer is set by the test."""

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ocrm_ray.checked_files import Entry
from ocrm_ray.checkpoints import Checkpoint
from ocrm_ray.config import RunConfig
from ocrm_ray.judge import JudgeStatistics
from ocrm_ray.pools import Pools
from ocrm_ray.records import (
    Calibration,
    EvaluationReport,
    GenerationRequest,
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

Duration = Callable[[int], float]
"""Seconds of the n-th call."""


@dataclass
class FakeGeneration:
    """Engines with ``num_slots`` places; a request keeps one for ``seconds(n)``."""

    seconds: Duration = lambda n: 1.0
    num_slots: int = 1000
    publish_s: float = 0.1
    version: int = 0
    num_calls: int = 0
    finished: list[tuple[float, str]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    fail_at: int | None = None
    slept_at: float | None = None
    asleep: list[tuple[float, float]] = field(default_factory=list)
    """From when to when."""
    respond: Callable[[int, int], tuple[int, ...]] = lambda number, sample: (1, 2)
    """Response of a sample of the n-th call."""

    def __post_init__(self) -> None:
        self.slots = asyncio.Semaphore(self.num_slots)

    async def sleep(self) -> None:
        assert self.slept_at is None
        assert len(self.finished) == self.num_calls, "a request is running"
        self.slept_at = asyncio.get_running_loop().time()

    async def wake(self) -> None:
        assert self.slept_at is not None
        self.asleep.append((self.slept_at, asyncio.get_running_loop().time()))
        self.slept_at = None

    async def generate(self, request: GenerationRequest) -> tuple[Sample, ...]:
        assert self.slept_at is None
        number = self.num_calls
        self.num_calls += 1
        if not request.request_id.startswith("heldout"):
            self.prompts.append(request.prompt.prompt_id)
        if self.fail_at == number:
            raise RuntimeError("engine fell over")
        async with self.slots:
            first = self.version
            await asyncio.sleep(self.seconds(number))
        self.finished.append((asyncio.get_running_loop().time(), request.request_id))
        responses = [self.respond(number, sample) for sample in range(request.num_samples)]
        return tuple(
            Sample(
                Sequence(request.prompt.token_ids, response, True),
                np.zeros(len(response), dtype=np.float32),
                first,
                self.version,
            )
            for response in responses
        )

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    async def load_weights(self, weights: PolicyWeights) -> PublishReport:
        assert self.slept_at is None
        await asyncio.sleep(self.publish_s)
        self.version = weights.version
        return PublishReport(weights.version, weights.num_bytes, self.publish_s, self.publish_s)

    async def score(self, sequences: Seq[Sequence]) -> list[np.ndarray]:
        return [np.zeros(len(sequence.response_ids), dtype=np.float32) for sequence in sequences]


@dataclass
class FakePolicy:
    """A trainer that refuses what it may not train on, and remembers what it did."""

    update_s: Duration = lambda n: 1.0
    version: int = 0
    reward_version: int = 0
    anchor_version: int = 0
    busy: bool = False
    updates: list[tuple[float, list[Rollout]]] = field(default_factory=list)
    learned: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    commits: list[tuple[float, str, int]] = field(default_factory=list)
    saved: list[tuple[str, int]] = field(default_factory=list)
    exported: list[int] = field(default_factory=list)
    most_exported: int = 0
    fail_at: int | None = None
    write_s: float = 1.5
    captured: int | None = None
    snapshot: int | None = None
    """Of the checkpoint from which it goes on."""

    async def update(self, rollouts: Seq[Rollout]) -> UpdateReport:
        for rollout in rollouts:
            for scores in rollout.scores or ():
                assert (scores.reward_version, scores.anchor_version) == (self.reward_version, self.anchor_version)
                assert scores.reward == self.reward_version, "scored by the version it claims"
            assert rollout.scores is not None
        self.busy = True
        await asyncio.sleep(self.update_s(self.version))
        self.busy = False
        if self.fail_at == self.version:
            raise RuntimeError("optimiser exploded")
        self.version += 1
        self.updates.append((asyncio.get_running_loop().time(), list(rollouts)))
        return UpdateReport(self.version, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0)

    async def learn_pairs(self, indices: np.ndarray, anchor_logprobs: np.ndarray) -> UpdateReport:
        await asyncio.sleep(self.update_s(self.version))
        self.version += 1
        self.learned.append((indices, anchor_logprobs))
        return UpdateReport(self.version, 0.5, None, None, None, None, 2.0, None, 1.0)

    async def export_weights(self) -> PolicyWeights:
        self.exported.append(self.version)
        self.most_exported = max(self.most_exported, len(self.exported))
        return PolicyWeights(self.version, Path(f"/nowhere/policy-v{self.version}"), 8)

    async def send_weights(self, weights: PolicyWeights) -> None: ...

    async def release_weights(self, weights: PolicyWeights) -> None:
        self.exported.remove(weights.version)

    async def logprobs(self, sequences: Seq[Sequence]) -> list[np.ndarray]:
        return [np.zeros(len(sequence.response_ids), dtype=np.float32) for sequence in sequences]

    async def stage(self, promotion_id: str, refit: RefitReport | None) -> None: ...

    async def commit(self, promotion_id: str, reward_version: int, anchor_version: int) -> None:
        assert not self.busy, "a promotion in the middle of an update"
        self.reward_version, self.anchor_version = reward_version, anchor_version
        self.commits.append((asyncio.get_running_loop().time(), promotion_id, self.version))

    async def capture(self) -> None:
        assert not self.busy, "a checkpoint in the middle of an update"
        self.captured = self.version

    async def write_checkpoint(self, folder: Path, snapshot: PolicyWeights | None) -> dict[str, Entry]:
        await asyncio.sleep(self.write_s)
        assert snapshot is None or snapshot.version in self.exported, "written after its release"
        (folder / "policy").mkdir()
        (folder / "policy" / "version").write_text(str(self.captured))
        (folder / "state" / "snapshot").write_text("" if snapshot is None else str(snapshot.version))
        return {}

    async def saved_snapshot(self) -> PolicyWeights:
        assert self.snapshot is not None
        self.exported.append(self.snapshot)
        return PolicyWeights(self.snapshot, Path("/nowhere/snapshot"), 8)

    async def save(self, name: str, weights: PolicyWeights | None = None) -> None:
        self.saved.append((name, self.version if weights is None else weights.version))


@dataclass
class FakeScoring:
    """Anchor and SFT log-probs of zero, or ``logprob`` a token, ratios after ``ratio_s``."""

    score_s: float = 0.1
    ratio_s: float = 0.5
    ratio_error: Callable[[int], Exception | None] = lambda n: None
    anchor_version: int = 0
    staged: dict[str, int] = field(default_factory=dict)
    promoted: str = "live"
    snapshots: list[int] = field(default_factory=list)
    scored: list[tuple[str, int]] = field(default_factory=list)
    logprob: dict[str, float] = field(default_factory=dict)
    captured: int = 0

    async def score(self, sequences: Seq[Sequence], models: Seq[str] = ("live", "sft")) -> list[list[np.ndarray]]:
        for model in models:
            assert model in ("live", "sft", self.promoted) or model in self.staged
            self.scored.append((model, len(sequences)))
        await asyncio.sleep(self.score_s)
        values = [self.logprob.get(model, 0.0) for model in models]
        return [[np.full(len(each.response_ids), value, dtype=np.float32) for each in sequences] for value in values]

    async def pair_logprobs(self, weights: PolicyWeights | None, indices: np.ndarray) -> np.ndarray:
        await asyncio.sleep(self.ratio_s)
        if weights is not None:
            self.snapshots.append(weights.version)
            if (error := self.ratio_error(len(self.snapshots) - 1)) is not None:
                raise error
        return np.zeros((len(indices), 2), dtype=np.float32)

    async def pair_alignments(self, weights: PolicyWeights, indices: np.ndarray) -> np.ndarray:
        return await self.pair_logprobs(weights, indices)

    async def stage_anchor(self, promotion_id: str, weights: PolicyWeights) -> None:
        self.staged[promotion_id] = weights.version

    async def capture(self) -> None:
        self.captured = self.anchor_version

    async def write_anchor(self, folder: Path, anchor_version: int) -> None:
        assert self.captured == anchor_version
        (folder / "state" / "anchor").write_text(str(anchor_version))

    async def discard(self) -> None:
        self.staged.clear()

    async def commit(self, promotion_id: str, anchor_version: int) -> None:
        self.anchor_version, self.promoted = self.staged.pop(promotion_id, self.anchor_version), promotion_id


@dataclass
class FakeReward:
    """A reward model whose score is its version; a refit takes ``refit_s(n)``, for ever with ``inf``."""

    score_s: float = 0.1
    refit_s: Duration = lambda n: 1.0
    version: int = 0
    staged: dict[str, int] = field(default_factory=dict)
    promoted: str = "live"
    refits: list[RefitRequest] = field(default_factory=list)
    scored: list[tuple[float, str]] = field(default_factory=list)
    num_refitting: int = 0
    run_dir: Path | None = None
    """Where it leaves reward models."""
    refit_error: Callable[[int], Exception | None] = lambda n: None
    stage_error: Callable[[int], Exception | None] = lambda n: None
    num_staged: int = 0

    async def score(self, sequences: Seq[Sequence], slot: str = "live") -> np.ndarray:
        version = self.version if slot in ("live", self.promoted) else self.staged[slot]
        self.scored.append((asyncio.get_running_loop().time(), slot))
        await asyncio.sleep(self.score_s)
        return np.full(len(sequences), version, dtype=np.float32)

    async def refit(self, request: RefitRequest) -> RefitReport:
        self.num_refitting += 1
        assert self.num_refitting == 1, "two refits at once"
        self.refits.append(request)
        seconds = self.refit_s(len(self.refits) - 1)
        if seconds == float("inf"):
            await asyncio.Event().wait()
        await asyncio.sleep(seconds)
        self.num_refitting -= 1
        if (error := self.refit_error(len(self.refits) - 1)) is not None:
            raise error
        if self.run_dir is not None:
            folder = self.run_dir / "reward" / f"v{request.reward_version}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "weights").write_text(str(request.reward_version))
        return RefitReport(request.reward_version, Path("/nowhere"), 0.5, 0.7, seconds)

    async def stage(self, promotion_id: str, refit: RefitReport) -> Calibration:
        self.num_staged += 1
        if (error := self.stage_error(self.num_staged - 1)) is not None:
            raise error
        self.staged[promotion_id] = refit.reward_version
        return Calibration(0.0, 1.0)

    async def discard(self) -> None:
        self.staged.clear()

    async def commit(self, promotion_id: str, reward_version: int) -> None:
        self.version, self.promoted = self.staged.pop(promotion_id, self.version), promotion_id


@dataclass
class FakeEvaluator:
    """Remembers which policy versions it was given, and which log-probs of the networks that it compares with."""

    versions: dict[int, set[int]] = field(default_factory=dict)
    gold: dict[int, float] = field(default_factory=dict)
    judge: JudgeStatistics | None = None
    references: dict[int, dict[str, set[float]]] = field(default_factory=dict)

    async def evaluate(
        self,
        step: int,
        samples: Seq[tuple[Sample, ...]],
        proxy: Seq[np.ndarray],
        sft_logprobs: Seq[Seq[np.ndarray]],
        anchor_logprobs: Seq[Seq[np.ndarray]],
    ) -> tuple[EvaluationReport, list[dict[str, object]]]:
        self.versions[step] = {s.first_version for group in samples for s in group} | {
            s.last_version for group in samples for s in group
        }
        told = {"sft": sft_logprobs, "anchor": anchor_logprobs}
        self.references[step] = {
            name: {float(value) for rows in given for row in rows for value in row} for name, given in told.items()
        }
        kl = {key: 0.0 for key in ("kl_sft", "kl_sft_k3", "kl_anchor", "kl_anchor_k3")}
        gold = self.gold.get(step)
        report = EvaluationReport(step, step, 0.0, response_tokens_mean=2.0, gold_mean=gold, judge=self.judge, **kl)
        return report, []

    async def gold_of(self, prompts: Seq[Prompt], sequences: Seq[Sequence]) -> list[float]:
        """The number of tokens above 5."""
        return [float(sum(token > 5 for token in sequence.response_ids)) for sequence in sequences]

    async def clusters(self, groups: Seq[Seq[Sequence]]) -> list[list[int]]:
        """By the first token of the response."""
        return [[sequence.response_ids[0] for sequence in group] for group in groups]


@dataclass
class FakePools:
    """The five fakes of one run."""

    generation: FakeGeneration = field(default_factory=FakeGeneration)
    policy: FakePolicy = field(default_factory=FakePolicy)
    scoring: FakeScoring = field(default_factory=FakeScoring)
    reward: FakeReward = field(default_factory=FakeReward)
    evaluator: FakeEvaluator = field(default_factory=FakeEvaluator)

    @classmethod
    def of(cls, saved: Checkpoint, **fakes: object) -> "FakePools":
        """The pools as a resumed run finds them: restored, but engines that have the SFT model."""
        pools, state = cls(**fakes), saved.state  # type: ignore[arg-type]
        assert (saved.folder / "version").read_text() == str(state.step)
        snapshot = (saved.trainer / "snapshot").read_text()
        pools.policy.snapshot = int(snapshot) if snapshot else None
        pools.policy.version, pools.reward.version = state.step, state.reward_version
        pools.policy.reward_version, pools.policy.anchor_version = state.reward_version, state.anchor_version
        pools.scoring.anchor_version = state.anchor_version
        return pools

    def pools(self) -> Pools:
        return Pools(self.generation, self.policy, self.scoring, self.reward, self.evaluator)


def tiny_run(**overrides: object) -> RunConfig:
    """A run of 12 updates of 4 prompts, corrections every 4; dotted keys override."""
    tree: dict[str, object] = {"name": "fake", "world": {}}
    defaults = {
        "policy.num_updates": 12,
        "rollout.prompts_per_step": 4,
        "rollout.samples_per_prompt": 2,
        "correction.every": 4,
        "evaluation.every": 6,
        "evaluation.num_prompts": 3,
        "evaluation.num_pair_prompts": 1,
        "evaluation.num_samples_saved": 0,
        "checkpoint.every": 100,
    }
    for key, value in (defaults | overrides).items():
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})  # type: ignore[assignment]
        node[leaf] = value
    return RunConfig.model_validate(tree)


def prompts(num: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(index, f"prompt {index}", (index % 7 + 1,)) for index in range(num))
