"""Which responses to a prompt say the same: equal text, close sentence embeddings, or a model of inference's word."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch

from ocrm_ray.config import SimilarityGold, SyntheticPairs
from ocrm_ray.errors import mistake
from ocrm_ray.gold import SimilarityScorer
from ocrm_ray.records import IntArray
from ocrm_ray.synthetic_pairs import clusters, embedding_clusters, text_clusters

Clusterer: TypeAlias = Callable[[str, list[str]], IntArray]
"""Of a prompt and its n responses the cluster [n] of each."""


SETTING = "correction.rlp_spg.model"


def load_clusterer(settings: SyntheticPairs, sft: str, *, trust_remote_code: bool) -> Clusterer:
    """The configured one; ``sft``: folder of the SFT model. Raises UserError: a model that cannot be loaded."""
    if settings.clusterer == "exact":
        return lambda _, responses: text_clusters(responses)
    if settings.clusterer == "encoder":
        gold = SimilarityGold(kind="similarity", model=settings.model or sft)
        encoder = _Encoder(gold, trust_remote_code=trust_remote_code)
        return lambda _, responses: embedding_clusters(
            torch.stack(encoder.embed(responses)).numpy(), settings.similarity
        )
    assert settings.model is not None, "checked with the configuration"
    return InferenceClusterer(settings.model, settings.merge_rule, trust_remote_code=trust_remote_code)


class _Encoder(SimilarityScorer):
    setting = SETTING


class InferenceClusterer:
    """Asks a natural-language-inference model in both directions, each side behind the prompt (arXiv 2302.09664)."""

    def __init__(self, model: str, merge_rule: str, *, trust_remote_code: bool) -> None:
        """UserError: it cannot be loaded, or its labels do not name entailment and contradiction."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        network: Any
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
            network = AutoModelForSequenceClassification.from_pretrained(
                model, trust_remote_code=trust_remote_code, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            got, do = f"{model!r} ({str(error).strip().splitlines()[0]})", "correct the folder or Hub name"
            raise mistake(SETTING, got, "a Hugging Face model", do) from error
        self._network = network.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        labels = {str(name).lower(): number for number, name in network.config.id2label.items()}
        if not {"entailment", "contradiction"} <= labels.keys():
            got, need = f"{model!r} with labels {', '.join(sorted(labels))}", "entailment and contradiction among them"
            raise mistake(SETTING, got, need, "choose a model of natural-language inference")
        self._label = labels["entailment" if merge_rule == "entail_both" else "contradiction"]
        self._needs_it = merge_rule == "entail_both"

    def __call__(self, prompt: str, responses: list[str]) -> IntArray:
        texts = list(dict.fromkeys(responses))
        of_text = clusters(len(texts), lambda first, item: self._same(prompt, texts[first], texts[item]))
        return np.array([of_text[texts.index(response)] for response in responses])

    @torch.inference_mode()
    def _same(self, prompt: str, first: str, second: str) -> bool:
        sides = [f"{prompt} {first}", f"{prompt} {second}"]
        inputs = self._tokenizer(sides, sides[::-1], padding=True, truncation=True, return_tensors="pt")
        found = self._network(**inputs.to(self._network.device)).logits.argmax(dim=-1) == self._label
        return bool(found.all() if self._needs_it else not found.any())
