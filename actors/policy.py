"""The policy's trainer, for PPO with its critic: updates, exports of weights, and what a promotion changes."""

import functools
import json
import math
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from actors.engine_settings import EngineSettings
from actors.nccl_transport import NcclExporter
from actors.training_engine import EngineState, TrainingEngine, join_process_group, start_process, write_model
from actors.weight_transport import WeightExporter, WeightReader
from ocrm_ray import networks, ranks
from ocrm_ray import policy_learning as learning
from ocrm_ray.algorithm.reward_scores import calibration, recentre
from ocrm_ray.batches import SequenceTable, length_chunks, pad_rows
from ocrm_ray.checked_files import Entry, write_arrays
from ocrm_ray.checkpoints import POLICY, STATE
from ocrm_ray.config import RunConfig
from ocrm_ray.networks import table_logprobs
from ocrm_ray.policy_learning import Experience, MicroBatch, UpdateStatistics
from ocrm_ray.preferences import read_pairs
from ocrm_ray.records import FloatArray, IntArray, PolicyWeights, RefitReport, Rollout, Sequence, UpdateReport
from ocrm_ray.reward_learning import calibration_sequences, pair_lengths, pair_rows, pair_table

CRITIC, SNAPSHOT, TRAINER = "critic", "snapshot.safetensors", "trainer.json"
FIGURES = ("_version", "_num_scheduled", "_reward_version", "_anchor_version", "_gap", "_committed")
"""Of the trainer, in a checkpoint's ``trainer.json`` with the engines' steps and the critic's calibration."""
Method = TypeVar("Method", bound=Callable[..., Any])


def _alone(method: Method) -> Method:
    """The method waits for every other one of the actor that is marked so."""

    @functools.wraps(method)
    def locked(self: "PolicyActor", *arguments: Any) -> Any:
        with self._lock:
            return method(self, *arguments)

    return cast(Method, locked)


class Critic:
    """PPO's critic: a copy of a reward model, read at every token and trained in an engine of its own.

    Values in the units of the calibrated reward: the shift (and scale) found at the start stays for good.
    """

    def __init__(self, config: RunConfig, folder: str | Path, calibration_set: SequenceTable) -> None:
        """``folder``: the reward model to start from, of an ensemble the first."""
        self._policy = config.policy
        self._pool = config.pools.policy
        self._scaled = config.reward.scale == "calibration_std"
        policy, dtype = config.policy, self._pool.dtype
        model = networks.load_reward_model(
            networks.reward_members(folder)[0], dtype=dtype, trust_remote_code=config.trust_remote_code
        )
        settings = EngineSettings.of(
            policy,
            learning_rate=policy.critic_learning_rate,
            dtype=dtype,
            beta2=policy.adam_beta2,
            max_skipped_steps=config.guards.max_skipped_steps,
        )
        self.engine = TrainingEngine(model, settings)
        self.mean, self.std = calibration(networks.table_scores(self.engine.forward, calibration_set, self._pool))

    def values(self, table: SequenceTable) -> Tensor:
        """Values [N, T] on the CPU of the states behind the response tokens; anything past a response's end."""
        return self._calibrated(pad_rows(networks.table_values(self.engine.forward, table, self._pool)))

    def update(self, micros: Seq[MicroBatch], factor: float) -> tuple[float, float]:
        """One optimiser step on a minibatch; returns the gradient's norm and the value loss."""

        def loss_of(micro: MicroBatch) -> Tensor:
            values = networks.response_values(self.engine.forward, micro.batch)
            return learning.value_loss(self._calibrated(values), micro, self._policy)

        total = self.engine.accumulate(micros, loss_of, self._policy.value_coefficient)
        return self.engine.step(factor), total

    def close(self) -> None:
        self.engine.close()

    def _calibrated(self, values: Tensor) -> Tensor:
        return recentre(values, self.mean, self.std, self._scaled)


