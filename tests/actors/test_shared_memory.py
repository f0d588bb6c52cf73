import signal
import subprocess
import sys

import pytest

from actors.shared_memory import shared_folder, sweep

HOLD = """
import sys
from pathlib import Path
from actors.shared_memory import shared_folder
with shared_folder("run", Path(sys.argv[1])) as folder:
    (folder / "weights").write_text("x")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_run(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.folder = process.stdout.readline().strip()
    yield process
    process.kill()
    process.communicate()


def test_folder_is_gone_after_the_run_even_if_it_failed(tmp_path):
    def fail():
        with shared_folder("run", tmp_path) as folder:
            (folder / "weights").write_text("x")
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_sweep_leaves_the_folder_of_a_living_run(tmp_path, other_run):
    assert sweep(tmp_path) == []
    assert [str(folder) for folder in tmp_path.iterdir()] == [other_run.folder]


def test_the_next_run_removes_the_folder_of_a_killed_one(tmp_path, other_run):
    other_run.send_signal(signal.SIGKILL)
    other_run.wait()
    with shared_folder("run", tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]


def test_sweep_leaves_what_has_no_owner_file(tmp_path):
    (tmp_path / "ocrm-somebody-else").mkdir()
    (tmp_path / "ocrm-file").write_text("x")
    assert sweep(tmp_path) == []
