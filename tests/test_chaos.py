"""A few of the kills of ``chaos.py``, which has the whole program."""

from pathlib import Path

import pytest
from chaos import WORLD, disturb, driven, losses

from ocrm_ray.run_files import read_run

pytestmark = pytest.mark.real


def test_after_the_death_of_engine_scorer_trainer_and_driver_no_prompt_is_lost_or_trained_on_twice(
    tmp_path: Path,
) -> None:
    config = WORLD | {"policy": {"num_updates": 26}}
    with driven(tmp_path, "few", config) as driver:
        killed = disturb(driver, ["engine", "scoring", "policy", "driver"], every=5)
        rows = read_run(driver.run_dir).events
    assert killed == ["engine", "scoring", "policy", "driver"]
    assert losses(driver.run_dir, config) == []
    assert [row["actor"] for row in rows if row["event"] == "actor_restarted"] == ["generation-0", "scoring-0"]
    resumed = [row["restarts"] for row in rows if row["event"] == "resumed"]
    assert [len(restarts) for restarts in resumed] == [1, 0]
    assert "policy-0" in resumed[0][0]