@dataclass(eq=False)
class PolicyActor:
    """The policy in a DeepSpeed engine, for PPO with its critic. Versions count updates; version 0 is the SFT model.

    Calls that share the engine wait for each other; ``release_weights`` and ``send_weights`` run beside them. Where
    several ranks are such an actor each, all are asked for the same in the same order; rank 0 exports and writes.

    ``reward_path``: the first reward model, which PPO's critic starts from. ``exports_dir``: shared memory for exported
    weights; None: they go through Ray's object store. ``by_nccl``: engines get them so. ``checkpoint``: the folder from
    which a resumed run goes on.
    """

    config: RunConfig
    sft_path: str
    reward_path: str | None
    run_dir: Path
    exports_dir: Path | None
    by_nccl: bool = False
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._version = self._num_scheduled = self._reward_version = self._anchor_version = 0
        self._gap = math.inf
        self._critic: Critic | None = None
        self._staged: tuple[str, Critic] | None = None
        self._committed: str | None = None

    def start(self) -> None:
        """Load the networks and build their engines."""
        config, policy, pool = self.config, self.config.policy, self.config.pools.policy
        start_process(config, pool)
        join_process_group(config.deadlines.request_s)
        self._tokenizer = networks.load_tokenizer(self.sft_path, trust_remote_code=config.trust_remote_code)
        # a checkpoint's model has its adapters merged, which cannot be undone
        path = self.sft_path if self.checkpoint is None or policy.lora else str(self.checkpoint)
        model = networks.load_causal_lm(path, dtype=pool.dtype, trust_remote_code=config.trust_remote_code)
        settings = EngineSettings.of(
            policy,
            learning_rate=policy.learning_rate,
            dtype=pool.dtype,
            beta2=policy.adam_beta2,
            max_skipped_steps=config.guards.max_skipped_steps,
            lora=policy.lora,
        )
        self._engine = TrainingEngine(model, settings)
        self._exporter: WeightExporter | None = None
        if ranks.rank() == 0:
            layout = self.exports_dir, self._engine.layout(), config.publish.checksum
            self._exporter = NcclExporter(*layout, config.pools.generation) if self.by_nccl else WeightExporter(*layout)
        if policy.algorithm == "ppo":
            assert self.reward_path is not None, "PPO's critic starts from the reward model"
            self._critic = self._make_critic(self.checkpoint / STATE / CRITIC if self.checkpoint else self.reward_path)
        if self.checkpoint is not None:
            self._restore(self.checkpoint)
        if config.checkpoint.every < policy.num_updates:
            self._engine.reserve()
            if self._critic is not None:
                self._critic.engine.reserve()

    @_alone
    def update(self, rollouts: Seq[Rollout]) -> UpdateReport:
        """One policy update, v -> v + 1. RunError: scores of other than the live reward model and anchor."""
        started = time.perf_counter()
        learning.require_live_scores(rollouts, self._reward_version, self._anchor_version)
        policy = self.config.policy
        experience = learning.collect_experience(rollouts, self._tokenizer.pad_token_id, self.config.share_prompts)
        if policy.num_epochs * policy.num_minibatches > 1:
            is_exact = (experience.versions == self._version) & (self._gap <= policy.reuse_logprobs_within)
            temperature, pool = self.config.rollout.temperature, self.config.pools.policy
            compute = functools.partial(table_logprobs, self._engine.forward, experience.table, temperature, pool)
            experience = learning.with_old_logprobs(experience, is_exact, compute)
        values = self._critic.values(experience.table) if self._critic else None
        targets = learning.build_targets(experience, policy, self.config.rollout, values)
        statistics = UpdateStatistics()
        for epoch in range(policy.num_epochs):
            seed = (self.config.seed, self._version, epoch)
            for rows in learning.minibatches(len(experience.table), policy.num_minibatches, seed):
                if targets.loss_mask[torch.from_numpy(rows)].any():
                    micros = list(learning.micro_batches(experience, targets, rows, policy, self._engine.device))
                    self._learn(micros, experience, statistics, epoch)
        self._version += 1
        self._num_scheduled += 1
        report = statistics.report(experience, self._version, time.perf_counter() - started)
        if report.logprob_gap is not None:
            self._gap = report.logprob_gap
        return report

    @_alone
    def learn_pairs(self, indices: IntArray, anchor_logprobs: FloatArray) -> UpdateReport:
        """One update on training pairs, as the protocol says."""
        started, policy, table = time.perf_counter(), self.config.policy, self._pairs
        most = max(1, policy.micro_batch_size // 2)
        chunks = length_chunks(pair_lengths(table)[indices], most, policy.micro_batch_tokens)

        def loss_of(chunk: list[int]) -> Tensor:
            batch = table.batch(pair_rows(indices[chunk])).to(self._engine.device)
            logprobs, collisions = self._engine.forward(
                batch, self.config.pairs.temperature, with_collisions=policy.algorithm == "wpo"
            )
            anchor = torch.from_numpy(anchor_logprobs[chunk]).to(logprobs.device)
            return learning.preference_loss(logprobs, collisions, batch.response_mask, anchor, policy) / len(indices)

        loss = self._engine.accumulate(chunks, loss_of)
        norm = self._engine.step(learning.learning_rate_factor(self._version, policy, policy.num_updates))
        self._version += 1
        seconds = time.perf_counter() - started
        values = loss, None, None, None, None, norm, None, seconds
        return UpdateReport(self._version, *values, num_skipped_steps=int(not math.isfinite(norm)))

    @_alone
    def export_weights(self) -> PolicyWeights | None:
        """Copy the present weights, a tied head under its own name too, to where engines and scorers find them."""
        if self._exporter is not None:
            return self._exporter.export(self._version, self._engine.buckets())
        self._engine.take_part()
        return None

    def send_weights(self, weights: PolicyWeights) -> None:
        """The trainer's part of getting exported weights into engines; nothing unless they go by NCCL."""
        if self._exporter is not None:
            self._exporter.send(weights)

    def release_weights(self, weights: PolicyWeights) -> None:
        """Nobody reads them any more: their place is for a later export."""
        if self._exporter is not None:
            self._exporter.release(weights)

    @_alone
    def logprobs(self, sequences: Seq[Sequence]) -> list[FloatArray]:
        """Log-probs [T] of the responses at temperature 1."""
        return table_logprobs(self._engine.forward, self._table(sequences), 1.0, self.config.pools.policy)

    @_alone
    def stage(self, promotion_id: str, refit: RefitReport | None) -> None:
        """Build the critic that a promotion starts again, if it does, from the new reward model or from the first."""
        if self._staged is not None:
            # Left by a correction that failed later on, or by the same call made before.
            self._staged[1].close()
            self._staged = None
        if self._critic is not None and self.config.correction.critic_on_promote == "reinit":
            assert self.reward_path is not None, "PPO's critic starts from the reward model"
            self._staged = (promotion_id, self._make_critic(refit.path if refit else self.reward_path))

    @_alone
    def commit(self, promotion_id: str, reward_version: int, anchor_version: int) -> None:
        """Staged critic live, optimiser and learning-rate schedule fresh if so configured. Again: no effect."""
        if promotion_id == self._committed:
            return
        if self._staged is not None and self._staged[0] == promotion_id:
            assert self._critic is not None
            self._critic.close()
            self._critic, self._staged = self._staged[1], None
        if self.config.correction.reset_optimizer:
            self._engine.reset_optimizer()
            self._num_scheduled = 0
        self._reward_version, self._anchor_version = reward_version, anchor_version
        self._committed = promotion_id

    @_alone
    def capture(self) -> None:
        """As the protocol says: a copy in memory."""
        engines = {POLICY: self._engine}
        figures = {name: getattr(self, name) for name in FIGURES}
        if self._critic is not None:
            engines[CRITIC] = self._critic.engine
            figures[CRITIC] = [self._critic.mean, self._critic.std]
        # the module, not the engine: a promotion may close a critic's before it is written
        self._captured = figures, {name: (engine.module, engine.capture()) for name, engine in engines.items()}

    def write_checkpoint(self, folder: Path, snapshot: PolicyWeights | None) -> dict[str, Entry]:
        """As the protocol says, beside updates; every rank writes what it captured, and rank 0 the rest."""
        from safetensors.torch import save_file

        figures, captured = self._captured
        del self._captured
        written = {}
        for name, (module, state) in captured.items():
            place = folder / (POLICY if name == POLICY else f"{STATE}/{name}")
            assert state.weights is not None, "as captured"
            write_model(module, self._tokenizer, place, state.weights)
            figures[f"{name}_steps"] = state.num_steps
            for kind, tensors in state.tensors.items():
                file = f"{STATE}/{name}-{kind}-{ranks.rank()}.safetensors"
                written[file] = write_arrays({key: value.numpy() for key, value in tensors.items()}, folder / file)
        if ranks.rank() > 0:
            return written
        if snapshot is not None:
            with WeightReader().read(snapshot) as tensors:
                save_file(tensors, folder / STATE / SNAPSHOT)
            figures["snapshot_version"] = snapshot.version
        (folder / STATE / TRAINER).write_text(json.dumps(figures), encoding="utf-8")
        return written

    @_alone
    def saved_snapshot(self) -> PolicyWeights | None:
        """As the protocol says."""
        from safetensors.torch import load_file

        assert self.checkpoint is not None
        if self._exporter is None:
            return None
        version = _figures(self.checkpoint)["snapshot_version"]
        return self._exporter.export(version, [load_file(self.checkpoint / STATE / SNAPSHOT)])

    def save(self, name: str, weights: PolicyWeights | None = None) -> None:
        """Write the policy as it is, or beside updates as it was exported, as Hugging Face folder ``name``."""
        folder = self.run_dir / name
        if weights is None:
            with self._lock:
                self._engine.save(self._tokenizer, folder)
        else:
            with WeightReader().read(weights) as tensors:
                write_model(self._engine.module, self._tokenizer, folder, tensors)

    def close(self) -> None:
        """Free the engines, and the place of exported weights."""
        self._engine.close()
        if self._exporter is not None:
            self._exporter.close()
        for critic in (self._critic, self._staged[1] if self._staged else None):
            if critic is not None:
                critic.close()

    def _restore(self, checkpoint: Path) -> None:
        """What the model folders, which are loaded already, leave out."""
        figures = _figures(checkpoint)
        for name in FIGURES:
            setattr(self, name, figures[name])
        self._engine.restore(_engine_state(checkpoint, POLICY, figures))
        if self._critic is not None:
            self._critic.mean, self._critic.std = figures[CRITIC]
            self._critic.engine.restore(_engine_state(checkpoint, CRITIC, figures))

    def _learn(self, micros: Seq[MicroBatch], experience: Experience, statistics: UpdateStatistics, epoch: int) -> None:
        """One optimiser step on a minibatch, of the critic too."""
        # What a sampler's log-probs are compared with must come from weights that this update has not changed.
        is_untouched = statistics.num_steps == 0
        policy, rollout = self.config.policy, self.config.rollout

        def loss_of(micro: MicroBatch) -> Tensor:
            logprobs, entropy = self._engine.forward(micro.batch, rollout.temperature, epoch == 0)
            if entropy is not None:
                statistics.add(micro.batch.response_mask.sum(), entropy=entropy.sum())
            if is_untouched:
                statistics.add_gap(logprobs, micro, experience, self._version)
            loss, clip_share, truncated_share = learning.policy_loss(logprobs, micro, policy, rollout.importance_cap)
            statistics.add(micro.share, loss=loss, clip_share=clip_share, truncated_share=truncated_share)
            return loss

        self._engine.accumulate(micros, loss_of)
        period = self.config.correction.every if self.config.correction.reset_optimizer else policy.num_updates
        factor = learning.learning_rate_factor(self._num_scheduled, policy, period)
        norm = self._engine.step(factor)
        statistics.add_step(norm, grad_norm=norm)
        if self._critic is not None:
            norm, loss = self._critic.update(micros, factor)
            statistics.add_step(norm, value_loss=loss)

    def _make_critic(self, folder: str | Path) -> Critic:
        pairs = read_pairs(self.config.stage_root / "pairs" / "train.jsonl")
        sequences = calibration_sequences(pairs, self.config.reward.num_calibration)
        return Critic(self.config, folder, self._table(sequences))

    @functools.cached_property
    def _pairs(self) -> SequenceTable:
        pairs = read_pairs(self.config.stage_root / "pairs" / "train.jsonl")
        return pair_table(pairs, self._tokenizer.pad_token_id, self.config.share_prompts)

    def _table(self, sequences: Seq[Sequence]) -> SequenceTable:
        return SequenceTable(sequences, self._tokenizer.pad_token_id, self.config.share_prompts)


def _figures(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint / STATE / TRAINER).read_text(encoding="utf-8"))
    return found


def _engine_state(checkpoint: Path, name: str, figures: dict[str, Any]) -> EngineState:
    from safetensors.torch import load_file

    tensors: dict[str, dict[str, Tensor]] = {}
    for path in (checkpoint / STATE).glob(f"{name}-*.safetensors"):  # of as many ranks as there were
        _, kind, *_ = path.stem.split("-")
        tensors.setdefault(kind, {}).update(load_file(path))
    return EngineState(figures[f"{name}_steps"], tensors)
