"""The true reward: a function, a sequence-classification model or a sentence encoder; and labels drawn from it."""

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ocrm_ray.config import ClassifierGold, FunctionGold, Gold, PraiseWorld, SimilarityGold
from ocrm_ray.errors import Problem, UserError

GoldFunction: TypeAlias = Callable[[list[str], list[str], list[str | None]], Sequence[float]]


class GoldScorer(Protocol):
    """What the policy is meant to please; never seen by reward-model training but through labels."""

    def score(self, prompts: list[str], responses: list[str], references: list[str | None]) -> list[float]:
        """One finite number a response."""
        ...


def load_gold(gold: Gold | None, world: PraiseWorld | None, *, trust_remote_code: bool) -> GoldScorer | None:
    """The configured scorer; without one the world's own, and None without either.

    Models go to the GPU that this process was given, if any. Raises UserError: nothing at the import path, a model
    that cannot be loaded or has more than one label.
    """
    if gold is None:
        return None if world is None else FunctionScorer(FunctionGold(path="ocrm_ray.praise:gold"))
    if isinstance(gold, FunctionGold):
        return FunctionScorer(gold)
    if isinstance(gold, ClassifierGold):
        return ClassifierScorer(gold, trust_remote_code=trust_remote_code)
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
    difference: npt.NDArray[np.float64] = np.asarray(gold_first, dtype=np.float64) - np.asarray(
        gold_second, dtype=np.float64
    )
    if method == "argmax":
        return np.asarray(difference >= 0, dtype=np.bool_)
    win_chance = np.exp(-np.logaddexp(0.0, -difference))
    return np.asarray(rng.random(difference.shape) < win_chance, dtype=np.bool_)


class FunctionScorer:
    """Calls a Python function ``f(prompts, responses, references)``."""

    def __init__(self, config: FunctionGold) -> None:
        self._path = config.path
        self._function = _import_function(config.path)

    def score(self, prompts: list[str], responses: list[str], references: list[str | None]) -> list[float]:
        """Raises UserError if the function returns another number of scores, or one that is not finite."""
        scores = [float(score) for score in self._function(prompts, responses, references)]
        if len(scores) != len(responses):
            got = f"{len(scores)} scores for {len(responses)} responses from {self._path!r}"
            raise UserError([Problem("gold.path", got, "one score a response", "correct the function")])
        for response, score in zip(responses, scores, strict=True):
            if not math.isfinite(score):
                got = f"{score} from {self._path!r} for the response {response[:80]!r}"
                raise UserError([Problem("gold.path", got, "finite scores", "correct the function")])
        return scores


class ClassifierScorer:
    """The one logit of a Hugging Face sequence-classification model, such as a large reward model.

    With a chat template the model reads prompt and response as a conversation, otherwise as a pair of texts. What
    exceeds its length is cut from the left, or from the prompt.
    """

    def __init__(self, config: ClassifierGold, *, trust_remote_code: bool) -> None:
        from transformers import AutoModelForSequenceClassification

        self._tokenizer, self._model = _load(
            AutoModelForSequenceClassification, config.model, trust_remote_code=trust_remote_code
        )
        if self._model.config.num_labels != 1:
            got = f"{config.model!r} with {self._model.config.num_labels} labels"
            raise UserError([Problem("gold.model", got, "a model with one label", "use a reward model")])
        has_pad = self._tokenizer.pad_token_id is not None and self._model.config.pad_token_id is not None
        self._batch_size = config.batch_size if has_pad else 1

    @torch.inference_mode()
    def score(self, prompts: list[str], responses: list[str], references: list[str | None]) -> list[float]:
        """Raw logits."""
        scores: list[float] = []
        for part in _parts(len(responses), self._batch_size):
            inputs = self._encode(prompts[part], responses[part]).to(self._model.device)
            scores += self._model(**inputs).logits[:, 0].float().tolist()
        return scores

    def _encode(self, prompts: list[str], responses: list[str]) -> Any:
        limit = _max_tokens(self._tokenizer, self._model)
        padding = len(responses) > 1
        if self._tokenizer.chat_template is None:
            return self._tokenizer(
                prompts, responses, padding=padding, truncation="only_first", max_length=limit, return_tensors="pt"
            )
        self._tokenizer.truncation_side = "left"
        conversations = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return self._tokenizer.apply_chat_template(
            conversations, return_dict=True, return_tensors="pt", padding=padding, truncation=True, max_length=limit
        )


class SimilarityScorer:
    """Cosine of sentence embeddings of response and reference, less a penalty for repeated word trigrams."""

    def __init__(self, config: SimilarityGold, *, trust_remote_code: bool) -> None:
        from transformers import AutoModel

        self._config = config
        self._tokenizer, self._model = _load(AutoModel, config.model, trust_remote_code=trust_remote_code)
        self._references: dict[str, torch.Tensor] = {}

    def score(self, prompts: list[str], responses: list[str], references: list[str | None]) -> list[float]:
        """In [-1 - repetition_penalty, 1]. Raises UserError if a reference is missing."""
        known = [reference for reference in references if reference is not None]
        if len(known) < len(references):
            got = f"{len(references) - len(known)} of {len(references)} prompts without a reference"
            do = "add a column output, reference or response, or use another gold"
            raise UserError([Problem("gold.kind", got, "a reference response for every prompt", do)])
        new = [reference for reference in dict.fromkeys(known) if reference not in self._references]
        self._references.update(zip(new, self._embed(new), strict=True))
        return [
            float(embedding @ self._references[reference])
            - self._config.repetition_penalty * repeated_trigram_share(response)
            for response, reference, embedding in zip(responses, known, self._embed(responses), strict=True)
        ]

    @torch.inference_mode()
    def _embed(self, texts: list[str]) -> list[torch.Tensor]:
        """Unit vectors: the mean of the last hidden states over the attention mask, divided by its length."""
        embeddings: list[torch.Tensor] = []
        for part in _parts(len(texts), self._config.batch_size):
            inputs = self._tokenizer(
                texts[part],
                padding=True,
                truncation=True,
                max_length=_max_tokens(self._tokenizer, self._model),
                return_tensors="pt",
            ).to(self._model.device)
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


def _import_function(path: str) -> GoldFunction:
    module, _, name = path.partition(":")
    need, do = "an importable function package.module:function", "correct the path, or set PYTHONPATH"
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError([Problem("gold.path", f"{path!r} ({error})", need, do)]) from error
    if not callable(function):
        raise UserError([Problem("gold.path", f"{path!r}, a {type(function).__name__}", need, do)])
    return function  # type: ignore[no-any-return]


def _load(auto_class: Any, path: str, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """Tokenizer, and model in float32 and evaluation mode, on this process's GPU if it has one."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = auto_class.from_pretrained(path, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        do = "correct the folder or Hub name"
        raise UserError([Problem("gold.model", f"{path!r} ({reason})", "a Hugging Face model", do)]) from error
    return tokenizer, model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _max_tokens(tokenizer: Any, model: Any) -> int:
    limit = getattr(model.config, "max_position_embeddings", None)
    return int(min(tokenizer.model_max_length, limit if limit is not None else tokenizer.model_max_length, 2**20))


def _parts(num_rows: int, batch_size: int) -> Iterator[slice]:
    return (slice(start, start + batch_size) for start in range(0, num_rows, batch_size))
