"""Readers of data files under any bytes and any rows: rows or one UserError, never anything else."""

import gzip
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ocrm_ray.config import Data, DataFile
from ocrm_ray.data_files import BrokenLineError, json_rows, read_rows
from ocrm_ray.errors import RunError, UserError
from ocrm_ray.praise import build_tokenizer
from ocrm_ray.preferences import PAIR_ROWS, load_pairs, read_pairs, write_pairs
from ocrm_ray.prompts import PROMPT_ROWS, load_prompts, read_prompts, write_prompts

TOKENIZER = build_tokenizer()
fuzzed = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
anything = st.characters(exclude_categories=[])  # also halves of characters, controls, what has no meaning yet
texts = st.text(anything, max_size=8) | st.sampled_from(["river", "\n\nHuman: river\n\nAssistant: old", "user", "gpt"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
ROW_KEYS = ("prompt", "instruction", "input", "output", "reference", "response", "messages", "conversations")
MESSAGE_KEYS = ("chosen", "rejected", "role", "from", "content", "value")
names = st.sampled_from([*ROW_KEYS, *MESSAGE_KEYS])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | texts, inner, max_size=3), max_leaves=6
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts}), max_size=3
)
rows = st.dictionaries(names | texts, values | messages | texts, max_size=5)


def outcome(path: Path, on_bad_row: str) -> None:
    """Read a file in every way, write what is accepted and read it back. Only UserErrors of one line may come out."""
    file = DataFile(path=str(path), on_bad_row=on_bad_row)  # type: ignore[arg-type]
    stage_file = path.with_name("stage.jsonl")
    told: list[str] = []
    for form in (PROMPT_ROWS, PAIR_ROWS):
        try:
            form.count(file, 40)
            bad: list[str] | None = [] if on_bad_row == "skip" else None
            found = read_rows(file, form.setting, bad=bad)
            if form is PROMPT_ROWS:
                prompts, counts = load_prompts(Data(), found, TOKENIZER, bad)
                write_prompts(stage_file, prompts)
                assert read_prompts(stage_file) == prompts
            else:
                pairs, counts = load_pairs(Data(), found, TOKENIZER, 8, bad)
                write_pairs(stage_file, pairs)
                assert read_pairs(stage_file) == pairs
            assert counts["num_bad"] == len(bad or ())
        except UserError as error:
            told.append(str(error))
    assert [line for line in told if len(line.splitlines()) != 1 or not line.isprintable()] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@fuzzed
@given(
    content=st.binary(max_size=60),
    ending=st.sampled_from([".json", ".jsonl", ".ndjson", ".parquet", ".jsonl.gz", ".parquet.gz"]),
    on_bad_row=st.sampled_from(["error", "skip"]),
)
def test_any_bytes_give_rows_or_a_user_error(content: bytes, ending: str, on_bad_row: str, folder: Path) -> None:
    path = folder / f"bytes{ending}"
    path.write_bytes(content)
    outcome(path, on_bad_row)


@fuzzed
@given(lines=st.lists(rows | values, max_size=5), on_bad_row=st.sampled_from(["error", "skip"]), is_list=st.booleans())
@example(lines=[{"messages": [{"role": ["user"], "content": "a"}]}], on_bad_row="error", is_list=False)
@example(lines=[{"prompt": "river", "chosen": "\ud800", "rejected": "old"}], on_bad_row="skip", is_list=True)
@example(lines=[{"a\n\ud800": 1}], on_bad_row="error", is_list=False)
def test_any_json_gives_rows_or_a_user_error(lines: list[object], on_bad_row: str, is_list: bool, folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(lines) if is_list else "\n".join(map(json.dumps, lines)))
    outcome(path, on_bad_row)


GOOD = b"".join(
    json.dumps({"prompt": f"river {number}", "chosen": "the old lamp", "rejected": "a storm"}).encode() + b"\n"
    for number in range(40)
)


