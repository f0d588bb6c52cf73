"""What the cluster's actors are given to start with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import tiny_run

from actors import ray_cluster
from actors.ray_cluster import DETERMINISTIC, RayCluster
from actors.shared_group import StandingGroups

FIXED = {"deterministic": True, "rollout.max_staleness": 0, "correction.promote_after": 3}
PRODUCTS = """
import torch

torch.set_num_threads(1)

def placed(values, offset):
    room = torch.empty(values.numel() + 32)
    first = -(room.data_ptr() // 4) % 16 + offset
    return room[first : first + values.numel()].view(values.shape).copy_(values)

for rows, columns in ((1, 64), (3, 256), (8, 1), (200, 1)):
    x, weight = torch.randn(rows, 64), torch.randn(columns, 64)
    found = {(placed(x, a) @ placed(weight, b).T).numpy().tobytes() for a in (0, 1, 5) for b in (0, 2, 3, 7)}
    assert len(found) == 1, (rows, columns)
"""


def environments(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> list[dict[str, str]]:
    """Of an actor with networks and of an engine."""
    monkeypatch.setattr(ray_cluster, "_num_nodes", lambda: 1)
    monkeypatch.setattr(ray_cluster, "context_length", lambda path, trust_remote_code: 128)
    config = tiny_run(output_dir=str(folder), **changes)
    cluster = RayCluster(config, folder, lambda kind, figures: None, StandingGroups(), None)
    return [dict(spec.environment) for spec in (*cluster._engines(), *cluster._specs("scoring"))]


def test_only_the_actors_of_a_deterministic_run_multiply_independently_of_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for found in environments(tmp_path, monkeypatch, **FIXED):
        assert found.items() >= DETERMINISTIC.items()
    assert not any(DETERMINISTIC.keys() & found.keys() for found in environments(tmp_path, monkeypatch))


def test_products_there_are_the_same_wherever_their_factors_lie() -> None:
    environment = {**os.environ, **DETERMINISTIC}
    done = subprocess.run([sys.executable, "-c", PRODUCTS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
