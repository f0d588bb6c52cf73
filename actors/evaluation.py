"""The evaluation actor: gold and everything measured on held-out samples, in a process of its own."""

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

from ocrm_ray.config import RunConfig
from ocrm_ray.evaluation import HeldoutEvaluator, SampleRow
from ocrm_ray.gold import load_gold
from ocrm_ray.networks import load_tokenizer
from ocrm_ray.records import EvaluationReport, Prompt


@dataclass(eq=False)
class EvaluationActor:
    """Scores responses with gold, to label pairs (``gold``) and to measure the policy (``evaluate``)."""

    config: RunConfig
    tokenizer_path: str
    prompts: Seq[Prompt]
    """Those that every ``evaluate`` measures, in order; none are needed for labelling."""

    def start(self) -> None:
        """Load gold and the tokenizer. Raises UserError if gold cannot be loaded."""
        config, trust = self.config, self.config.trust_remote_code
        tokenizer = load_tokenizer(self.tokenizer_path, trust_remote_code=trust)
        gold = load_gold(config.gold, config.world, trust_remote_code=trust)
        self._evaluator = HeldoutEvaluator(self.prompts, tokenizer, gold, config.evaluation.num_samples_saved)

    def evaluate(self, *measured: Any) -> tuple[EvaluationReport, list[SampleRow]]:
        """As ``HeldoutEvaluator.evaluate``, with the seconds that it took."""
        started = time.monotonic()
        report, rows = self._evaluator.evaluate(*measured)
        return replace(report, seconds=time.monotonic() - started), rows

    def gold(self, prompts: list[str], responses: list[str], references: list[str | None]) -> list[float]:
        """Gold scores [N] of the responses."""
        assert self._evaluator.gold is not None, "labels and gold scores need a gold scorer"
        return self._evaluator.gold(prompts, responses, references)
