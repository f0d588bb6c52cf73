"""The evaluation actor: gold and everything measured on held-out samples, in a process of its own."""

import json
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ocrm_ray.config import RunConfig
from ocrm_ray.evaluation import HeldoutEvaluator, SampleRow
from ocrm_ray.gold import load_gold
from ocrm_ray.networks import load_tokenizer
from ocrm_ray.records import EvaluationReport, Prompt, Sequence
from ocrm_ray.response_clusters import load_clusterer
from ocrm_ray.whole_files import write_whole

SFT_GOLD = "sft_gold.json"
"""In the run folder: gold of the first evaluation, with which a resumed run, or another process, compares too."""


@dataclass(eq=False)
class EvaluationActor:
    """Scores responses with gold, to label pairs (``gold``) and to measure the policy (``evaluate``)."""

    config: RunConfig
    tokenizer_path: str
    prompts: Seq[Prompt]
    """Those that every ``evaluate`` measures, in order; none are needed for labelling."""

    def start(self) -> None:
        """Load gold, the tokenizer, and what clusters responses. Raises UserError if a model cannot be loaded."""
        config, trust = self.config, self.config.trust_remote_code
        tokenizer = self._tokenizer = load_tokenizer(self.tokenizer_path, trust_remote_code=trust)
        gold = load_gold(config.gold, config.world, trust_remote_code=trust)
        self._evaluator = HeldoutEvaluator(self.prompts, tokenizer, gold, config.evaluation.num_samples_saved)
        self._sft_gold = config.run_dir / SFT_GOLD
        if self._sft_gold.exists():
            self._evaluator.sft_gold = np.array(json.loads(self._sft_gold.read_text()))
        if config.correction.strategy == "rlp_spg":
            self._clusterer = load_clusterer(config.correction.rlp_spg, self.tokenizer_path, trust_remote_code=trust)

    def evaluate(self, *measured: Any) -> tuple[EvaluationReport, list[SampleRow]]:
        """As ``HeldoutEvaluator.evaluate``, with the seconds that it took."""
        started = time.monotonic()
        is_first = self._evaluator.sft_gold is None
        report, rows = self._evaluator.evaluate(*measured)
        if is_first and self._evaluator.sft_gold is not None:
            write_whole(self._sft_gold, [json.dumps(self._evaluator.sft_gold.tolist())])
        return replace(report, seconds=time.monotonic() - started), rows

    def gold_of(self, prompts: Seq[Prompt], sequences: Seq[Sequence]) -> list[float]:
        """As the protocol says."""
        references = [prompt.reference for prompt in prompts]
        return self.gold([prompt.text for prompt in prompts], self._evaluator.texts(sequences), references)

    def clusters(self, groups: Seq[Seq[Sequence]]) -> list[list[int]]:
        """As the protocol says."""
        prompts = self._tokenizer.batch_decode([group[0].prompt_ids for group in groups], skip_special_tokens=True)
        texts = iter(self._evaluator.texts([sequence for group in groups for sequence in group]))
        return [
            self._clusterer(prompt, [next(texts) for _ in group]).tolist()
            for prompt, group in zip(prompts, groups, strict=True)
        ]

    def gold(self, prompts: list[str], responses: list[str], references: list[str | None]) -> list[float]:
        """Gold scores [N] of the responses."""
        assert self._evaluator.gold is not None, "labels and gold scores need a gold scorer"
        return self._evaluator.gold(prompts, responses, references)
