"""The true reward: a function, a classifier, a sentence encoder or a judge; and labels drawn from it."""

import functools
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ocrm_ray import praise
from ocrm_ray.config import ClassifierGold, FunctionGold, Gold, JudgeGold, PraiseWorld, SimilarityGold
from ocrm_ray.errors import mistake
from ocrm_ray.judge import Judge

GoldScorer: TypeAlias = Callable[[list[str], list[str], list[str | None]], list[float]]
"""Of prompts, responses and references [N] one finite number a response. What the policy is meant to please: never seen
by reward-model training but through labels."""


def load_gold(gold: Gold | None, world: PraiseWorld | None, *, trust_remote_code: bool) -> GoldScorer | None:
    """The configured scorer; without one the world's own, and None without either.

    Models go to the GPU that this process was given, if any. Raises UserError: nothing at the import path, a model
    that cannot be loaded or has more than one label, a judge without its key.
    """
    if gold is None:
        return None if world is None else functools.partial(praise.gold, response_words=world.response_words)
    if isinstance(gold, FunctionGold):
        return function_scorer(gold.path)
    if isinstance(gold, ClassifierGold):
        return ClassifierScorer(gold, trust_remote_code=trust_remote_code)
    if isinstance(gold, JudgeGold):
        return Judge(gold)
    return SimilarityScorer(gold, trust_remote_code=trust_remote_code)


def label_pairs(
    gold_first: npt.ArrayLike,
    gold_second: npt.ArrayLike,
    method: Literal["argmax", "bradley_terry"],
    rng: np.random.Generator,
) -> npt.NDArray[np.bool_]:
    """Whether the first response of each pair [N] is preferred.

    ``argmax``: the higher score wins, a tie goes to the first. ``bradley_terry`` (Bradley and Terry 1952): the
    first wins with chance sigmoid(gold_first - gold_second).
    """
    difference = np.asarray(gold_first, dtype=np.float64) - np.asarray(gold_second, dtype=np.float64)
    if method == "argmax":
        return np.asarray(difference >= 0)
    win_chance = np.exp(-np.logaddexp(0.0, -difference))
    return np.asarray(rng.random(difference.shape) < win_chance)


def function_scorer(path: str) -> GoldScorer:
    """The Python function ``f(prompts, responses, references)`` at an import path, its scores checked.

    Raises UserError, as the scorer does if it gets another number of scores, or one that is not finite.
    """
    module, _, name = path.partition(":")
    need, do = "an importable function package.module:function", "correct the path, or set PYTHONPATH"
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise mistake("gold.path", f"{path!r} ({error})", need, do) from error
    if not callable(function):
        raise mistake("gold.path", f"{path!r}, a {type(function).__name__}", need, do)

    def score(prompts: list[str], responses: list[str], references: list[str | None]) -> list[float]:
        scores = [float(score) for score in function(prompts, responses, references)]
        if len(scores) != len(responses):
            got = f"{len(scores)} scores for {len(responses)} responses from {path!r}"
            raise mistake("gold.path", got, "one score a response", "correct the function")
        for response, score in zip(responses, scores, strict=True):
            if not math.isfinite(score):
                got = f"{score} from {path!r} for the response {response[:80]!r}"
                raise mistake("gold.path", got, "finite scores", "correct the function")
        return scores

    return score


