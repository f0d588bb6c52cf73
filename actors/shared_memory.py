"""Folders that do not outlive who made them, such as the run's in shared memory; those of the dead are swept away."""

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")

_PREFIX = "ocrm-"
_OWNER = "owner"


@contextmanager
def shared_folder(run: str, root: Path = SHARED_MEMORY) -> Iterator[Path]:
    """A folder ``root/ocrm-RUN-...`` for as long as the context lasts.

    Its file ``owner`` holds this process's id and a file lock. The lock ends with the process however it ends,
    and cannot be mistaken for another's, as an id could that has been given out again or is of another container.
    """
    sweep(root)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{run}-", dir=root))
    unlocked = folder / f"{_OWNER}.new"
    with unlocked.open("w") as owner:
        owner.write(f"{os.getpid()}\n")
        owner.flush()
        fcntl.flock(owner, fcntl.LOCK_EX)
        unlocked.rename(folder / _OWNER)  # a sweep never meets an owner file without its lock
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def sweep(root: Path = SHARED_MEMORY) -> list[Path]:
    """Remove this user's run folders whose owner is dead; returns them."""
    dead = [folder for folder in root.glob(f"{_PREFIX}*") if _is_dead(folder)]
    for folder in dead:
        logger.warning("removing %s, left by a run that was killed", folder)
        shutil.rmtree(folder, ignore_errors=True)  # another process may be sweeping too
    return dead


def _is_dead(folder: Path) -> bool:
    """Whether nobody holds the lock of the owner file; a folder without that file is not ours to judge."""
    try:
        if folder.stat().st_uid != os.getuid():
            return False
        with (folder / _OWNER).open() as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (FileNotFoundError, NotADirectoryError, BlockingIOError):
        return False
    return True
