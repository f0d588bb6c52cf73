"""Kills the processes of one run, role after role, and looks whether anything was lost.

    PYTHONPATH=. .venv/bin/python tests/chaos.py [--kills 30] [--seed 1] [--undisturbed 3] [--deterministic]
        [--folder FOLDER]

A two-node Ray cluster on loopback, of this machine's own processes, carries one run on the embedded world. Every few
updates a process gets SIGKILL while it works: an engine's worker, a generation actor, a scorer, the ratios' scorer, a
reward server, the refitter, the trainer, the evaluator, the coordinator, the driver (which is started again with
``--resume``), the second node's raylet (which is started again). Exit status 0 if the run reached its last update, each
prompt was trained on exactly once an epoch in the lineage that survived, and gold at the end is within the interval of
undisturbed runs on the same stages; else 1. With ``--deterministic`` there is no interval: the disturbed run must equal
each undisturbed one, in every figure of every update, those that were done again too, and in every weight at the end.
"""

import argparse
import contextlib
import json
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import psutil
import yaml
from kill_and_resume import differences

from ocrm_ray.run_files import read_run
from ocrm_ray.seed_statistics import student_quantile

ROOT = Path(__file__).parent.parent
LOOPBACK = "127.0.0.1"
POLL_S = 0.02
PATIENCE_S = 900.0
"""For a role to be seen at work, and for the next update."""
TITLES = {
    "engine": "VLLM::EngineCore",
    "generation": "ray::generation-",
    "scoring": "ray::scoring-",
    "ratios": "ray::ratios",
    "reward": "ray::reward-",
    "refit": "ray::refit",
    "policy": "ray::policy-",
    "evaluation": "ray::evaluation-",
    "coordinator": "ray::coordinator",
}
"""What the title of a role's process begins with while it works."""
WORLD: dict[str, Any] = {
    "world": {"kind": "praise", "num_prompts": 400},
    "data": {"num_heldout": 48},
    "sft": {"num_epochs": 2},
    "pairs": {"num_pairs": 1000},
    "reward": {"num_calibration": 128},
    "rollout": {"prompts_per_step": 8, "samples_per_prompt": 4, "max_new_tokens": 13},
    "correction": {"every": 5, "promote_after": 3, "kl_reference": "moving"},
    "checkpoint": {"every": 4},
    "evaluation": {"every": 10, "num_prompts": 48, "num_pair_prompts": 16, "num_samples_saved": 4},
    "faults": {"max_replacements": 1000, "max_restarts": 1000},
    "deadlines": {"request_s": 300, "start_s": 300},
    "lease": {"heartbeat_s": 0.5, "num_missed": 6},
}
DETERMINISTIC = {
    "deterministic": True,
    "rollout": WORLD["rollout"] | {"max_staleness": 0},
    "pools": {"generation": {"max_running": 1}},
}
"""What the mode needs beside ``WORLD``."""


class Nodes:
    """A cluster of raylets on loopback for drivers to connect to; of none, a driver starts its own Ray.

    ``resources``: what each node has beside its CPUs.
    """

    def __init__(self, folder: Path, resources: Sequence[dict[str, float]]) -> None:
        self.environment: dict[str, str] = {}
        self._resources = resources
        self._started: list[Any] = []
        if not resources:
            return
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ.update(token | {"RAY_TMPDIR": str(folder)})  # Ray reads them when it is imported
        (folder / "ray").mkdir()
        from ray._private import ray_constants
        from ray.cluster_utils import Cluster

        ray_constants.ENABLE_RAY_CLUSTER = False  # as actors.session: else 127.0.0.1 becomes another address
        self._cluster = Cluster()
        for of_node in resources:
            self._add(of_node)
        self.environment = token | {"RAY_ADDRESS": self._cluster.address}

    @property
    def raylets(self) -> list[int]:
        """Their process ids, the newest last."""
        return [node.all_processes["raylet"][0].process.pid for node in self._started]

    def replace_last(self) -> None:
        """SIGKILL for the newest raylet and all its processes; then a node like it."""
        end(tree(self.raylets[-1]))
        self._add(self._resources[-1])

    def actors(self) -> list[tuple[str, dict[str, float]]]:
        """Every actor that there was, by Ray's own state: its role, and the resources of its node."""
        from ray.core.generated.gcs_pb2 import ActorTableData

        state = self._cluster.global_state
        nodes = {node["NodeID"]: node["Resources"] for node in state.node_table()}
        table = [
            ActorTableData.FromString(row) for row in state._connect_and_get_accessor().get_actor_table(None, None)
        ]
        return [(actor.repr_name, nodes[actor.address.node_id.hex()]) for actor in table]

    def stop(self) -> None:
        for node in reversed(self._started):
            node.kill_all_processes(check_alive=False, allow_graceful=False)

    def _add(self, resources: dict[str, float]) -> None:
        settings = {"num_cpus": 2, "node_ip_address": LOOPBACK, "resources": resources}
        head = {} if self._started else {"include_dashboard": False}
        self._started.append(self._cluster.add_node(**settings, **head))


