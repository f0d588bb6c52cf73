"""Makes the tests' own modules (fakes, virtual clock, planted faults) importable, here and in spawned processes."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
RUNS = ("test_end_to_end.py", "test_study_arms.py", "test_chaos.py", "test_ray_job.py")
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


@pytest.fixture(scope="session")
def study_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the small study, run once."""
    from small_study import run_small_study

    return run_small_study(tmp_path_factory.mktemp("small"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of two workers one gets all whole runs: two at once take longer than one after the other."""
    from xdist.scheduler import LoadFileScheduling

    class RunsTogether(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "runs" if Path(file).name in RUNS else file

    return RunsTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The whole runs first: they take longest."""
    items.sort(key=lambda item: RUNS.index(item.path.name) if item.path.name in RUNS else len(RUNS))
