"""Gold scorers against direct float64 computations, labels against closed forms, and bad settings."""

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from text_models import save_encoder, save_tokenizer

from ocrm_ray.config import ClassifierGold, FunctionGold, PraiseWorld, SimilarityGold
from ocrm_ray.errors import UserError
from ocrm_ray.gold import GoldScorer, label_pairs, load_gold, repeated_trigram_share
from ocrm_ray.praise import gold as praise_gold


def save_classifier(folder: Path, *, num_labels: int = 1, pad_token_id: int | None = 0) -> Any:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(1)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=20,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=64,
            max_position_embeddings=16,
            initializer_range=0.5,
            num_labels=num_labels,
            pad_token_id=pad_token_id,
            bos_token_id=None,
            eos_token_id=3,
        )
    )
    model.save_pretrained(folder)
    return model.eval()


def load(config: FunctionGold | ClassifierGold | SimilarityGold) -> GoldScorer:
    scorer = load_gold(config, None, trust_remote_code=False)
    assert scorer is not None
    return scorer


@pytest.fixture
def scoring_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("made_up_scores")
    monkeypatch.setitem(sys.modules, "made_up_scores", module)
    return module


# ---- which scorer


def test_without_settings_there_is_no_gold() -> None:
    assert load_gold(None, None, trust_remote_code=False) is None


def test_the_world_brings_its_own_gold() -> None:
    scorer = load_gold(None, PraiseWorld(), trust_remote_code=False)
    assert scorer is not None
    responses = ["great river", ""]
    expected = praise_gold(["river"] * 2, responses, [None] * 2)
    assert scorer(["river"] * 2, responses, [None] * 2) == expected


def test_the_world_brings_the_gold_of_its_own_response_length() -> None:
    scorer = load_gold(None, PraiseWorld(response_words=24), trust_remote_code=False)
    assert scorer is not None
    assert scorer(["river"], ["great " * 8], [None]) == pytest.approx([8 + 0.4 * (1 - 16)])


def test_a_function_gets_prompts_responses_and_references(scoring_module: ModuleType) -> None:
    scoring_module.score = lambda p, r, f: [
        len(a) + 10 * len(b) + (0 if c is None else 100) for a, b, c in zip(p, r, f, strict=True)
    ]
    scorer = load(FunctionGold(path="made_up_scores:score"))
    assert scorer(["a", "ab"], ["abc", "x"], ["r", None]) == [131.0, 12.0]


# ---- bad settings


@pytest.mark.parametrize(
    ("path", "got"),
    [
        ("no_such_module_here:f", "'no_such_module_here:f' (No module named 'no_such_module_here')"),
        ("math:nothing", "'math:nothing' (module 'math' has no attribute 'nothing')"),
        ("math:pi", "'math:pi', a float"),
        (":f", "':f' (Empty module name)"),
    ],
)
def test_a_function_that_cannot_be_imported_is_refused(path: str, got: str) -> None:
    with pytest.raises(UserError) as caught:
        load(FunctionGold(path=path))
    assert str(caught.value) == (
        f"gold.path: got {got}, need an importable function package.module:function: "
        "correct the path, or set PYTHONPATH"
    )


def test_a_function_with_a_wrong_number_of_scores_is_refused(scoring_module: ModuleType) -> None:
    scoring_module.score = lambda *_: [1.0]
    with pytest.raises(UserError) as caught:
        load(FunctionGold(path="made_up_scores:score"))(["a", "b"], ["c", "d"], [None, None])
    assert str(caught.value) == (
        "gold.path: got 1 scores for 2 responses from 'made_up_scores:score', need one score a response: "
        "correct the function"
    )


def test_a_function_with_a_score_that_is_not_finite_is_refused(scoring_module: ModuleType) -> None:
    scoring_module.score = lambda *_: [1.0, math.nan]
    with pytest.raises(UserError) as caught:
        load(FunctionGold(path="made_up_scores:score"))(["a", "b"], ["c", "d"], [None, None])
    assert str(caught.value) == (
        "gold.path: got nan from 'made_up_scores:score' for the response 'd', need finite scores: correct the function"
    )


def test_a_classifier_with_two_labels_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, sentence_marks=True)
    save_classifier(tmp_path, num_labels=2)
    with pytest.raises(UserError) as caught:
        load(ClassifierGold(model=str(tmp_path)))
    assert str(caught.value) == (
        f"gold.model: got '{tmp_path}' with 2 labels, need a model with one label: use a reward model"
    )


@pytest.mark.parametrize("config", [ClassifierGold, SimilarityGold])
def test_a_folder_without_a_model_is_refused(tmp_path: Path, config: type[ClassifierGold | SimilarityGold]) -> None:
    with pytest.raises(UserError) as caught:
        load(config(model=str(tmp_path)))
    assert str(caught.value).startswith(f"gold.model: got '{tmp_path}' (")
    assert str(caught.value).endswith("need a Hugging Face model: correct the folder or Hub name")


def test_similarity_needs_every_reference(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, sentence_marks=True)
    save_encoder(tmp_path)
    with pytest.raises(UserError) as caught:
        load(SimilarityGold(model=str(tmp_path)))(["p"] * 3, ["the"] * 3, ["old", None, None])
    assert str(caught.value) == (
        "gold.kind: got 2 of 3 prompts without a reference, need a reference response for every prompt: "
        "add a column output, reference or response, or use another gold"
    )