@dataclass
class Driver:
    """``ocrm-ray run``, again and again until it is done."""

    config: Path
    run_dir: Path
    nodes: Nodes
    process: "subprocess.Popen[bytes] | None" = None
    num_starts: int = 0
    started_s: float = 0.0

    def start(self) -> None:
        self.num_starts += 1
        self.started_s = time.monotonic()
        command = [sys.executable, "-m", "ocrm_ray", "run", "--resume", str(self.config)]
        with (self.config.parent / "driver.log").open("ab") as log:
            environment = {**environment_of_runs(), **self.nodes.environment}
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def keep_going(self) -> bool:
        """Start it again if it has ended too soon; False once the run is done."""
        if (self.run_dir / "summary.json").exists():
            return False
        if self.process is None or self.process.poll() is not None:
            self.start()
        return True

    def num_steps(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return len((self.run_dir / "metrics.jsonl").read_bytes().splitlines())
        return 0

    def processes(self) -> list[psutil.Process]:
        """Of the driver, and of the cluster that it has or uses."""
        pids = self.nodes.raylets + ([self.process.pid] if self.process else [])
        return [process for pid in pids for process in tree(pid)]


def environment_of_runs() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}


def tree(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait_for(what: str, found: Callable[[], Any], driver: Driver) -> Any:
    """The first true answer; None once the run is done. TimeoutError if it does not come."""
    give_up = time.monotonic() + PATIENCE_S
    while not (answer := found()):
        if not driver.keep_going():
            return None
        if time.monotonic() > give_up:
            raise TimeoutError(f"no {what} within {PATIENCE_S:g} s")
        time.sleep(POLL_S)
    return answer


def at_work(role: str, driver: Driver) -> list[psutil.Process]:
    return [process for process in driver.processes() if title(process).startswith(TITLES[role])]


def kill(role: str, driver: Driver) -> bool:
    """SIGKILL for a process of the role, at work; False where the run was done before."""
    if role == "driver":
        assert driver.process is not None
        coordinators = at_work("coordinator", driver)
        driver.process.kill()
        driver.process.wait()
        # ends by itself; until then its lines could be taken for those of the run that goes on
        psutil.wait_procs(coordinators, timeout=PATIENCE_S)
        return True
    if role == "raylet":
        driver.nodes.replace_last()
        return True
    victims = wait_for(f"process of {role} at work", lambda: at_work(role, driver), driver)
    if victims is None:
        return False
    victims[0].kill()
    return True


def disturb(driver: Driver, roles: list[str], every: int) -> list[str]:
    """Kill one role after another, ``every`` lines of metrics apart, then wait for the end; what was killed.

    Says of each how many seconds later the next update was done: with one that was under way already, or by others.
    """
    killed: list[str] = []
    for role in roles:
        goal = driver.num_steps() + every
        if not wait_for("progress", lambda goal=goal: driver.num_steps() >= goal, driver) or not kill(role, driver):
            break
        killed.append(role)
        killed_at, num_steps = time.monotonic(), driver.num_steps()
        wait_for("update", lambda goal=num_steps: driver.num_steps() > goal, driver)
        now = time.monotonic()
        since = f", {now - driver.started_s:.1f} s after --resume" if driver.started_s > killed_at else ""
        line = f"{len(killed):3d}. {role:12s} after {num_steps} lines, next {now - killed_at:5.1f} s later{since}"
        print(line, flush=True)
    give_up = time.monotonic() + PATIENCE_S
    while driver.keep_going():
        if time.monotonic() > give_up:
            raise TimeoutError("the run does not come to its end")
        time.sleep(0.2)
    if driver.process is not None:
        driver.process.wait(timeout=120)
    return killed


def losses(run_dir: Path, config: dict[str, Any]) -> list[str]:
    """What is wrong with the lineage that survived."""
    rows = [row for row in read_run(run_dir).metrics if row["step"] > 0]
    num_updates, batch = config["policy"]["num_updates"], config["rollout"]["prompts_per_step"]
    found = []
    if [row["step"] for row in rows] != list(range(1, num_updates + 1)):
        found.append(f"steps {[row['step'] for row in rows]}")
    trained = sorted(number for row in rows for number in row["rollouts"])
    if trained != list(range(num_updates * batch)):
        found.append(f"{len(set(trained))} different rollouts among {len(trained)}, not {num_updates * batch} in order")
    return found


def seconds_of(event: str, run_dir: Path) -> dict[str, list[float]]:
    """What an event tells of actors that were found dead, by role."""
    found: dict[str, list[float]] = {}
    for row in read_run(run_dir).events:
        if row["event"] == event:
            found.setdefault(row["actor"], []).append(row["seconds"])
    return found


def gold_of(run_dir: Path) -> float:
    return float(json.loads((run_dir / "summary.json").read_text())["gold_mean"])


@contextlib.contextmanager
def driven(folder: Path, name: str, config: dict[str, Any], nodes: Sequence[dict[str, float]] = ()) -> Iterator[Driver]:
    """A driver over nodes with these resources; at the end nothing of either is left."""
    path = folder / f"{name}.yaml"
    tree_ = config | {"name": name, "output_dir": str(folder / "runs"), "stages_dir": str(folder / "stages")}
    path.write_text(yaml.safe_dump(tree_))
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp") as short:  # sockets have short paths
        cluster = Nodes(Path(short), nodes)
        driver = Driver(path, folder / "runs" / name, cluster)
        try:
            yield driver
        finally:
            end(driver.processes())
            cluster.stop()


def calm_golds(folder: Path, config: dict[str, Any], num_runs: int) -> list[float]:
    """Gold at the end of undisturbed runs on one node, those that are there already not run again."""
    golds = []
    for number in range(num_runs):
        with driven(folder, f"calm-{number}", config) as driver:
            disturb(driver, [], every=1)
            golds.append(gold_of(driver.run_dir))
    return golds


def unlike(gold: float, golds: Sequence[float]) -> list[str]:
    """What is wrong with gold if it is not within Student's interval, 95 %, of one more run like the others."""
    if len(golds) < 2:
        return []
    spread = student_quantile(len(golds) - 1) * stdev(golds) * (1 + 1 / len(golds)) ** 0.5
    print(f"gold {gold:.3f}; others {fmean(golds):.3f} +- {spread:.3f}: {[round(each, 3) for each in golds]}")
    return [f"gold {gold:.3f} is not like that of the others"] if abs(gold - fmean(golds)) > spread else []


def draw_roles(num_kills: int, num_nodes: int, seed: int) -> list[str]:
    """Every role as often as the others, in an order drawn for each round."""
    roles = [*TITLES, "driver", *(["raylet"] if num_nodes > 1 else [])]
    drawn, generator = [], random.Random(seed)
    while len(drawn) < num_kills:
        drawn += generator.sample(roles, len(roles))
    return drawn[:num_kills]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--undisturbed", type=int, default=3, help="runs that gold is compared with")
    parser.add_argument("--every", type=int, default=5, help="updates between two kills")
    parser.add_argument("--deterministic", action="store_true", help="the runs must be equal, bit for bit")
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    num_updates = arguments.kills * (arguments.every + 4) + 10  # some go by until the next victim is at work
    config = WORLD | {"policy": {"num_updates": num_updates}} | (DETERMINISTIC if arguments.deterministic else {})
    golds, runs = calm_golds(folder, config, arguments.undisturbed), folder / "runs"
    with driven(folder, "chaos", config, [{}, {}]) as driver:
        started = time.monotonic()
        killed = disturb(driver, draw_roles(arguments.kills, 2, arguments.seed), arguments.every)
        found = losses(driver.run_dir, config)
        gold = gold_of(driver.run_dir)
        told = {"actor_restarted": "another process after", "engine_answers": "next finished rollout after"}
        for event, what in told.items():
            for role, seconds in seconds_of(event, driver.run_dir).items():
                print(f"{role}: {what} {', '.join(f'{each:.1f}' for each in seconds)} s")
        print(f"{len(killed)} kills, {driver.num_starts} starts of the driver, {time.monotonic() - started:.0f} s")
    if len(killed) < arguments.kills:
        found.append(f"only {len(killed)} of {arguments.kills} kills before the run was done")
    if arguments.deterministic:
        found += [line for number in range(len(golds)) for line in differences(runs / f"calm-{number}", runs / "chaos")]
    else:
        found += unlike(gold, golds)
    print("\n".join(found[:20]) or "nothing was lost")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
