"""Supervised fine-tuning: a causal language model on the reference responses of prompts."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from actors.engine_settings import EngineSettings
from actors.training_engine import TrainingEngine, join_process_group, start_process
from ocrm_ray.batches import SequenceTable
from ocrm_ray.config import RunConfig
from ocrm_ray.conversations import encode_response
from ocrm_ray.networks import load_causal_lm, load_tokenizer, response_logprobs
from ocrm_ray.prompts import read_prompts
from ocrm_ray.records import IntArray
from ocrm_ray.reward_learning import epoch_batches


@dataclass(eq=False)
class SftActor:
    """Trains one model, as one rank of those that do; ``progress`` may be asked from another thread meanwhile.

    ``prompts_path``: the training prompts with their references; ``folder``: where the model is written.
    """

    config: RunConfig
    base_path: str
    prompts_path: Path
    folder: Path
    _progress: tuple[int, int] = (0, 0)

    def start(self) -> None:
        """Load the base model and build its engine."""
        pool, trust = self.config.pools.policy, self.config.trust_remote_code
        start_process(self.config, pool)
        join_process_group(self.config.deadlines.request_s)
        self._tokenizer = load_tokenizer(self.base_path, trust_remote_code=trust)
        settings = EngineSettings.of(self.config.policy, learning_rate=self.config.sft.learning_rate, dtype=pool.dtype)
        model = load_causal_lm(self.base_path, dtype=pool.dtype, trust_remote_code=trust)
        self._engine = TrainingEngine(model, settings)

    def train(self) -> float:
        """Fit the prompts' references and save the model; returns the last epoch's mean loss a token, in nats.

        The loss counts response tokens and EOS, up to ``rollout.max_new_tokens``: what comes later the policy can
        never say. ValueError: no prompt has a reference.
        """
        sft, table = self.config.sft, self._read_references()
        batches = epoch_batches(len(table), sft.batch_size, sft.num_epochs, self.config.seed)
        self._progress = 0, len(batches)
        losses = []
        for step, rows in enumerate(batches):
            losses.append(self._accumulate(table, rows) * int(table.response_lengths[rows].sum()))
            self._engine.step(1 - step / len(batches))
            self._progress = step + 1, len(batches)
        self._engine.save(self._tokenizer, self.folder)
        return sum(losses[-(len(batches) // sft.num_epochs) :]) / int(table.response_lengths.sum())

    def progress(self) -> tuple[int, int]:
        """Optimiser steps (done, in all); (0, 0) before training begins."""
        return self._progress

    def _read_references(self) -> SequenceTable:
        limit = self.config.rollout.max_new_tokens
        sequences = [
            encode_response(self._tokenizer, prompt.token_ids, prompt.reference, limit)
            for prompt in read_prompts(self.prompts_path)
            if prompt.reference is not None
        ]
        if not sequences:
            raise ValueError(f"{self.prompts_path}: no prompt has a reference response to fine-tune on")
        return SequenceTable(sequences, self._tokenizer.pad_token_id, self.config.share_prompts)

    def _accumulate(self, table: SequenceTable, rows: IntArray) -> float:
        """Accumulate the gradient of one optimiser batch; returns its mean loss a token."""
        sft, num_tokens = self.config.sft, int(table.response_lengths[rows].sum())

        def loss_of(chunk: list[int]) -> Tensor:
            batch = table.batch(rows[chunk]).to(self._engine.device)
            return -response_logprobs(self._engine.forward, batch, 1.0).sum() / num_tokens

        return self._engine.accumulate(table.chunks(rows, sft.micro_batch_size, sft.micro_batch_tokens), loss_of)
