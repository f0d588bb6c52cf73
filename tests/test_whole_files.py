"""Files that are whole or not there: real full devices, failures at every moment, sizes."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ocrm_ray.whole_files import flushed_sizes, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_parts_are_written_one_after_the_other_in_a_folder_that_is_made(tmp_path: Path) -> None:
    write_whole(tmp_path / "new" / "a.txt", ["é\n", "b"])
    assert (tmp_path / "new" / "a.txt").read_bytes() == "é\nb".encode()
    assert names(tmp_path / "new") == ["a.txt"]


def test_a_full_device_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.txt", ["old"])
    (tmp_path / "a.txt.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        write_whole(tmp_path / "a.txt", ["x" * 100_000])
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_at_the_end_leaves_nothing(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="broken"):
        write_whole(tmp_path / "a.txt", ["new"])
    assert names(tmp_path) == []


def test_an_end_amid_the_writing_leaves_nothing(tmp_path: Path) -> None:
    def parts() -> Iterator[str]:
        yield "x" * 100_000
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.txt", parts())
    assert names(tmp_path) == []


def test_the_text_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(os, "fsync", lambda number: seen.append((os.fstat(number).st_size, names(tmp_path))))
    write_whole(tmp_path / "a.txt", ["four"])
    assert seen == [(4, ["a.txt.partial"])]


def test_sizes_are_those_of_every_file_below_and_each_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_text("12")
    (tmp_path / "b" / "c").write_text("")
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(os.readlink(f"/proc/self/fd/{number}")))
    assert flushed_sizes(tmp_path) == {"a": 2, "b/c": 0}
    assert flushed == [str(tmp_path / "a"), str(tmp_path / "b" / "c")]
    assert flushed_sizes(tmp_path / "none") == {}
