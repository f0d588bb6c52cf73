"""Preference pairs: every form of row, token boundaries, the split by prompt, and what bad rows are answered with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ocrm_ray.config import Data, DataFile
from ocrm_ray.data_files import read_rows
from ocrm_ray.errors import RunError, UserError
from ocrm_ray.praise import EOS, build_tokenizer
from ocrm_ray.preferences import PAIR_ROWS, Pair, load_pairs, read_pairs, split_pairs, write_pairs
from ocrm_ray.records import Sequence

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent")

WORDS = "Human: Assistant: System: <user> <assistant> <system> <end> hello there bye yes no well sure"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def words_tokenizer(template: str | None = None, eos: str | None = "<eos>") -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", "<eos>", *WORDS.split()])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", unk_token="<unk>", eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def load(rows: list[dict[str, Any]], tokenizer: Any, max_response_tokens: int = 20, **data: Any) -> list[Pair]:
    return load_pairs(Data(**data), rows, tokenizer, max_response_tokens)[0]


def tokens(tokenizer: Any, pair: Pair) -> tuple[str, str, str]:
    """Prompt, chosen and rejected as the words of their token ids."""
    assert pair.chosen.prompt_ids == pair.rejected.prompt_ids
    parts = (pair.chosen.prompt_ids, pair.chosen.response_ids, pair.rejected.response_ids)
    prompt, chosen, rejected = (" ".join(tokenizer.convert_ids_to_tokens(list(ids))) for ids in parts)
    return prompt, chosen, rejected


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


def pair_of(prompt: int, response: int = 0) -> Pair:
    return Pair(f"p{prompt}", Sequence((prompt,), (response, 1), True), Sequence((prompt,), (response + 1, 1), True))


# ---- forms of rows

CHAT_ROWS: dict[str, dict[str, Any]] = {
    "prompt string and response messages": {
        "prompt": "hello",
        "chosen": turns("yes", first="assistant"),
        "rejected": turns("no", first="assistant"),
    },
    "prompt messages and response messages": {
        "prompt": turns("hello"),
        "chosen": turns("yes", first="assistant"),
        "rejected": turns("no", first="assistant"),
    },
    "whole conversations": {"chosen": turns("hello", "yes"), "rejected": turns("hello", "no")},
    "whole conversations beside their prompt": {
        "prompt": "hello",
        "chosen": turns("hello", "yes"),
        "rejected": turns("hello", "no"),
        "messages": turns("hello", "yes"),
    },
    "history and one message each": {
        "conversations": [{"from": "human", "value": "hello"}],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    "strings": {"prompt": "hello", "chosen": "yes", "rejected": "no"},
    "prompt messages and response strings": {"prompt": turns("hello"), "chosen": "yes", "rejected": "no"},
    "transcripts": {
        "chosen": "\n\nHuman: hello\n\nAssistant: yes",
        "rejected": "\n\nHuman: hello\n\nAssistant: no",
    },
}


@pytest.mark.parametrize("form", CHAT_ROWS)
def test_every_form_of_a_pair_gives_the_same_tokens_with_a_template(form: str) -> None:
    tokenizer = words_tokenizer(TEMPLATE)
    (pair,) = load([CHAT_ROWS[form]], tokenizer)
    assert tokens(tokenizer, pair) == ("<user> hello <end> <assistant>", "yes <eos>", "no <eos>")
    assert (pair.chosen_text, pair.rejected_text) == ("yes", "no")


@pytest.mark.parametrize(
    "form", [form for form in CHAT_ROWS if form != "strings" and CHAT_ROWS[form].get("prompt") != "hello"]
)
def test_without_a_template_turns_are_written_as_a_transcript(form: str) -> None:
    tokenizer = words_tokenizer()
    (pair,) = load([CHAT_ROWS[form]], tokenizer)
    assert tokens(tokenizer, pair) == ("Human: hello Assistant:", "yes <eos>", "no <eos>")
    assert (pair.chosen_text, pair.rejected_text) == (" yes", " no")


def test_without_a_template_strings_are_taken_as_they_stand() -> None:
    tokenizer = words_tokenizer()
    (pair,) = load([CHAT_ROWS["strings"]], tokenizer)
    assert tokens(tokenizer, pair) == ("hello", "yes <eos>", "no <eos>")
    assert pair.prompt_text == "hello"


def test_a_longer_transcript_is_split_at_its_last_shared_turn() -> None:
    beginning = "\n\nHuman: hello\n\nAssistant: well\n\nHuman: there\n\nAssistant:"
    rows = [{"chosen": beginning + " yes sure", "rejected": beginning + " yes well"}]
    plain, chat = words_tokenizer(), words_tokenizer(TEMPLATE)
    (pair,) = load(rows, plain)
    assert pair.prompt_text == beginning
    assert tokens(plain, pair) == (
        "Human: hello Assistant: well Human: there Assistant:",
        "yes sure <eos>",
        "yes well <eos>",
    )
    expected = "<user> hello <end> <assistant> well <end> <user> there <end> <assistant>"
    assert tokens(chat, load(rows, chat)[0]) == (expected, "yes sure <eos>", "yes well <eos>")


def test_a_transcript_answer_that_begins_the_other_one_keeps_its_prompt() -> None:
    beginning = "\n\nHuman: hello\n\nAssistant:"
    longer = beginning + " yes\n\nHuman: bye\n\nAssistant: no"
    tokenizer = words_tokenizer()
    short = beginning + " yes"
    for rows in ([{"chosen": short, "rejected": longer}], [{"chosen": longer, "rejected": short}]):
        (pair,) = load(rows, tokenizer)
        assert pair.prompt_text == beginning


def test_response_tokens_follow_the_prompt_without_merging() -> None:
    tokenizer = build_tokenizer()
    (pair,) = load([{"prompt": "river lamp", "chosen": "the old", "rejected": "river"}], tokenizer)
    joined = tokenizer(f"river lamp the old {EOS}")["input_ids"]
    assert [*pair.chosen.prompt_ids, *pair.chosen.response_ids] == joined
    assert (pair.chosen.has_eos, pair.rejected.has_eos) == (True, True)


def test_long_responses_are_cut_and_counted() -> None:
    tokenizer = build_tokenizer()
    rows = [{"prompt": "river", "chosen": "the old quiet warm", "rejected": "the old"}]
    (pair,), report = load_pairs(Data(), rows, tokenizer, max_response_tokens=3)
    assert tokens(tokenizer, pair) == ("river", "the old quiet", "the old <eos>")
    assert (pair.chosen.has_eos, pair.rejected.has_eos) == (False, True)
    assert report["num_truncated"] == 1


def test_unusable_pairs_are_dropped_and_counted_by_reason() -> None:
    rows = [
        {"prompt": "river", "chosen": "the", "rejected": "old"},
        {"prompt": "river lamp bread", "chosen": "the", "rejected": "old"},
        {"prompt": "", "chosen": "the", "rejected": "old"},
        {"prompt": "river", "chosen": "the", "rejected": "the"},
        {"prompt": "river", "chosen": "the old quiet", "rejected": "the old warm"},
    ]
    pairs, report = load_pairs(Data(max_prompt_tokens=2), rows, build_tokenizer(), max_response_tokens=2)
    assert len(pairs) == 1
    assert (report["num_rows"], report["num_kept"], report["num_truncated"]) == (5, 1, 0)
    assert (report["num_too_long"], report["num_empty"], report["num_identical"]) == (1, 1, 2)


# ---- bad input


@pytest.mark.parametrize(
    ("row", "got"),
    [
        (
            {"chosen": "a", "rejected": "b"},
            "there is no prompt, and chosen and rejected share no beginning up to 'Assistant:'",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "chosen is str and rejected is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "chosen is str and rejected is int"),
        ({"prompt": 5, "chosen": "b", "rejected": "c"}, "the prompt is int, not a string or messages"),
        (
            {"chosen": {"role": "assistant", "content": "b"}, "rejected": {"role": "assistant", "content": "c"}},
            "chosen is dict and rejected is dict, and there is no prompt",
        ),
        (
            {"chosen": turns("a", "b"), "rejected": turns("c", "d")},
            "chosen and rejected differ before their last message",
        ),
        (
            {"chosen": turns("a", "b", "c"), "rejected": turns("a", "b", "d")},
            "chosen or rejected does not end with an assistant's message",
        ),
        (
            {"chosen": turns("b", first="assistant"), "rejected": turns("c", first="assistant")},
            "there is no prompt before the last message",
        ),
        (
            {
                "prompt": turns("a", "b"),
                "chosen": turns("c", first="assistant"),
                "rejected": turns("d", first="assistant"),
            },
            "the prompt ends with an assistant's message",
        ),
        (
            {"prompt": [{"role": "user", "content": None}], "chosen": "c", "rejected": "d"},
            "a message's content is NoneType, not a string",
        ),
        ({"prompt": ["a"], "chosen": "c", "rejected": "d"}, "a message is str, not an object"),
        ({"prompt": [], "chosen": "c", "rejected": "d"}, "the list of messages is empty"),
    ],
)
def test_bad_rows_are_answered_with_one_exact_line(row: dict[str, Any], got: str) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(UserError) as caught:
        load([good, row, row], words_tokenizer())
    assert str(caught.value) == (
        f"pairs.ready.path: got row 2: {got} (and 1 more rows), "
        "need rows with a prompt, a chosen and a rejected response: correct or drop them"
    )


def test_missing_columns_are_named_before_the_run(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"question": "a", "chosen": "b"}\n')
    with pytest.raises(UserError) as caught:
        PAIR_ROWS.count(DataFile(path=str(path)), 0)
    assert str(caught.value) == (
        "pairs.ready.path: got columns question, chosen, need columns chosen and rejected, "
        "with prompt, messages or a shared beginning: rename the columns"
    )


def test_a_missing_pair_file_is_named_with_its_setting(tmp_path: Path) -> None:
    path = tmp_path / "absent.json"
    with pytest.raises(UserError) as caught:
        PAIR_ROWS.count(DataFile(path=str(path)), 0)
    assert str(caught.value) == (
        f"pairs.ready.path: got '{path}', which does not exist, "
        "need a JSON, JSONL or Parquet file or a Hub data set: correct the path"
    )


def test_no_usable_pair_is_refused_with_the_reasons() -> None:
    with pytest.raises(UserError) as caught:
        load([{"prompt": "river lamp", "chosen": "a", "rejected": "b"}], build_tokenizer(), max_prompt_tokens=1)
    assert str(caught.value) == (
        "pairs.ready.path: got no usable pair in 1 rows (1 too long, 0 empty, 0 identical), "
        "need at least one pair: raise data.max_prompt_tokens, or use other pairs"
    )


# ---- split


@pytest.mark.parametrize("seed", range(8))
def test_split_keeps_a_prompts_pairs_on_one_side(seed: int) -> None:
    pairs = [pair_of(prompt, response) for response in range(3) for prompt in range(40)]
    training, heldout = split_pairs(pairs, 0.1, seed)
    assert {p.prompt_text for p in training}.isdisjoint(p.prompt_text for p in heldout)
    assert sorted(map(pairs.index, training + heldout)) == list(range(120))
    assert len(heldout) == 12


def test_split_is_drawn_by_the_seed() -> None:
    pairs = [pair_of(prompt) for prompt in range(50)]
    assert split_pairs(pairs, 0.2, 3) == split_pairs(pairs, 0.2, 3)
    assert split_pairs(pairs, 0.2, 3) != split_pairs(pairs, 0.2, 4)


def test_split_of_a_single_prompt_is_by_pairs() -> None:
    pairs = [pair_of(5, response) for response in range(10)]
    training, heldout = split_pairs(pairs, 0.3, 0)
    assert (len(training), len(heldout)) == (7, 3)


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_split_leaves_a_pair_on_either_side(share: float) -> None:
    training, heldout = split_pairs([pair_of(1), pair_of(2)], share, 0)
    assert (len(training), len(heldout)) == (1, 1)


def test_a_single_pair_cannot_be_split() -> None:
    with pytest.raises(UserError) as caught:
        split_pairs([pair_of(1)], 0.5, 0)
    assert str(caught.value) == ("pairs.heldout_share: got 1 pair, need at least 2 pairs, to hold some out: add pairs")


# ---- files


def test_pairs_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs" / "train.jsonl"
    pairs = [
        Pair("p é", Sequence((1, 2), (3, 9), True), Sequence((1, 2), (4, 5), False), 1.5, -0.25, "a", "b\nc"),
        pair_of(7),
    ]
    write_pairs(path, pairs)
    assert read_pairs(path) == pairs


def test_a_pair_line_can_be_read_by_people(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    write_pairs(path, [Pair("p", Sequence((1,), (3, 9), True), Sequence((1,), (4,), False), 1.5, None, "a", "b")])
    assert json.loads(path.read_text()) == {
        "prompt": "p",
        "prompt_ids": [1],
        "chosen": {"text": "a", "gold": 1.5, "has_eos": True, "ids": [3, 9]},
        "rejected": {"text": "b", "gold": None, "has_eos": False, "ids": [4]},
    }


def test_a_broken_pair_file_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    write_pairs(path, [pair_of(1)])
    with path.open("a") as file:
        file.write('{"prompt": "p", "prom')
    with pytest.raises(RunError) as caught:
        read_pairs(path)
    message = f"{path}, line 2 is broken (Unterminated string starting at): delete the file and run again"
    assert str(caught.value) == message


# ---- real data


@pytest.mark.shared
@needs_shared
def test_real_conversational_pairs_load_with_all_their_turns() -> None:
    data_file = DataFile(path=str(SHARED / "dpo_en.json"))
    assert PAIR_ROWS.count(data_file, 0) == 32
    rows = read_rows(data_file, "pairs.ready")
    pairs, report = load_pairs(Data(max_prompt_tokens=8192), rows, words_tokenizer(), max_response_tokens=8192)
    assert report["num_rows"] == 300
    assert report["num_too_long"] == report["num_empty"] == report["num_truncated"] == 0
    assert report["num_kept"] + report["num_identical"] == 300
    raw: list[Mapping[str, Any]] = json.loads((SHARED / "dpo_en.json").read_text(encoding="utf-8"))
    by_chosen = {row["chosen"]["value"].strip(): row for row in raw}
    for pair in pairs:
        row = by_chosen[pair.chosen_text.strip()]
        assert all(turn["value"] in pair.prompt_text for turn in row["conversations"])
