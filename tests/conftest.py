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
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(scope="session")
def two_ranks():
    """Two processes that train together."""
    from rank_processes import rank_processes

    with rank_processes(2) as ranks:
        yield ranks
