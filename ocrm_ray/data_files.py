"""Rows from data files and the Hugging Face Hub, and the JSONL files that stages leave for each other.

Files are streamed through the ``datasets`` library, so nothing is cached and looking at the first rows is cheap.
"""

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from ocrm_ray.config import DataFile
from ocrm_ray.errors import Problem, RunError, UserError

Row: TypeAlias = Mapping[str, Any]

NUM_INSPECTED_ROWS = 32
"""Rows that a check before the run looks at."""

_BUILDERS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_NEED = "a JSON, JSONL or Parquet file or a Hub data set"
_READ_ERRORS = (OSError, ValueError, EOFError, RuntimeError, zlib.error)


def read_rows(data_file: DataFile, path_in_config: str, num_rows: int | None = None) -> list[Row]:
    """The rows of a file or Hub data set: the first ``data_file.limit``, and no more than ``num_rows``.

    ``path_in_config`` (such as ``data.prompts``) names the setting in error messages.
    Raises UserError: missing, unreadable or broken file (with the line of a broken JSONL), no rows.
    """
    limit = min((n for n in (data_file.limit, num_rows) if n is not None), default=None)
    is_file = _is_file(data_file.path)
    try:
        rows = _file_rows(data_file, path_in_config, limit) if is_file else _hub_rows(data_file, limit)
    except _READ_ERRORS as error:
        raise UserError([_read_problem(data_file, path_in_config, is_file, error)]) from error
    if not rows:
        got = f"{data_file.path!r}, which has no rows"
        raise UserError([Problem(f"{path_in_config}.path", got, "at least one row", "name a data set with rows")])
    return rows


def _is_file(path: str) -> bool:
    """Whether a path means a file: it exists, ends like a data file, or cannot be a Hub name."""
    return Path(path).exists() or Path(path).suffix in {*_BUILDERS, ".gz", ".csv"} or _HUB_NAME.fullmatch(path) is None


def _file_rows(data_file: DataFile, path_in_config: str, limit: int | None) -> list[Row]:
    path = Path(data_file.path)
    where = f"{path_in_config}.path"
    builder = _BUILDERS.get(Path(path.stem).suffix if path.suffix == ".gz" else path.suffix)
    if not path.exists():
        raise UserError([Problem(where, f"{data_file.path!r}, which does not exist", _NEED, "correct the path")])
    if not path.is_file() or builder is None:
        kind = "a folder" if path.is_dir() else "a file of another kind"
        need = "a file ending in .json, .jsonl, .ndjson or .parquet (or these with .gz)"
        raise UserError([Problem(where, f"{data_file.path!r}, {kind}", need, "convert it, or name one file")])
    if path.stat().st_size == 0:
        return []
    from datasets import load_dataset

    with _quiet_datasets():
        stream = load_dataset(builder, data_files=str(path), split="train", streaming=True)
        return list(islice(stream, limit))


def _hub_rows(data_file: DataFile, limit: int | None) -> list[Row]:
    """Streams when only some rows are wanted; otherwise downloads into the library's cache."""
    from datasets import load_dataset

    with _quiet_datasets():
        return list(islice(load_dataset(data_file.path, split=data_file.split, streaming=limit is not None), limit))


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """The library logs a broken file before it raises; the raised problem says it once."""
    import datasets

    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _read_problem(data_file: DataFile, path_in_config: str, is_file: bool, error: Exception) -> Problem:
    where = f"{path_in_config}.path"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if not is_file:
        got = f"Hub data set {data_file.path!r}, split {data_file.split!r} ({reason})"
        return Problem(
            where, got, "a Hub data set that can be read", "correct name and split, or download it to a file"
        )
    fault = _first_json_fault(Path(data_file.path)) if ".parquet" not in data_file.path else None
    return Problem(where, f"{data_file.path!r}, broken at {fault}" if fault else f"{data_file.path!r} ({reason})",
                   "a readable JSON, JSONL or Parquet file", "repair the file")  # fmt: skip


def _first_json_fault(path: Path) -> str | None:
    """Where a JSON or JSONL file breaks, ``line N: reason``; None when the text itself can be parsed or not be read."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error):
        return None
    whole, newline = content.lstrip().startswith(b"["), b"\n"
    for number, line in enumerate([content] if whole else content.splitlines(), start=1):
        try:
            if line.strip():
                json.loads(line)
        except json.JSONDecodeError as error:
            return f"line {error.lineno if whole else number}: {error.msg}"
        except UnicodeDecodeError as error:
            return f"line {line[: error.start].count(newline) + 1 if whole else number}: not UTF-8"
    return None


def first_rows_problems(
    data_file: DataFile, path_in_config: str, problems_of: Callable[[list[Row]], list[Problem]]
) -> list[Problem]:
    """Why a file cannot be read, or ``problems_of`` its first rows; reads little and raises nothing."""
    try:
        rows = read_rows(data_file, path_in_config, NUM_INSPECTED_ROWS)
    except UserError as error:
        return list(error.problems)
    return problems_of(rows)


def columns_problem(path_in_config: str, rows: Sequence[Row], need: str) -> Problem:
    """The problem of rows without the columns that were looked for."""
    columns = ", ".join(dict.fromkeys(name for row in rows for name in row))
    return Problem(f"{path_in_config}.path", f"columns {columns}", need, "rename the columns")


def rows_problem(path_in_config: str, faults: Mapping[int, str], need: str) -> Problem:
    """One problem for all faulty rows: the first in words, the others counted. ``faults``: row index -> reason."""
    first = min(faults)
    others = f" (and {len(faults) - 1} more rows)" if len(faults) > 1 else ""
    return Problem(f"{path_in_config}.path", f"row {first + 1}: {faults[first]}{others}", need, "correct or drop them")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write a line a row. The file appears under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file of ``write_jsonl``. Raises RunError, naming the line, if it is missing or broken."""
    if not path.is_file():
        raise RunError(f"{path} is missing: run the stage that writes it again")
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise RunError(
                    f"{path}, line {number} is broken ({error.msg}): delete the file and run again"
                ) from error
    return rows