class _ModelScorer:
    """A Hugging Face model in float32 and evaluation mode, on this process's GPU if it has one, and its tokenizer."""

    auto_class = "AutoModel"
    setting = "gold.model"

    def __init__(self, config: ClassifierGold | SimilarityGold, *, trust_remote_code: bool) -> None:
        import transformers

        auto_class, path = getattr(transformers, self.auto_class), config.model
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
            model = auto_class.from_pretrained(
                path, dtype=torch.float32, trust_remote_code=trust_remote_code, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            got, do = f"{path!r} ({str(error).strip().splitlines()[0]})", "correct the folder or Hub name"
            raise mistake(self.setting, got, "a Hugging Face model", do) from error
        self._model: Any = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self._batch_size: int = config.batch_size
        limit = getattr(model.config, "max_position_embeddings", None) or math.inf
        self._cut = {"max_length": int(min(self._tokenizer.model_max_length, limit, 2**20)), "return_tensors": "pt"}

    def _parts(self, num_rows: int) -> Iterator[slice]:
        return (slice(start, start + self._batch_size) for start in range(0, num_rows, self._batch_size))


class ClassifierScorer(_ModelScorer):
    """The one logit of a Hugging Face sequence-classification model, such as a large reward model.

    With a chat template the model reads prompt and response as a conversation, otherwise as a pair of texts. What
    exceeds its length is cut from the left, or from the prompt.
    """

    auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: ClassifierGold, *, trust_remote_code: bool) -> None:
        super().__init__(config, trust_remote_code=trust_remote_code)
        settings = self._model.config
        if settings.num_labels != 1:
            got = f"{config.model!r} with {settings.num_labels} labels"
            raise mistake("gold.model", got, "a model with one label", "use a reward model")
        if self._tokenizer.pad_token_id is None or settings.pad_token_id is None:
            self._batch_size = 1
        if self._tokenizer.chat_template is not None:
            self._tokenizer.truncation_side = "left"

    @torch.inference_mode()
    def __call__(self, prompts: list[str], responses: list[str], references: list[str | None]) -> list[float]:
        """Raw logits."""
        scores: list[float] = []
        for part in self._parts(len(responses)):
            inputs = self._encode(prompts[part], responses[part]).to(self._model.device)
            scores += self._model(**inputs).logits[:, 0].float().tolist()
        return scores

    def _encode(self, prompts: list[str], responses: list[str]) -> Any:
        settings = {"padding": len(responses) > 1, **self._cut}
        if self._tokenizer.chat_template is None:
            return self._tokenizer(prompts, responses, truncation="only_first", **settings)
        conversations = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return self._tokenizer.apply_chat_template(conversations, return_dict=True, truncation=True, **settings)


class SimilarityScorer(_ModelScorer):
    """Cosine of sentence embeddings of response and reference, less a penalty for repeated word trigrams."""

    def __init__(self, config: SimilarityGold, *, trust_remote_code: bool) -> None:
        super().__init__(config, trust_remote_code=trust_remote_code)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token  # masked, like any padding
        self._penalty = config.repetition_penalty
        self._references: dict[str, torch.Tensor] = {}

    def __call__(self, prompts: list[str], responses: list[str], references: list[str | None]) -> list[float]:
        """In [-1 - repetition_penalty, 1]. Raises UserError if a reference is missing."""
        known = [reference for reference in references if reference is not None]
        if len(known) < len(references):
            got = f"{len(references) - len(known)} of {len(references)} prompts without a reference"
            do = "add a column output, reference or response, or use another gold"
            raise mistake("gold.kind", got, "a reference response for every prompt", do)
        new = [reference for reference in dict.fromkeys(known) if reference not in self._references]
        self._references.update(zip(new, self.embed(new), strict=True))
        return [
            float(embedding @ self._references[reference]) - self._penalty * repeated_trigram_share(response)
            for response, reference, embedding in zip(responses, known, self.embed(responses), strict=True)
        ]

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> list[torch.Tensor]:
        """Unit vectors: the mean of the last hidden states over the attention mask, divided by its length."""
        embeddings: list[torch.Tensor] = []
        for part in self._parts(len(texts)):
            inputs = self._tokenizer(texts[part], padding=True, truncation=True, **self._cut).to(self._model.device)
            mask = inputs["attention_mask"].unsqueeze(-1)
            hidden = self._model(**inputs).last_hidden_state.float()
            mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
            embeddings += torch.nn.functional.normalize(mean, dim=-1).cpu().unbind()
        return embeddings


def repeated_trigram_share(text: str) -> float:
    """Share of a text's word trigrams that occurred before in it; 0 below three words."""
    words = text.split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0
