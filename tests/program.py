"""The program in a process of its own, as tests use it."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def ocrm_ray(command: str, config: Path) -> None:
    """Run a file that has the name of its run; it must succeed and leave no shared or temporary file."""

    def shared_folders() -> set[Path]:
        """Other runs may go on beside this one."""
        return set(Path("/dev/shm").glob(f"ocrm-{config.stem}-*"))

    shared_before = shared_folders()
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:  # sockets have short paths
        done = subprocess.run(
            [sys.executable, "-m", "ocrm_ray", command, str(config)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": temporary},
            capture_output=True,
            text=True,
            timeout=1500,
        )
        names = [path.name for path in Path(temporary).iterdir()]
        left = [name for name in names if not name.startswith("torchinductor_")]  # a cache that torch keeps
    assert done.returncode == 0, done.stdout + done.stderr
    assert shared_folders() <= shared_before
    assert left == []