# ---- classifier


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_classifier_gives_the_models_logit_of_each_text_alone(tmp_path: Path, batch_size: int) -> None:
    tokenizer = save_tokenizer(tmp_path, sentence_marks=True)
    model = save_classifier(tmp_path).double()
    prompts = ["the old river", "lamp", "the"]
    responses = ["great", "quiet and warm", ""]
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = ["[CLS]", *prompt.split(), "[SEP]", *response.split(), "[SEP]"]
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer.convert_tokens_to_ids(ids)])).logits
        expected.append(float(logits[0, 0]))
    scores = load(ClassifierGold(model=str(tmp_path), batch_size=batch_size))(prompts, responses, [None] * 3)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert np.std(expected) > 0.05


@pytest.mark.parametrize("pad", [True, False])
def test_classifier_reads_a_conversation_where_there_is_a_template(tmp_path: Path, pad: bool) -> None:
    template = (
        "{% for m in messages %}{{ 'Q: ' if m['role'] == 'user' else 'A: ' }}{{ m['content'] }} {% endfor %}[SEP]"
    )
    tokenizer = save_tokenizer(tmp_path, sentence_marks=False, template=template, pad=pad)
    model = save_classifier(tmp_path, pad_token_id=0 if pad else None).double()
    prompts, responses = ["the old river", "lamp"], ["great", "quiet and warm"]
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = tokenizer.convert_tokens_to_ids(["Q:", *prompt.split(), "A:", *response.split(), "[SEP]"])
        with torch.no_grad():
            expected.append(float(model(torch.tensor([ids])).logits[0, 0]))
    scores = load(ClassifierGold(model=str(tmp_path)))(prompts, responses, [None] * 2)
    assert scores == pytest.approx(expected, abs=1e-5)


def test_classifier_cuts_long_prompts_and_keeps_the_response(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, sentence_marks=True)
    save_classifier(tmp_path)
    scorer = load(ClassifierGold(model=str(tmp_path)))
    # 16 positions: three marks, two words of response, eleven of the prompt.
    kept = "the old river was quiet and the new lamp great warm"
    cut, whole = scorer([kept + " river river", kept], ["old lamp"] * 2, [None] * 2)
    assert cut == pytest.approx(whole, abs=1e-6)


# ---- similarity


def embedding(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    ids = tokenizer.convert_tokens_to_ids(["[CLS]", *text.split(), "[SEP]"])
    with torch.no_grad():
        hidden = model(torch.tensor([ids])).last_hidden_state[0]
    mean = hidden.sum(dim=0) / len(ids)
    return mean / mean.square().sum().sqrt()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_similarity_is_the_cosine_of_mean_embeddings_less_repetition(tmp_path: Path, batch_size: int) -> None:
    tokenizer = save_tokenizer(tmp_path, sentence_marks=True)
    model = save_encoder(tmp_path).double()
    responses = ["the old river", "warm lamp", "", "old lamp old lamp old lamp"]
    references = ["the new river", "the old river was quiet", "great", "old lamp"]
    shares = [0.0, 0.0, 0.0, 0.5]
    expected = [
        float(embedding(model, tokenizer, a) @ embedding(model, tokenizer, b)) - 0.3 * share
        for a, b, share in zip(responses, references, shares, strict=True)
    ]
    config = SimilarityGold(model=str(tmp_path), batch_size=batch_size, repetition_penalty=0.3)
    scores = load(config)(["p"] * 4, responses, references)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert np.std(expected) > 0.05


def test_similarity_of_a_reference_to_itself_is_one_and_stays_so(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, sentence_marks=True)
    save_encoder(tmp_path)
    scorer = load(SimilarityGold(model=str(tmp_path)))
    for _ in range(2):
        assert scorer(["p"], ["the old river"], ["the old river"]) == pytest.approx([1.0], abs=1e-5)


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0.0), ("a b", 0.0), ("a b c", 0.0), ("a a a a", 0.5), ("a b c a b c", 0.25), ("a b a b a b", 0.5)],
)
def test_repeated_trigram_share_by_hand(text: str, share: float) -> None:
    assert repeated_trigram_share(text) == pytest.approx(share)


# ---- labels


def test_argmax_prefers_the_higher_score_and_the_first_on_a_tie() -> None:
    wins = label_pairs([1.0, 2.0, 3.0], [2.0, 2.0, 1.0], "argmax", np.random.default_rng(0))
    assert wins.tolist() == [False, True, True]


@pytest.mark.parametrize("difference", [-2.0, -0.5, 0.0, 1.0])
def test_bradley_terry_wins_at_the_rate_of_the_sigmoid(difference: float) -> None:
    num = 20_000
    wins = label_pairs(np.full(num, difference), np.zeros(num), "bradley_terry", np.random.default_rng(3))
    chance = 1 / (1 + math.exp(-difference))
    assert wins.mean() == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / num))


def test_bradley_terry_is_certain_at_huge_differences_and_repeats_by_seed() -> None:
    extreme = label_pairs([1e6, -1e6], [-1e6, 1e6], "bradley_terry", np.random.default_rng(0))
    assert extreme.tolist() == [True, False]
    draws = [label_pairs(np.zeros(50), np.zeros(50), "bradley_terry", np.random.default_rng(s)) for s in (1, 1, 2)]
    assert draws[0].tolist() == draws[1].tolist() != draws[2].tolist()
