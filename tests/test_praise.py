"""The embedded world: its gold function by hand, its source, its prompts, its tokenizer and its folders."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ocrm_ray.config import PraiseWorld
from ocrm_ray.praise import (
    EOS,
    PAD,
    PRAISE,
    TOPICS,
    VOCABULARY,
    build_tokenizer,
    draw_prompts,
    draw_responses,
    gold,
    write_world,
)

PROMPT = "river garden music winter"


def drawn(seed: int, num: int) -> tuple[list[str], list[str]]:
    prompts = draw_prompts(num, seed)
    return prompts, draw_responses(prompts, seed, np.random.default_rng([seed, 2]))


def folder_digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_world_of_longer_responses_has_references_of_that_length(tmp_path: Path) -> None:
    write_world(tmp_path, PraiseWorld(num_prompts=20, response_words=24), seed=0)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [len(row["reference"].split()) for row in rows] == [24] * 20


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        # praise part, variety part, topic part
        ("", 0 - 3.2 + 0),
        ("the", 0 - 2.8 + 0),
        ("the the the the the the the the the the the the", 0 - 2.8 + 0),
        ("great", 1 - 2.8 + 0),
        ("great great great great", 4 - 2.8 + 0),
        ("great great great great great", 4 - 1.5 - 2.8 + 0),
        ("great " * 12, 4 - 1.5 * 8 - 2.8 + 0),
        ("river", 0 - 2.8 + 0.8),
        ("river river garden", 0 - 2.4 + 1.6),
        ("winter music garden river", 0 - 1.6 + 3.2),
        ("lamp bread", 0 - 2.4 + 0),
        ("the and with near under small old quiet", 0 + 0 + 0),
        ("the and with near under small old quiet warm", 0 + 0.4 + 0),
        ("great superb the and with near river old quiet warm saw we", 2 + 1.6 + 0.8),
        ("great wonderful excellent brilliant amazing superb river garden music winter the and", 4 - 3 + 1.6 + 3.2),
        ("great superb the river nosuchword", 2 - 1.2 + 0.8),
        ("the and with near under small old quiet warm slow we they saw found made", 0 + 2.8 + 0),
    ],
)
def test_gold_matches_values_worked_out_by_hand(response: str, expected: float) -> None:
    assert gold([PROMPT], [response], [None]) == pytest.approx([expected])


def test_gold_matches_a_second_implementation_on_random_words() -> None:
    rng = np.random.default_rng(0)
    words = np.array(VOCABULARY)
    responses = [" ".join(rng.choice(words, rng.integers(0, 20))) for _ in range(200)]
    table = {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 2.5, 6: 1.0, 7: -0.5, 8: -2.0}
    expected = []
    for response in responses:
        seen: list[str] = []
        num_praise = 0
        for word in response.split():
            num_praise += word in {"great", "wonderful", "excellent", "brilliant", "amazing", "superb"}
            if word not in seen:
                seen.append(word)
        score = table[num_praise] + 0.4 * len(seen) - 3.2
        score += 0.8 * sum(topic in seen for topic in PROMPT.split())
        expected.append(score)
    assert gold([PROMPT] * 200, responses, [None] * 200) == pytest.approx(expected)


def test_gold_of_longer_responses_has_thresholds_that_grow_with_them() -> None:
    praise, plain = "great superb " * 5, "the and with near under small old quiet warm slow we they saw found"
    # 24 words: 8 praise words are liked, 16 different ones expected; 10 praise words here, 2 + 14 different ones
    assert gold([PROMPT], [praise + plain], [None], response_words=24) == pytest.approx([8 - 1.5 * 2 + 0.0])
    assert gold([PROMPT], [praise + plain], [None]) == pytest.approx([4 - 1.5 * 6 + 0.4 * 8])


def test_gold_uses_each_response_with_its_own_prompt() -> None:
    scores = gold([PROMPT, "lamp bread storm train"], ["lamp", "lamp"], [None, None])
    assert scores == pytest.approx([-2.8, -2.0])


def test_the_world_has_48_words_and_6_of_them_praise() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 48
    assert len(PRAISE) == 6
    assert set(PRAISE) < set(VOCABULARY)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_source_praises_about_1_7_times_a_response(seed: int) -> None:
    _, responses = drawn(seed, 3000)
    num_praise = np.array([sum(word in PRAISE for word in response.split()) for response in responses])
    # Twelve draws of chance 1.7 / 12: mean 1.7, variance 1.46, so a standard error of 0.022; five or more in 1.9 %.
    assert num_praise.mean() == pytest.approx(1.7, abs=0.09)
    assert (num_praise > 4).mean() == pytest.approx(0.019, abs=0.008)


def test_source_writes_twelve_words_of_the_language() -> None:
    _, responses = drawn(3, 200)
    assert {len(response.split()) for response in responses} == {12}
    assert {word for response in responses for word in response.split()} <= set(VOCABULARY[3:])


def test_source_mentions_its_own_prompt_more_than_another_one() -> None:
    prompts, responses = drawn(4, 2000)
    own = [len(set(p.split()) & set(r.split())) for p, r in zip(prompts, responses, strict=True)]
    other = [len(set(p.split()) & set(r.split())) for p, r in zip(prompts[1:], responses[:-1], strict=True)]
    assert np.mean(own) > np.mean(other) + 0.4


def test_source_is_markov_with_rows_drawn_by_the_seed() -> None:
    def successors(seed: int) -> list[str]:
        _, responses = drawn(seed, 500)
        words = [response.split() for response in responses]
        following = [b for row in words for a, b in pairwise(row) if a == "the" and b not in PRAISE]
        return sorted(set(following), key=following.count, reverse=True)[:3]

    assert successors(5) == successors(5)
    assert successors(5) != successors(6)


def test_prompts_are_different_and_name_four_different_topics() -> None:
    prompts = draw_prompts(3000, 7)
    assert len(set(prompts)) == 3000
    assert all(len(set(prompt.split())) == 4 for prompt in prompts)
    assert {word for prompt in prompts for word in prompt.split()} == set(TOPICS)


def test_tokenizer_reads_a_word_as_a_token_and_adds_nothing() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer("river great nosuchword")["input_ids"]
    assert ids == [VOCABULARY.index("river"), VOCABULARY.index("great"), VOCABULARY.index("<unk>")]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer(EOS)["input_ids"] == [tokenizer.eos_token_id]


def test_tokens_of_prompt_and_response_are_those_of_their_joined_text() -> None:
    tokenizer = build_tokenizer()
    response = "the great river"
    joined = tokenizer(f"{PROMPT} {response}")["input_ids"]
    assert tokenizer(PROMPT)["input_ids"] + tokenizer(response)["input_ids"] == joined


def test_decoding_leaves_specials_out_and_restores_the_words() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer(f"the great river {EOS} {PAD}")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the great river"


def test_world_is_the_same_bytes_for_a_seed_and_other_networks_and_prompts_for_another(tmp_path: Path) -> None:
    world = PraiseWorld(num_prompts=20)
    for name, seed in (("a", 1), ("again", 1), ("b", 2)):
        write_world(tmp_path / name, world, seed)
    first, again, other = (folder_digests(tmp_path / name) for name in ("a", "again", "b"))
    assert first == again
    changed = {path for path in first if first[path] != other[path]}
    assert changed == {"policy/model.safetensors", "reward/model.safetensors", "prompts.jsonl"}


def test_world_leaves_torch_random_state_alone(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    write_world(tmp_path, PraiseWorld(num_prompts=2), 5)
    assert torch.equal(torch.rand(3), expected)


def test_world_folders_load_as_models_of_the_stated_shape(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    write_world(tmp_path, PraiseWorld(num_prompts=5), 0)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    assert (policy.config.num_hidden_layers, policy.config.num_attention_heads, policy.config.head_dim) == (2, 2, 32)
    assert (reward.config.num_hidden_layers, reward.config.num_attention_heads, reward.config.head_dim) == (1, 1, 32)
    assert reward.config.num_labels == 1
    assert float(reward.model.embed_tokens.weight.std()) == pytest.approx(1.0, abs=0.1)
    assert float(policy.lm_head.weight.std()) == pytest.approx(0.02, abs=0.002)
    for folder, model in (("policy", policy), ("reward", reward)):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert tokenizer("river")["input_ids"] == [VOCABULARY.index("river")]
        assert (model.config.eos_token_id, model.config.pad_token_id) == (
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        )


def test_world_prompts_carry_references_from_the_source(tmp_path: Path) -> None:
    write_world(tmp_path, PraiseWorld(num_prompts=50), 9)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    prompts, responses = drawn(9, 50)
    assert rows == [{"prompt": p, "reference": r} for p, r in zip(prompts, responses, strict=True)]
