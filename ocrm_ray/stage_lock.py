"""One run at a time makes stages in a folder that runs share; the others wait, and find them done."""

import asyncio
import fcntl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from ocrm_ray.pools import Show
from ocrm_ray.progress import ProgressState

POLL_S = 0.5


@asynccontextmanager
async def held(root: Path, show: Show) -> AsyncIterator[None]:
    """Holds the lock of the stages in ``root``. It ends with the process however that ends: nothing stays locked.

    ``show`` is told that another run has it. No deadline: its stages may take hours, and show themselves.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as file:
        while not _is_free(file.fileno()):
            show(ProgressState(stage="start", note=f"waiting: another run makes the stages in {root}"))
            await asyncio.sleep(POLL_S)
        yield


def _is_free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
