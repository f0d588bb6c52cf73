"""Rows from data files and the Hugging Face Hub, and the JSONL files that stages leave for each other.

Files are read as streams, so looking at the first rows is cheap.
"""

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from ocrm_ray.config import DataFile
from ocrm_ray.errors import RunError, mistake

Row: TypeAlias = Mapping[str, Any]
Parsed = TypeVar("Parsed")

NUM_INSPECTED_ROWS = 32
"""Rows that a check before the run looks at."""

_ENDINGS = (".json", ".jsonl", ".ndjson", ".parquet")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_READ_ERRORS = (OSError, ValueError, EOFError, RuntimeError, zlib.error)


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

    def parsed(self, rows: Sequence[Row]) -> list[Parsed]:
        """Every row. UserError: columns are missing, or rows faulty (the first told in words, the others counted)."""
        where, names = f"{self.setting}.path", dict.fromkeys(name for row in rows for name in row)
        if not any(columns <= names.keys() for columns in self.columns):
            raise mistake(where, f"columns {', '.join(names)}", self.need_columns, "rename the columns")
        parsed: list[Parsed] = []
        faults: list[str] = []
        for number, row in enumerate(rows, start=1):
            try:
                parsed.append(self.parse(row))
            except ValueError as error:
                faults.append(f"row {number}: {error}")
        if faults:
            got = faults[0] + (f" (and {len(faults) - 1} more rows)" if len(faults) > 1 else "")
            raise mistake(where, got, self.need_rows, "correct or drop them")
        return parsed

    def count(self, data_file: DataFile, most: int) -> int:
        """Rows of a file, ``most`` or NUM_INSPECTED_ROWS at most. UserError if it is broken or its first are faulty."""
        rows = read_rows(data_file, self.setting, max(most, NUM_INSPECTED_ROWS))
        self.parsed(rows[:NUM_INSPECTED_ROWS])
        return len(rows)


def read_rows(data_file: DataFile, path_in_config: str, num_rows: int | None = None) -> list[Row]:
    """The rows of a file or Hub data set: the first ``data_file.limit``, and no more than ``num_rows``.

    ``path_in_config`` (such as ``data.prompts``) names the setting in error messages.
    Raises UserError: missing, unreadable or broken file (with the line of a broken JSONL), no rows.
    """
    name, where = data_file.path, f"{path_in_config}.path"
    limit = min((n for n in (data_file.limit, num_rows) if n is not None), default=None)
    is_file = Path(name).exists() or Path(name).suffix in {*_ENDINGS, ".gz", ".csv"} or not _HUB_NAME.fullmatch(name)
    if is_file:
        _require_file(Path(name), where)
    try:
        rows = list(islice(_file_rows(Path(name)) if is_file else _hub_rows(data_file, limit), limit))
    except _READ_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        got = f"{name!r}, {reason}" if isinstance(error, BrokenLineError) else f"{name!r} ({reason})"
        need, do = "a readable JSON, JSONL or Parquet file", "repair the file"
        if not is_file:
            got = f"Hub data set {name!r}, split {data_file.split!r} ({reason})"
            need, do = "a Hub data set that can be read", "correct name and split, or download it to a file"
        raise mistake(where, got, need, do) from error
    if not rows:
        raise mistake(where, f"{name!r}, which has no rows", "at least one row", "name a data set with rows")
    return rows


def _require_file(path: Path, where: str) -> None:
    if not path.exists():
        need = "a JSON, JSONL or Parquet file or a Hub data set"
        raise mistake(where, f"'{path}', which does not exist", need, "correct the path")
    if not path.is_file() or _ending(path) not in _ENDINGS:
        kind = "a folder" if path.is_dir() else "a file of another kind"
        need = "a file ending in .json, .jsonl, .ndjson or .parquet (or these with .gz)"
        raise mistake(where, f"'{path}', {kind}", need, "convert it, or name one file")


def _ending(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _file_rows(path: Path) -> Iterator[Row]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        if _ending(path) == ".parquet":
            from pyarrow.parquet import ParquetFile

            for batch in ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
        else:
            is_list = file.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
            yield from json_rows([file.read()] if is_list else file)


def json_rows(texts: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The objects of a file's lines, or of the list that is its whole text. Raises BrokenLineError."""
    for number, text in enumerate(texts, start=1):
        try:
            content = json.loads(text.rstrip()) if text.strip() else []
        except json.JSONDecodeError as error:
            raise BrokenLineError(number + error.lineno - 1, error.msg) from error
        except UnicodeDecodeError as error:
            raise BrokenLineError(number + text.count(b"\n", 0, error.start), "not UTF-8") from error
        rows = content if isinstance(content, list) else [content]
        if not all(isinstance(row, dict) for row in rows):
            raise BrokenLineError(number, "not an object")
        yield from rows


def _hub_rows(data_file: DataFile, limit: int | None) -> Iterable[Row]:
    """Streams when only some rows are wanted; otherwise downloads into the library's cache."""
    from datasets import load_dataset

    return load_dataset(data_file.path, split=data_file.split, streaming=limit is not None)  # type: ignore[no-any-return]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write a line a row. The file appears under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(partial, path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file of ``write_jsonl``. Raises RunError, naming the line, if it is missing or broken."""
    try:
        with path.open("rb") as file:
            return list(json_rows(file))
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing: run the stage that writes it again") from error
    except BrokenLineError as error:
        told = f"{path}, line {error.line} is broken ({error.reason})"
        raise RunError(f"{told}: delete the file and run again") from error