def packed(kind: str) -> bytes:
    if kind == "rows.jsonl.gz":
        return gzip.compress(GOOD, mtime=0)
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([json.loads(line) for line in GOOD.splitlines()]), file)
    return file.getvalue()


@fuzzed
@given(
    kind=st.sampled_from(["rows.jsonl", "rows.jsonl.gz", "rows.parquet"]),
    start=st.integers(0, 4000),
    change=st.binary(max_size=4),
    end=st.none() | st.integers(0, 4000),
    on_bad_row=st.sampled_from(["error", "skip"]),
)
def test_any_damage_to_a_good_file_gives_rows_or_a_user_error(
    kind: str, start: int, change: bytes, end: int | None, on_bad_row: str, folder: Path
) -> None:
    content = GOOD if kind == "rows.jsonl" else packed(kind)
    start %= len(content)
    damaged = content[:start] + change + content[start + len(change) :]
    (folder / kind).write_bytes(damaged[:end])
    outcome(folder / kind, on_bad_row)


@fuzzed
@given(path=st.text(anything, max_size=20) | st.text("a./", min_size=200, max_size=5000))
def test_any_path_without_a_file_gives_a_user_error(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UserError):
        read_rows(DataFile(path=path), "data.prompts")


@pytest.mark.parametrize(
    "content", [b'{"a": 1}\n{"a": 2}\n', b'[{"a": 1},\n {"a": 2}]', b'{"a": 1}\r\n\r\n \t\n{"a": 2}']
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_and_blank_lines_are_no_rows(content: bytes, mark: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(mark + content)
    assert read_rows(DataFile(path=str(tmp_path / "rows.jsonl")), "data.prompts") == [{"a": 1}, {"a": 2}]


def test_files_that_were_joined_keep_their_marks_out_of_the_rows() -> None:
    assert list(json_rows([b'\xef\xbb\xbf{"a": 1}\n', b'\xef\xbb\xbf{"a": 2}\n'])) == [{"a": 1}, {"a": 2}]


def test_null_bytes_and_odd_characters_in_texts_stay_as_they_are(tmp_path: Path) -> None:
    text = "river \0 \u2028 \ufeff \U0001f40e \u202e"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": text, "output": text}))
    found = read_rows(DataFile(path=str(tmp_path / "rows.jsonl")), "data.prompts")
    prompts, _ = load_prompts(Data(), found, TOKENIZER)
    write_prompts(tmp_path / "stage.jsonl", prompts)
    (prompt,) = read_prompts(tmp_path / "stage.jsonl")
    assert (prompt.text, prompt.reference) == (text, text)


def test_a_line_of_a_list_is_named_where_it_breaks() -> None:
    for text, line, reason in [
        (b'[{"a": 1},\n{"a" 2}]', 2, "Expecting ':' delimiter"),
        (b'[{"a": 1},\n{"a": "\xe9"}]', 2, "not UTF-8"),
        (b'[{"a": 1},\n7]', 1, "not an object"),
    ]:
        with pytest.raises(BrokenLineError) as caught:
            list(json_rows([text]))
        assert (caught.value.line, caught.value.reason) == (line, reason)


def test_a_blank_reference_is_none() -> None:
    found, counts = load_prompts(Data(), [{"prompt": "river", "output": " \n"}, {"prompt": "lamp"}], TOKENIZER)
    assert [prompt.reference for prompt in found] == [None, None]
    assert counts["num_without_reference"] == 2


@pytest.mark.parametrize("line", ['{"prompt_id": 0}', '{"prompt_id": 0, "token_ids": 5}', '{"token_ids": [], "x": 1}'])
def test_a_stage_file_of_another_form_names_the_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt_id": 1, "text": "a", "token_ids": [1], "reference": null}\n' + line)
    with pytest.raises(RunError) as caught:
        read_prompts(path)
    assert str(caught.value) == (f"{path}, line 2 is broken (a row of another form): delete the file and run again")
    path.write_text(line)
    with pytest.raises(RunError, match="line 1 is broken"):
        read_pairs(path)
