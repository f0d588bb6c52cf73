"""Rows from data files and the Hugging Face Hub, and the JSONL files that stages leave for each other.

Files are read as streams, so looking at the first rows is cheap.
"""

import gzip
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from ocrm_ray.config import DataFile
from ocrm_ray.errors import RunError, mistake
from ocrm_ray.whole_files import write_whole

Row: TypeAlias = Mapping[str, Any]
Parsed = TypeVar("Parsed")

NUM_INSPECTED_ROWS = 32
"""Rows that a check before the run looks at."""

_ENDINGS = (".json", ".jsonl", ".ndjson", ".parquet")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class BrokenLineError(ValueError):
    """A line of a file that is not JSON, or not an object."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"broken at line {line}: {reason}")
        self.line, self.reason = line, reason


@dataclass(frozen=True)
class RowForm(Generic[Parsed]):
    """Rows of a setting: one of the sets of columns is there, and ``parse`` reads a row or raises ValueError."""

    setting: str
    columns: tuple[set[str], ...]
    need_columns: str
    need_rows: str
    parse: Callable[[Row], Parsed]

    def parsed(self, rows: Sequence[Row], bad: list[str] | None = None) -> list[Parsed]:
        """Every row; with ``bad``, a list as of ``bad_rows``, faulty ones are told there and left out.

        UserError: columns are missing, or rows faulty (the first told in words, the others counted).
        """
        where, names = f"{self.setting}.path", dict.fromkeys(name for row in rows for name in row)
        if not any(columns <= names.keys() for columns in self.columns):
            raise mistake(where, f"columns {', '.join(names)}", self.need_columns, "rename the columns")
        parsed: list[Parsed] = []
        faults: list[str] = []
        for number, row in enumerate(rows, start=1):
            try:
                content = self.parse(row)
                json.dumps(content, ensure_ascii=False).encode()
                parsed.append(content)
            except UnicodeEncodeError as error:
                faults.append(f"row {number}: {error.object[error.start]!r} is half a character")
            except ValueError as error:
                faults.append(f"row {number}: {error}")
        if bad is not None:
            bad += faults
        if faults and (bad is None or not parsed):
            got = faults[0] + (f" (and {len(faults) - 1} more rows)" if len(faults) > 1 else "")
            raise mistake(where, got, self.need_rows, "correct or drop them")
        return parsed

    def count(self, data_file: DataFile, most: int) -> int:
        """Rows of a file, ``most`` or NUM_INSPECTED_ROWS at most. UserError if it is broken or its first are faulty."""
        bad = bad_rows(data_file)
        rows = read_rows(data_file, self.setting, max(most, NUM_INSPECTED_ROWS), bad)
        self.parsed(rows[:NUM_INSPECTED_ROWS], bad)
        return len(rows)


def bad_rows(data_file: DataFile) -> list[str] | None:
    """Where to tell the bad rows of a file that may have them; None where the first one ends the run."""
    return [] if data_file.on_bad_row == "skip" else None


def read_rows(
    data_file: DataFile, path_in_config: str, num_rows: int | None = None, bad: list[str] | None = None
) -> list[Row]:
    """The rows of a file or Hub data set: the first ``data_file.limit``, and no more than ``num_rows``.

    ``path_in_config`` (such as ``data.prompts``) names the setting in error messages. With ``bad``, broken lines of
    JSONL are told there and left out.
    Raises UserError: missing, unreadable or broken file (with the line of a broken JSONL), no rows.
    """
    name, where = data_file.path, f"{path_in_config}.path"
    limit = min((n for n in (data_file.limit, num_rows) if n is not None), default=None)
    is_file = os.path.exists(name) or Path(name).suffix in {*_ENDINGS, ".gz", ".csv"} or not _HUB_NAME.fullmatch(name)
    if is_file:
        _require_file(Path(name), where)
    try:
        rows = list(islice(_file_rows(Path(name), bad) if is_file else _hub_rows(data_file, limit), limit))
    except Exception as error:  # each format's reader has its own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        got = f"{name!r}, {reason}" if isinstance(error, BrokenLineError) else f"{name!r} ({reason})"
        need, do = "a readable JSON, JSONL or Parquet file", "repair the file"
        if not is_file:
            got = f"Hub data set {name!r}, split {data_file.split!r} ({reason})"
            need, do = "a Hub data set that can be read", "correct name and split, or download it to a file"
        raise mistake(where, got, need, do) from error
    if not rows:
        got = f"{name!r}, which has no rows" + (f" ({len(bad)} bad ones, the first {bad[0]})" if bad else "")
        raise mistake(where, got, "at least one row", "name a data set with rows")
    return rows


def _require_file(path: Path, where: str) -> None:
    if not os.path.exists(path):
        need = "a JSON, JSONL or Parquet file or a Hub data set"
        raise mistake(where, f"'{path}', which does not exist", need, "correct the path")
    if not path.is_file() or _ending(path) not in _ENDINGS:
        kind = "a folder" if path.is_dir() else "a file of another kind"
        need = "a file ending in .json, .jsonl, .ndjson or .parquet (or these with .gz)"
        raise mistake(where, f"'{path}', {kind}", need, "convert it, or name one file")


def _ending(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _file_rows(path: Path, bad: list[str] | None) -> Iterator[Row]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        if _ending(path) == ".parquet":
            from pyarrow.parquet import ParquetFile

            for batch in ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
        else:
            is_list = file.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
            yield from json_rows([file.read()]) if is_list else json_rows(file, bad)


def json_rows(texts: Iterable[bytes], bad: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a file's lines, or of the list that is its whole text.

    Raises BrokenLineError; with ``bad``, broken lines are told there and left out.
    """
    for number, text in enumerate(texts, start=1):
        try:
            yield from _objects(text, number)
        except BrokenLineError as error:
            if bad is None:
                raise
            bad.append(str(error))


