"""Files that are brought to the disk, against the library that reads them and the system's own tallies."""

import ctypes
import errno
import math
import mmap
import os
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
from disk_faults import files_up_to
from safetensors import safe_open
from safetensors.numpy import load_file

from ocrm_ray.checked_files import CACHED_BYTES, PART_BYTES, entry_of, write_arrays
from ocrm_ray.records import FloatArray


def share_in_memory(path: Path) -> float:
    """Of a file's pages, as the system tells."""
    size = path.stat().st_size
    states = (ctypes.c_ubyte * math.ceil(size / mmap.PAGESIZE))()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as pages:
        start = ctypes.c_char.from_buffer(pages)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(size), states)
        del start  # else the file stays mapped
    assert not failed
    return sum(state & 1 for state in states) / len(states)


@pytest.fixture
def arrays() -> dict[str, FloatArray]:
    """More than one part, and more than the page cache is to hold; special values, shapes and names."""
    draw = np.random.default_rng(1)
    return {
        "layers.0.weight": draw.standard_normal((3, CACHED_BYTES // 8), dtype=np.float32),
        "not a number": np.array([math.nan, math.inf, -0.0, 1e-45], dtype=np.float32),
        "scalar": np.array(2.5, dtype=np.float32),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "größe": np.arange(PART_BYTES // 4 + 1, dtype=np.float32)[::-1],
    }


def test_arrays_are_read_back_by_the_library_bit_for_bit(tmp_path: Path, arrays: dict[str, FloatArray]) -> None:
    write_arrays(arrays, tmp_path / "file.safetensors")
    found = load_file(tmp_path / "file.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def test_nothing_to_write_is_a_file_without_arrays(tmp_path: Path) -> None:
    write_arrays({}, tmp_path / "file.safetensors")
    with safe_open(tmp_path / "file.safetensors", "numpy") as found:
        assert list(found.keys()) == []


def test_the_entry_is_that_of_the_files_bytes_written_or_read(tmp_path: Path, arrays: dict[str, FloatArray]) -> None:
    path = tmp_path / "file.safetensors"
    written = write_arrays(arrays, path)
    content = path.read_bytes()
    assert written == entry_of(path) == {"bytes": len(content), "crc32": zlib.crc32(content)}


def test_a_written_file_leaves_memory_to_others(tmp_path: Path, arrays: dict[str, FloatArray]) -> None:
    mounts = {mount.mountpoint: mount.fstype for mount in psutil.disk_partitions(all=True)}
    if next(mounts[str(above)] for above in tmp_path.resolve().parents if str(above) in mounts) == "tmpfs":
        pytest.skip("the temporary folder is in memory")
    (tmp_path / "other").write_bytes(bytes(1 << 24))
    assert share_in_memory(tmp_path / "other") == 1
    write_arrays(arrays, tmp_path / "file.safetensors")
    assert share_in_memory(tmp_path / "file.safetensors") < 0.5  # pages that another core has just touched may stay


@pytest.mark.parametrize("num_bytes", [0, 100, PART_BYTES + 1, CACHED_BYTES + 1])
def test_a_file_that_the_disk_refuses_is_an_error(
    tmp_path: Path, arrays: dict[str, FloatArray], num_bytes: int
) -> None:
    with files_up_to(num_bytes), pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        write_arrays(arrays, tmp_path / "file.safetensors")
