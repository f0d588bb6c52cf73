"""Files that are there whole or not at all, whatever ends the writing."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path


def write_whole(path: Path, parts: Iterable[str]) -> None:
    """Write UTF-8 text. ``path`` changes only once all of it is on the disk; of a failed write nothing stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def flushed_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by relative path. OSError where one cannot be brought to the disk whole."""
    sizes: dict[str, int] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            sizes[str(path.relative_to(folder))] = os.fstat(file.fileno()).st_size
    return sizes
