"""The sections of the gold kinds. ``ocrm_ray.config`` puts them into the tree; import them from there."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ocrm_ray.cluster_config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class FunctionGold(Section):
    """Gold from a Python function ``f(prompts, responses, references) -> list[float]``."""

    kind: Literal["function"] = "function"
    path: str
    """Import path, ``package.module:function``."""


class ClassifierGold(Section):
    """Gold from a Hugging Face sequence-classification model (its one logit)."""

    kind: Literal["classifier"] = "classifier"
    model: str
    """Folder or Hub name."""
    batch_size: PositiveInt = 32


class SimilarityGold(Section):
    """Gold from a sentence encoder: cosine similarity to the reference, less a penalty for repetition."""

    kind: Literal["similarity"] = "similarity"
    model: str
    """Encoder (folder or Hub name); mean-pooled, normalised."""
    batch_size: PositiveInt = 32
    repetition_penalty: NonNegativeFloat = 0.5
    """Taken off, times the share of word trigrams that occurred before in the response."""


class JudgeGold(Section):
    """Gold from a language model that compares each response with the reference: 1 better, 0.5 as good, 0 worse.

    Settings with ``repr=False`` change no answer and are no part of a stage's fingerprint.
    """

    kind: Literal["judge"] = "judge"
    base_url: str
    """Of an OpenAI-compatible endpoint, such as ``https://HOST/v1``; ``/chat/completions`` is added."""
    model_name: str
    """As the endpoint calls it."""
    parameters: dict[str, int | float | str | bool | None] = Field(default={"temperature": 0, "max_tokens": 16})
    """Further fields of every request; judges that reason before they answer need other ones."""
    api_key_env: str | None = Field(default=None, repr=False)
    """Name of the environment variable that holds the key (never the key itself); null: no key is sent."""
    concurrency: PositiveInt = Field(default=8, repr=False)
    """Most requests at once. ``deadlines.request_s`` covers a call: 2048 responses of two requests each at most."""
    num_retries: NonNegativeInt = Field(default=6, repr=False)
    """Of a request that met overload, a fault of the server or of the connection; waits double from 1 s to 60 s, or
    are as long as the endpoint asks for."""
    timeout_s: PositiveFloat = Field(default=60.0, repr=False)
    """Longest silence of the endpoint."""
    cache_file: Path = Field(default=Path("runs/judge-answers.jsonl"), repr=False)
    """Answers that were paid for, by model, question and parameters; runs share it."""
    input_price: NonNegativeFloat | None = Field(default=None, repr=False)
    """USD a million input tokens; without both prices no cost is reported."""
    output_price: NonNegativeFloat | None = Field(default=None, repr=False)


Gold = Annotated[FunctionGold | ClassifierGold | SimilarityGold | JudgeGold, Field(discriminator="kind")]
