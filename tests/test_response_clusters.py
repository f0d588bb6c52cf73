"""Clusters of responses: by equal text, by a real tiny encoder, and by models of inference whose answers are known."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from text_models import save_encoder, save_tokenizer

from ocrm_ray.config import SyntheticPairs
from ocrm_ray.errors import UserError
from ocrm_ray.response_clusters import InferenceClusterer, load_clusterer

LABELS = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")


def clusterer(**settings):
    return load_clusterer(SyntheticPairs.model_validate(settings), "no such folder", trust_remote_code=False)


def save_inference_model(folder: Path, answer: str = "NEUTRAL", labels=LABELS) -> str:
    """A model that gives the same ``answer`` to everything."""
    from transformers import BertConfig, BertForSequenceClassification

    save_tokenizer(folder, sentence_marks=True)
    sizes = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = BertConfig(**sizes, intermediate_size=32, max_position_embeddings=32, id2label=dict(enumerate(labels)))
    model = BertForSequenceClassification(settings)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([float(label == answer) for label in labels]))
    model.save_pretrained(folder)
    return str(folder)


def test_exact_clusters_are_equal_texts():
    assert clusterer()("the river", ["warm", "old", "warm", "", "old warm", ""]).tolist() == [0, 1, 0, 2, 3, 2]


@pytest.mark.parametrize("num_above", [0, 1, 3, 6])
def test_encoder_clusters_are_those_of_float64_cosines(tmp_path: Path, num_above: int):
    tokenizer, model = save_tokenizer(tmp_path, sentence_marks=True), save_encoder(tmp_path).double()
    texts = ["the old river", "quiet lamp", "great warm and new", "the old river was"]
    with torch.no_grad():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0) for text in texts]
    vectors = torch.nn.functional.normalize(torch.stack(states), dim=1)
    cosines = (vectors @ vectors.T).numpy()
    ordered = np.sort(cosines[np.triu_indices(4, 1)])[::-1]
    bounds = [1.0, *ordered, 0.0]  # num_above of the six cosines are at least the similarity
    similarity = (bounds[num_above] + max(bounds[num_above + 1], 0.01)) / 2
    expected: list[int] = []
    for item in range(4):
        firsts = [expected.index(cluster) for cluster in sorted(set(expected))]
        near = [cluster for cluster, first in enumerate(firsts) if cosines[first, item] >= similarity]
        expected.append(near[0] if near else len(firsts))
    found = clusterer(clusterer="encoder", model=str(tmp_path), similarity=similarity)("", texts)
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("answer", "merge_rule", "expected"),
    [
        ("ENTAILMENT", "entail_both", [0, 0, 0]),
        ("ENTAILMENT", "no_contradiction", [0, 0, 0]),
        ("NEUTRAL", "entail_both", [0, 1, 0]),
        ("NEUTRAL", "no_contradiction", [0, 0, 0]),
        ("CONTRADICTION", "entail_both", [0, 1, 0]),
        ("CONTRADICTION", "no_contradiction", [0, 1, 0]),
    ],
)
def test_inference_merges_as_the_rule_says_and_equal_texts_always(tmp_path: Path, answer, merge_rule, expected):
    model = save_inference_model(tmp_path, answer)
    found = clusterer(clusterer="nli", model=model, merge_rule=merge_rule)("the", ["old", "new", "old"])
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("merge_rule", "answers", "are_same"),
    [
        ("entail_both", ("ENTAILMENT", "ENTAILMENT"), True),
        ("entail_both", ("ENTAILMENT", "NEUTRAL"), False),
        ("entail_both", ("NEUTRAL", "ENTAILMENT"), False),
        ("no_contradiction", ("ENTAILMENT", "NEUTRAL"), True),
        ("no_contradiction", ("ENTAILMENT", "CONTRADICTION"), False),
        ("no_contradiction", ("CONTRADICTION", "NEUTRAL"), False),
    ],
)
def test_both_directions_are_asked_each_side_behind_the_prompt(tmp_path: Path, merge_rule, answers, are_same):
    found = InferenceClusterer(save_inference_model(tmp_path), merge_rule, trust_remote_code=False)
    asked: list[str] = []

    class Network:
        device = torch.device("cpu")

        def __call__(self, input_ids, **_):
            asked.extend(found._tokenizer.batch_decode(input_ids))
            logits = [[float(label == answer) for label in LABELS] for answer in answers]
            return SimpleNamespace(logits=torch.tensor(logits))

    found._network = Network()
    assert found("the river", ["old", "new"]).tolist() == [0, 0 if are_same else 1]
    sides = "the river old", "the river new"
    assert asked == [f"[CLS] {one} [SEP] {two} [SEP]" for one, two in (sides, sides[::-1])]


def test_a_model_of_other_labels_is_refused(tmp_path: Path):
    model = save_inference_model(tmp_path, "good", labels=("good", "bad"))
    with pytest.raises(UserError) as caught:
        clusterer(clusterer="nli", model=model)
    assert str(caught.value) == (
        f"correction.rlp_spg.model: got '{model}' with labels bad, good, need entailment and contradiction among "
        "them: choose a model of natural-language inference"
    )


@pytest.mark.parametrize("kind", ["encoder", "nli"])
def test_a_folder_without_a_model_is_refused(tmp_path: Path, kind: str):
    with pytest.raises(UserError) as caught:
        clusterer(clusterer=kind, model=str(tmp_path))
    assert str(caught.value).startswith(f"correction.rlp_spg.model: got '{tmp_path}' (")
    assert str(caught.value).endswith("need a Hugging Face model: correct the folder or Hub name")