def _objects(text: bytes, number: int) -> list[dict[str, Any]]:
    """Of line ``number``, or of all the text that begins there. Raises BrokenLineError."""
    try:
        plain = text.decode("utf-8-sig").strip(" \t\r\n")
        content = json.loads(plain) if plain else []
    except UnicodeDecodeError as error:
        raise BrokenLineError(number + text.count(b"\n", 0, error.start), "not UTF-8") from error
    except json.JSONDecodeError as error:
        raise BrokenLineError(number + plain.count("\n", 0, error.pos), error.msg) from error
    except (ValueError, RecursionError) as error:
        reason = "a number of too many digits" if isinstance(error, ValueError) else "nested too deep"
        raise BrokenLineError(number, reason) from error
    rows = content if isinstance(content, list) else [content]
    if not all(isinstance(row, dict) for row in rows):
        raise BrokenLineError(number, "not an object")
    return rows


def _hub_rows(data_file: DataFile, limit: int | None) -> Iterable[Row]:
    """Streams when only some rows are wanted; otherwise downloads into the library's cache."""
    from datasets import load_dataset

    return load_dataset(data_file.path, split=data_file.split, streaming=limit is not None)  # type: ignore[no-any-return]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write a line a row. The file appears under its name only when it is complete."""
    write_whole(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path, parse: Callable[[dict[str, Any]], Parsed]) -> list[Parsed]:
    """What the rows of a file of ``write_jsonl`` are. RunError, naming the line, if it is missing or broken."""
    parsed: list[Parsed] = []
    try:
        with path.open("rb") as file:
            for row in json_rows(file):
                parsed.append(parse(row))
        return parsed
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing: run the stage that writes it again") from error
    except BrokenLineError as error:
        told = f"{path}, line {error.line} is broken ({error.reason})"
        raise RunError(f"{told}: delete the file and run again") from error
    except (LookupError, TypeError) as error:
        told = f"{path}, line {len(parsed) + 1} is broken (a row of another form)"
        raise RunError(f"{told}: delete the file and run again") from error
