"""Makes the tests' own modules (fakes, virtual clock, planted faults) importable, here and in spawned processes."""

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS))
# the models are tiny: a second thread only waits for the first, for long where other processes want the core too
os.environ["OMP_NUM_THREADS"] = "1"
LONGEST = ("test_end_to_end.py", "test_study_arms.py", "test_chaos.py", "test_ray_job.py")
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(scope="session")
def two_ranks():
    """Two processes that train together."""
    from rank_processes import rank_processes

    with rank_processes(2) as ranks:
        yield ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: of workers that share the files, none is left alone with one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
