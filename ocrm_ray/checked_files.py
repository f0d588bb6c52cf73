"""Files that are brought to the disk, and told apart from others by their size and CRC-32."""

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np

from ocrm_ray.records import FloatArray

Entry: TypeAlias = dict[str, int]
"""Of a file: ``bytes`` and ``crc32``."""
PART_BYTES = 1 << 20
"""Of a file, taken at once: what a core's cache holds."""
CACHED_BYTES = 1 << 25
"""Of a file that is written, in the page cache at once."""


def entry_of(path: Path, to_disk: bool = False) -> Entry:
    """Read from the file, which is brought to the disk first if so asked."""
    checksum, size, part = 0, 0, memoryview(bytearray(PART_BYTES))
    with path.open("rb", buffering=0) as file:
        if to_disk:
            os.fsync(file.fileno())
        while num_read := file.readinto(part):
            checksum, size = zlib.crc32(part[:num_read], checksum), size + num_read
    return {"bytes": size, "crc32": checksum}


def write_arrays(arrays: Mapping[str, FloatArray], path: Path) -> Entry:
    """A safetensors file of float32 arrays, brought to the disk and dropped from the page cache as it is written.

    Nobody reads it soon, and fresh memory for gigabytes of cache costs a virtual machine whose free memory is its
    host's several times what all the rest of the writing does.
    """
    checksum = size = num_dropped = 0
    with path.open("wb") as file:
        for part in _parts(arrays):
            checksum, size = zlib.crc32(part, checksum), size + file.write(part)
            if size - num_dropped >= CACHED_BYTES:
                file.flush()
                os.fdatasync(file.fileno())
                os.posix_fadvise(file.fileno(), num_dropped, size - num_dropped, os.POSIX_FADV_DONTNEED)
                num_dropped = size
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {"bytes": size, "crc32": checksum}


def _parts(arrays: Mapping[str, FloatArray]) -> Iterator[bytes | memoryview]:
    """The file's bytes: length of the header, header, numbers."""
    header, end = {}, 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at multiples of 8
    yield len(text).to_bytes(8, "little") + text
    for array in arrays.values():
        numbers = np.ascontiguousarray(array, dtype="<f4").reshape(-1).view(np.uint8).data
        yield from (numbers[start : start + PART_BYTES] for start in range(0, len(numbers), PART_BYTES))
