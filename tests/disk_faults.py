"""A disk that takes no more, as this process sees it."""

import contextlib
import errno
import os
import resource
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """Inside, the system refuses every write beyond that size of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def full_after(num_files: int) -> Iterator[None]:
    """Inside, the disk takes so many files: bringing one more to it fails."""
    real, left = os.fsync, iter(range(num_files))

    def limited(descriptor: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", limited)
        yield
