"""The evaluation actor: gold and everything measured on held-out samples, in a process of its own."""

import time
from dataclasses import replace

from ocrm_ray.config import RunConfig
from ocrm_ray.evaluation import HeldoutEvaluator, SampleRow
from ocrm_ray.gold import GoldScorer, load_gold
from ocrm_ray.networks import load_tokenizer
from ocrm_ray.records import EvaluationReport, FloatArray, Prompt, Sample


class EvaluationActor:
    """Scores responses with gold, to label pairs (``gold``) and to measure the policy (``evaluate``)."""

    def __init__(
        self,
        config: RunConfig,
        tokenizer_path: str,
        prompts: tuple[Prompt, ...],
        sft_gold: tuple[float, ...] | None = None,
    ) -> None:
        """``prompts``: those that every ``evaluate`` measures, in order; none are needed for labelling.

        ``sft_gold``: gold of the first evaluation's responses, where a resumed run knows it already.
        """
        self._config = config
        self._tokenizer_path = tokenizer_path
        self._prompts = prompts
        self._sft_gold = sft_gold
        self._gold: GoldScorer | None = None
        self._evaluator: HeldoutEvaluator | None = None

    def start(self) -> None:
        """Load gold and the tokenizer. Raises UserError if gold cannot be loaded."""
        trust_remote_code = self._config.trust_remote_code
        self._gold = load_gold(self._config.gold, self._config.world, trust_remote_code=trust_remote_code)
        self._evaluator = HeldoutEvaluator(
            self._prompts,
            load_tokenizer(self._tokenizer_path, trust_remote_code=trust_remote_code),
            self._gold,
            self._config.evaluation.num_samples_saved,
            self._sft_gold,
        )

    def evaluate(
        self,
        step: int,
        samples: list[tuple[Sample, ...]],
        proxy: list[FloatArray],
        sft_logprobs: list[list[FloatArray]],
    ) -> tuple[EvaluationReport, list[SampleRow]]:
        """As the Evaluator protocol says, with the seconds that it took."""
        assert self._evaluator is not None, "start() comes first"
        started = time.monotonic()
        report, rows = self._evaluator.evaluate(step, samples, proxy, sft_logprobs)
        return replace(report, seconds=time.monotonic() - started), rows

    def gold(self, prompts: list[str], responses: list[str], references: list[str | None]) -> list[float]:
        """Gold scores [N] of the responses."""
        assert self._gold is not None, "labels and gold scores need a gold scorer"
        return self._gold.score(prompts, responses, references)
