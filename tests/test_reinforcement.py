"""The order of a run's last files: a run with a summary is taken for done."""

import asyncio
import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ocrm_ray import reinforcement
from ocrm_ray.config import RunConfig
from ocrm_ray.metrics import RunLog


class Instant:
    """Stages without work, and a coordinator whose run is its first line."""

    def __init__(self, *arguments: Any) -> None:
        self.log = next((each for each in arguments if isinstance(each, RunLog)), None)

    async def run(self) -> None:
        if self.log is not None:
            self.log.hold(0)


async def no_pools() -> None:
    return None


def test_a_run_whose_report_could_not_be_written_has_no_summary_and_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = RunConfig.model_validate({"name": "a", "output_dir": str(tmp_path), "world": {}})
    for name in ("Stages", "Coordinator"):
        monkeypatch.setattr(reinforcement, name, Instant)
    monkeypatch.setattr(reinforcement, "training_data", lambda config, stages: None)
    monkeypatch.setattr(reinforcement, "write_report", fail)

    def run() -> None:
        cluster: Any = SimpleNamespace(pools=no_pools)
        asyncio.run(reinforcement.run_to_the_end(config, cluster, lambda state: None))

    with pytest.raises(OSError, match="No space left"):
        run()
    assert (config.run_dir / "metrics.jsonl").stat().st_size > 0
    assert not (config.run_dir / "summary.json").exists()
    monkeypatch.setattr(reinforcement, "write_report", lambda run_dir: run_dir)
    (config.run_dir / "metrics.jsonl").unlink()
    run()
    assert (config.run_dir / "summary.json").exists()
