"""Prompts: every form of row, tokens, dropping and counting, the split, and what bad files are answered with."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from ocrm_ray.config import Data, DataFile
from ocrm_ray.conversations import encode_response, parse_transcript, render_transcript
from ocrm_ray.data_files import read_rows, write_jsonl
from ocrm_ray.errors import RunError, UserError
from ocrm_ray.praise import PROMPT_WORDS, build_tokenizer, draw_prompts
from ocrm_ray.prompts import PROMPT_ROWS, load_prompts, read_prompts, split_prompts, write_prompts
from ocrm_ray.records import Prompt

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent")

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def words_tokenizer(words: str, *, template: str | None = None, eos: str | None = "<eos>") -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", "<eos>", *words.split()])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", unk_token="<unk>", eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def chat_tokenizer() -> Any:
    return words_tokenizer("<user> <assistant> <system> <end> hello there be brief yes no", template=TEMPLATE)


def ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.convert_tokens_to_ids(text.split()))


def load(rows: list[dict[str, Any]], tokenizer: Any = None, **data: Any) -> list[Prompt]:
    return load_prompts(Data(**data), rows, tokenizer or build_tokenizer())[0]


def problems_of(path: Path) -> list[str]:
    try:
        PROMPT_ROWS.count(DataFile(path=str(path)), 0)
    except UserError as error:
        return str(error).split("\n")
    return []


# ---- files


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz", "rows.json.gz", "rows.parquet"])
def test_every_file_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": f"p{i}", "reference": f"r{i}"} for i in range(5)]
    path = tmp_path / name
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        text = json.dumps(rows) if ".jsonl" not in name else "\n".join(json.dumps(row) for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert read_rows(DataFile(path=str(path)), "data.prompts") == rows
    assert read_rows(DataFile(path=str(path), limit=2), "data.prompts") == rows[:2]


def test_text_that_looks_like_a_date_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "2020-01-01"}\n')
    assert read_rows(DataFile(path=str(path)), "data.prompts") == [{"prompt": "2020-01-01"}]


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for text in ("first", "other"):
        path.write_text(json.dumps({"prompt": text}))
        assert read_rows(DataFile(path=str(path)), "data.prompts") == [{"prompt": text}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.jsonl",
            b'{"prompt": "a"}\n\n{"prompt": "b"\n{"prompt": "c"}\n',
            "got '{path}', broken at line 3: Expecting ',' delimiter, "
            "need a readable JSON, JSONL or Parquet file: repair the file",
        ),
        (
            "rows.json",
            b'[{"prompt": "a"},\n {"prom',
            "got '{path}', broken at line 2: Unterminated string starting at, "
            "need a readable JSON, JSONL or Parquet file: repair the file",
        ),
        (
            "latin.jsonl",
            b'{"prompt": "a"}\n{"prompt": "\xe9"}\n',
            "got '{path}', broken at line 2: not UTF-8, need a readable JSON, JSONL or Parquet file: repair the file",
        ),
        (
            "rows.jsonl.gz",
            b"no gzip",
            "got '{path}' (Not a gzipped file (b'no')), need a readable JSON, JSONL or Parquet file: repair the file",
        ),
        (
            "rows.parquet",
            b"hello",
            "got '{path}' (Parquet file size is 5 bytes, smaller than the minimum file footer (8 bytes)), "
            "need a readable JSON, JSONL or Parquet file: repair the file",
        ),
        (
            "rows.jsonl",
            b'{"prompt": "a"}\n7\n',
            "got '{path}', broken at line 2: not an object, "
            "need a readable JSON, JSONL or Parquet file: repair the file",
        ),
        ("empty.jsonl", b"", "got '{path}', which has no rows, need at least one row: name a data set with rows"),
        ("blank.jsonl", b"\n \n", "got '{path}', which has no rows, need at least one row: name a data set with rows"),
        ("none.json", b"[]", "got '{path}', which has no rows, need at least one row: name a data set with rows"),
        (
            "rows.csv",
            b"prompt\na\n",
            "got '{path}', a file of another kind, need a file ending in .json, .jsonl, .ndjson or .parquet "
            "(or these with .gz): convert it, or name one file",
        ),
        (
            "rows.jsonl",
            b'{"question": "a", "answer": "b"}\n{"topic": "c"}\n',
            "got columns question, answer, topic, need a column prompt, instruction or messages: rename the columns",
        ),
        (
            "rows.jsonl",
            b'{"prompt": "a"}\n{"prompt": 7}\n{"prompt": 8}\n',
            "got row 2: prompt is int, not a string (and 1 more rows), "
            "need rows with a prompt, an instruction or messages: correct or drop them",
        ),
        (
            "rows.jsonl",
            b'{"messages": [{"role": "narrator", "content": "x"}]}\n',
            "got row 1: a message has the role 'narrator', "
            "need rows with a prompt, an instruction or messages: correct or drop them",
        ),
        (
            "rows.jsonl",
            b'{"messages": [{"role": "assistant", "content": "x"}]}\n',
            "got row 1: messages hold an answer and no prompt, "
            "need rows with a prompt, an instruction or messages: correct or drop them",
        ),
        (
            "rows.jsonl",
            b'{"prompt": "a", "output": ["b"]}\n',
            "got row 1: output is list, not a string, "
            "need rows with a prompt, an instruction or messages: correct or drop them",
        ),
    ],
)
def test_bad_files_are_answered_with_one_exact_line(
    tmp_path: Path, name: str, content: bytes, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert problems_of(path) == ["data.prompts.path: " + message.replace("{path}", str(path))]
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "absent.jsonl"
    assert problems_of(path) == [
        f"data.prompts.path: got '{path}', which does not exist, "
        "need a JSON, JSONL or Parquet file or a Hub data set: correct the path"
    ]


def test_a_folder_is_not_a_data_file(tmp_path: Path) -> None:
    assert problems_of(tmp_path) == [
        f"data.prompts.path: got '{tmp_path}', a folder, need a file ending in .json, .jsonl, .ndjson or .parquet "
        "(or these with .gz): convert it, or name one file"
    ]


def test_an_unreachable_hub_data_set_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'org/none' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UserError) as caught:
        PROMPT_ROWS.count(DataFile(path="org/none", split="test"), 0)
    assert str(caught.value) == (
        "data.prompts.path: got Hub data set 'org/none', split 'test' (Couldn't reach 'org/none' on the Hub), "
        "need a Hub data set that can be read: correct name and split, or download it to a file"
    )


def test_a_hub_name_is_asked_for_with_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, bool]] = []

    def load_dataset(path: str, *, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((path, split, streaming))
        return [{"prompt": "a"}, {"prompt": "b"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read_rows(DataFile(path="org/set", split="test"), "data.prompts") == [{"prompt": "a"}, {"prompt": "b"}]
    assert read_rows(DataFile(path="org/set", limit=1), "data.prompts") == [{"prompt": "a"}]
    assert asked == [("org/set", "test", False), ("org/set", "train", True)]


def test_inspection_accepts_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "input": null}\n')
    assert problems_of(path) == []


# ---- rows to prompts


def test_plain_prompts_are_tokenised_as_they_stand() -> None:
    tokenizer = build_tokenizer()
    (prompt,) = load([{"prompt": "river lamp", "reference": "the river"}], tokenizer)
    assert prompt == Prompt(0, "river lamp", ids(tokenizer, "river lamp"), "the river")


def test_plain_prompts_become_a_user_message_where_there_is_a_template() -> None:
    tokenizer = chat_tokenizer()
    (prompt,) = load([{"prompt": "hello there"}], tokenizer)
    assert prompt.token_ids == ids(tokenizer, "<user> hello there <end> <assistant>")
    assert prompt.text == "hello there"


def test_template_mode_never_leaves_the_template_out() -> None:
    tokenizer = chat_tokenizer()
    (prompt,) = load([{"prompt": "hello there"}], tokenizer, chat_template="never")
    assert prompt.token_ids == ids(tokenizer, "hello there")


def test_template_mode_always_needs_a_template() -> None:
    with pytest.raises(UserError) as caught:
        load([{"prompt": "river"}], chat_template="always")
    assert str(caught.value) == (
        "data.chat_template: got 'always' and a tokenizer without a chat template, "
        "need a tokenizer with one: use an instruct model or 'never'"
    )


@pytest.mark.parametrize(
    ("column", "role", "content"), [("messages", "role", "content"), ("conversations", "from", "value")]
)
def test_messages_ending_with_an_answer_give_it_as_reference(column: str, role: str, content: str) -> None:
    tokenizer = chat_tokenizer()
    user, assistant = ("user", "assistant") if role == "role" else ("human", "gpt")
    turns = [("system", "be brief"), (user, "hello"), (assistant, "yes"), (user, "there"), (assistant, "no")]
    (prompt,) = load([{column: [{role: speaker, content: text} for speaker, text in turns]}], tokenizer)
    expected = "<system> be brief <end> <user> hello <end> <assistant> yes <end> <user> there <end> <assistant>"
    assert prompt.token_ids == ids(tokenizer, expected)
    assert prompt.reference == "no"


def test_messages_ending_with_the_user_take_the_reference_column() -> None:
    (prompt,) = load([{"prompt": [{"role": "user", "content": "hello"}], "response": "yes"}], chat_tokenizer())
    assert (prompt.text, prompt.reference) == ("hello", "yes")


def test_instruction_and_input_become_one_user_message() -> None:
    tokenizer = chat_tokenizer()
    rows = [{"instruction": "hello", "input": "there", "output": "yes"}, {"instruction": "hello", "input": ""}]
    both, alone = load(rows, tokenizer)
    assert (both.text, both.reference) == ("hello\n\nthere", "yes")
    assert both.token_ids == ids(tokenizer, "<user> hello there <end> <assistant>")
    assert (alone.text, alone.reference) == ("hello", None)


def test_without_a_template_messages_become_a_transcript() -> None:
    tokenizer = words_tokenizer("Human: Assistant: hello yes")
    (prompt,) = load([{"instruction": "hello", "output": "yes"}], tokenizer)
    assert prompt.token_ids == ids(tokenizer, "Human: hello Assistant:")
    assert (prompt.text, prompt.reference) == ("hello", " yes")


def test_transcript_prompts_become_turns_of_the_template() -> None:
    tokenizer = chat_tokenizer()
    text = "\n\nHuman: hello\n\nAssistant: yes\n\nHuman: there\n\nAssistant:"
    (prompt,) = load([{"prompt": text}], tokenizer)
    assert prompt.token_ids == ids(tokenizer, "<user> hello <end> <assistant> yes <end> <user> there <end> <assistant>")
    assert prompt.text == text


def test_transcripts_survive_parsing_and_rendering() -> None:
    text = "\n\nSystem: s\n\nHuman: a\n\nwith a gap\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    messages = parse_transcript(text)
    assert messages is not None
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert render_transcript(messages) == text
    for other in ("", "hello", "\n\nHuman: a", "\n\nAssistant:", "x\n\nHuman: a\n\nAssistant:", text + " done"):
        assert parse_transcript(other) is None


def test_long_and_empty_prompts_are_dropped_and_counted_and_ids_stay_row_numbers() -> None:
    rows = [
        {"prompt": "river lamp", "reference": "the"},
        {"prompt": "river lamp bread"},
        {"prompt": " "},
        {"prompt": "storm train"},
        {"prompt": "river river river river"},
    ]
    prompts, report = load_prompts(Data(max_prompt_tokens=2), rows, build_tokenizer())
    assert [prompt.prompt_id for prompt in prompts] == [0, 3]
    counts = {"num_rows": 5, "num_kept": 2, "num_too_long": 2, "num_empty": 1, "num_without_reference": 1}
    assert report == counts | {"num_bad": 0}


def test_nothing_left_after_dropping_is_a_problem() -> None:
    with pytest.raises(UserError) as caught:
        load([{"prompt": "river lamp bread"}, {"prompt": ""}], max_prompt_tokens=2)
    assert str(caught.value) == (
        "data.max_prompt_tokens: got no prompt of at most 2 tokens (1 longer, 1 empty), "
        "need at least one: raise it, or use other prompts"
    )


# ---- responses to tokens


def test_a_response_is_tokenised_by_itself_and_ends_with_eos() -> None:
    tokenizer = build_tokenizer()
    prompt_ids = ids(tokenizer, "river lamp")
    sequence = encode_response(tokenizer, prompt_ids, "the old river", 4)
    assert sequence.prompt_ids == prompt_ids
    assert sequence.response_ids == (*ids(tokenizer, "the old river"), tokenizer.eos_token_id)
    assert sequence.has_eos


def test_a_response_beyond_the_limit_is_cut_and_has_no_eos() -> None:
    tokenizer = build_tokenizer()
    sequence = encode_response(tokenizer, (5,), "the old river", 3)
    assert sequence.response_ids == ids(tokenizer, "the old river")
    assert not sequence.has_eos


def test_a_response_ends_at_an_eos_in_its_text() -> None:
    tokenizer = build_tokenizer()
    sequence = encode_response(tokenizer, (5,), "the <eos> old <eos>", 10)
    assert sequence.response_ids == (*ids(tokenizer, "the"), tokenizer.eos_token_id)
    assert sequence.has_eos


# ---- split and files


def praise_prompts(num: int) -> list[Prompt]:
    return load([{"prompt": prompt} for prompt in draw_prompts(num, 0)])


def test_split_is_drawn_by_the_seed_and_covers_every_prompt_once() -> None:
    prompts = praise_prompts(100)
    training, heldout = split_prompts(prompts, 20, seed=1)
    assert len(heldout) == 20
    assert sorted(p.prompt_id for p in training + heldout) == list(range(100))
    assert [p.prompt_id for p in heldout] == sorted(p.prompt_id for p in heldout)
    assert split_prompts(prompts, 20, seed=1) == (training, heldout)
    assert split_prompts(prompts, 20, seed=2)[1] != heldout


def test_split_without_seed_holds_out_the_last_ones() -> None:
    prompts = praise_prompts(10)
    assert split_prompts(prompts, 3, seed=None) == (prompts[:7], prompts[7:])


@pytest.mark.parametrize("seed", [None, *range(10)])
def test_split_never_puts_a_repeated_prompt_on_both_sides(seed: int | None) -> None:
    texts = ["river", "lamp", "river", "bread", "lamp", "storm", "river"]
    training, heldout = split_prompts(load([{"prompt": text} for text in texts]), 2, seed)
    held = [prompt.text for prompt in heldout]
    assert len(set(held)) == len(held) == 2
    assert [prompt.text for prompt in training] == [text for text in texts if text not in held]


def test_holding_out_every_prompt_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        split_prompts(praise_prompts(10), 10, seed=0)
    assert str(caught.value) == (
        "data.num_heldout: got 10 with 10 different prompts, need fewer than there are prompts: "
        "lower it, or add prompts"
    )


def test_prompts_come_back_from_their_file(tmp_path: Path) -> None:
    prompts = [Prompt(3, "a é\n", (1, 2), None), Prompt(7, "b", (4,), "r")]
    write_prompts(tmp_path / "data" / "prompts.jsonl", prompts)
    assert read_prompts(tmp_path / "data" / "prompts.jsonl") == prompts
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["prompts.jsonl"]


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}])
    with pytest.raises(TypeError):
        write_jsonl(path, [{"a": 2}, {"a": object()}])
    assert path.read_text() == '{"a": 1}\n'


def test_broken_stage_files_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    with pytest.raises(RunError) as missing:
        read_prompts(path)
    assert str(missing.value) == f"{path} is missing: run the stage that writes it again"
    path.write_text('{"prompt_id": 1, "text": "a", "token_ids": [1], "reference": null}\n{"prompt_id"')
    with pytest.raises(RunError) as broken:
        read_prompts(path)
    assert str(broken.value) == f"{path}, line 2 is broken (Expecting ':' delimiter): delete the file and run again"


# ---- real data


@pytest.mark.shared
@needs_shared
@pytest.mark.parametrize(("name", "num"), [("alpaca_en.json", 999), ("alpacafarm_eval.json", 252)])
def test_real_instructions_load_with_their_references(name: str, num: int) -> None:
    data_file = DataFile(path=str(SHARED / name))
    assert PROMPT_ROWS.count(data_file, 0) == 32
    rows = read_rows(data_file, "data.prompts")
    prompts, report = load_prompts(Data(max_prompt_tokens=4096), rows, build_tokenizer())
    assert (report["num_rows"], report["num_kept"], report["num_without_reference"]) == (num, num, 0)
    for row, prompt in zip(json.loads((SHARED / name).read_text(encoding="utf-8")), prompts, strict=True):
        assert prompt.text.startswith(row["instruction"])
        assert prompt.text.endswith(row["input"])
        assert prompt.reference is not None
        assert prompt.reference.strip() == row["output"].strip()


def test_praise_prompts_are_four_tokens_long() -> None:
    assert {len(prompt.token_ids) for prompt in praise_prompts(50)} == {PROMPT_WORDS}
