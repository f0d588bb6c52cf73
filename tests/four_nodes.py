"""One run over four raylets on loopback, every pool on a node of its own, compared with the same run on one node.

    PYTHONPATH=. .venv/bin/python tests/four_nodes.py [--single 3] [--folder FOLDER]

Two engines, two scorers, the policy on two ranks at ZeRO 3, refits on two at ZeRO 2. Then a rehearsal of 64 actors over
the same cluster, which prints how near the pipeline comes to its slowest pool. Exit status 0 if every actor was on its
pool's node, as Ray's own state has it, and gold at the end is within the interval of the runs on one node; else 1.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from chaos import ROOT, WORLD, Driver, calm_golds, disturb, driven, environment_of_runs, gold_of, unlike

NODES: list[dict[str, float]] = [{"train": 1}, {"generate": 1}, {"score": 1}, {"reward": 1}]
NODE_OF = {
    "policy": "train",
    "generation": "generate",
    "scoring": "score",
    "ratios": "score",
    "evaluation": "score",
    "reward": "reward",
    "refit": "reward",
}
NUM_ACTORS = {"policy": 2, "generation": 2, "scoring": 2, "ratios": 1, "evaluation": 1, "reward": 1, "refit": 2}
SINGLE: dict[str, Any] = WORLD | {"policy": {"num_updates": 40}}
SPREAD: dict[str, Any] = SINGLE | {
    "policy": {"num_updates": 40, "zero_stage": 3},
    "pools": {
        "policy": {"num_actors": 2, "resources": {"train": 0.01}},
        "generation": {"num_actors": 2, "kv_cache_gib": 0.25, "resources": {"generate": 0.01}},
        "scoring": {"num_actors": 2, "resources": {"score": 0.01}},
        "reward": {"num_refit_ranks": 2, "refit_zero_stage": 2, "resources": {"reward": 0.01}},
        "evaluation": {"resources": {"score": 0.01}},
    },
}
REHEARSED = (
    *("rollout.prompts_per_step=80", "rollout.max_staleness=2", "correction.every=5"),
    *("pools.generation.num_actors=40", "pools.policy.num_actors=8", "pools.scoring.num_actors=7"),
    *("pools.reward.num_actors=6", "pools.reward.num_refit_ranks=1"),
    "rehearsal={num_updates: 15, engine_slots: 2, generate: {item_s: 4, jitter: 0.02}, score: {item_s: 0.1},"
    " reward: {item_s: 0.05}, train: {item_s: 0.2}, ratio_s: 4, refit_s: 12, weights_gib: 0.5, pause_s: 0.02}",
)
"""40 engines, 8 ranks, 7 scorers and the ratios', 6 servers and the refitter, the evaluator: 64 actors."""


def misplaced(actors: list[tuple[str, dict[str, float]]]) -> list[str]:
    """Which roles were too few, or on another pool's node. Ranks that fit the first reward model are servers here."""
    found = []
    for kind, resource in NODE_OF.items():
        roles = {role: node for role, node in actors if role.partition("-")[0] == kind}
        if len(roles) < NUM_ACTORS[kind]:
            found.append(f"{sorted(roles)}: fewer than {NUM_ACTORS[kind]} of {kind}")
        found += [f"{role} was not on the node of {resource}" for role, node in roles.items() if resource not in node]
    return found


def rehearse(driver: Driver) -> int:
    """Over the driver's cluster; exit status."""
    command = [sys.executable, "-m", "ocrm_ray", "rehearse", str(driver.config), *REHEARSED]
    environment = environment_of_runs() | driver.nodes.environment
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--single", type=int, default=3, help="runs on one node that gold is compared with")
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="nodes-"))
    folder.mkdir(parents=True, exist_ok=True)
    golds = calm_golds(folder, SINGLE, arguments.single)
    with driven(folder, "spread", SPREAD, NODES) as driver:
        disturb(driver, [], every=1)
        found = misplaced(driver.nodes.actors()) + unlike(gold_of(driver.run_dir), golds)
        if driver.num_starts > 1:
            found.append(f"{driver.num_starts} starts of the driver: see {folder / 'driver.log'}")
        if rehearse(driver):
            found.append("the rehearsal failed")
    print("\n".join(found) or f"{sum(NUM_ACTORS.values())} actors, each on its pool's node")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
