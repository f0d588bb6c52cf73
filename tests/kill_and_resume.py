"""Kills one deterministic run at every awkward point, resumes it each time, and compares it with an uninterrupted one.

    python tests/kill_and_resume.py FOLDER [--points NAME ...]

Each point is seen in the run's files: then the driver and the coordinator get SIGKILL, and the run is resumed until the
next point. Compared are every line of metrics.jsonl but its times, those of steps that were done again too, and the
tensors of the last policy. Exit status 1 if anything differs or a point was not met. A finished uninterrupted run in
FOLDER is used again. Two cores take about ten minutes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
NUM_TRAINING, BATCH = 24, 5
RUN: dict[str, Any] = {
    "deterministic": True,
    "world": {"kind": "praise", "num_prompts": NUM_TRAINING + 12},
    "data": {"num_heldout": 12},
    "sft": {"num_epochs": 4},
    "pairs": {"num_pairs": 120},
    "reward": {"num_calibration": 32},
    "rollout": {"prompts_per_step": BATCH, "samples_per_prompt": 2, "max_new_tokens": 13, "max_staleness": 0},
    "policy": {"num_updates": 24, "algorithm": "ppo"},
    "correction": {"every": 4, "promote_after": 2, "kl_reference": "moving", "critic_on_promote": "reinit"},
    "checkpoint": {"every": 3},
    "evaluation": {"every": 4, "num_prompts": 12, "num_pair_prompts": 4, "num_samples_saved": 2},
    "pools": {"generation": {"max_running": 1, "kv_cache_gib": 0.25}},
    "lease": {"heartbeat_s": 0.5, "num_missed": 4},
}
"""A world so small that an epoch of its prompts ends in every fifth step; a dead run's folder is free after 2 s."""
TIMES = {"time_s", "step_s", "stage_s", "idle_share"}
TIMES |= {"rollout_wait_s", "correction_wait_s", "publish_wait_s", "straggler_wait_s"}
CORRECTION = ("correction_started", "ratios_scored", "refit_finished", "promoted")
POLL_S = 0.01
DEADLINE_S = 1800.0
"""Of a run, or until it has met a point."""


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Of a JSON Lines file that is written to: what ends with a newline."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


@dataclass
class Watch:
    """What a run has written since it was started or resumed."""

    run_dir: Path

    def __post_init__(self) -> None:
        self._num_steps, self._num_events = len(self._rows("metrics")), len(self._rows("events"))
        self._partial = self._partials()

    @property
    def step(self) -> int:
        """Of the last line, this time's or an earlier one."""
        return max((row["step"] for row in self._rows("metrics")[-1:]), default=0)

    @property
    def new_step(self) -> int:
        """Of the last line of this time; 0 without any."""
        return self.step if len(self._rows("metrics")) > self._num_steps else 0

    @property
    def new_partials(self) -> set[Path]:
        """Folders of checkpoints that are being written."""
        return self._partials() - self._partial

    def is_at(self, event: str) -> bool:
        """Whether the correction in flight has come so far and no further."""
        names = [row["event"] for row in self._rows("events")[self._num_events :] if row["event"] in CORRECTION]
        return names[-1:] == [event]

    def _rows(self, name: str) -> list[dict[str, Any]]:
        return rows_of(self.run_dir / f"{name}.jsonl")

    def _partials(self) -> set[Path]:
        return set((self.run_dir / "checkpoints").glob(".step-*.partial"))


def ends_epoch(step: int) -> bool:
    """Whether an epoch ends in the prompts of update ``step``."""
    return step * BATCH // NUM_TRAINING > (step - 1) * BATCH // NUM_TRAINING


POINTS: dict[str, tuple[int, Callable[[Watch], bool]]] = {
    "mid-epoch": (4, lambda watch: watch.new_step * BATCH % NUM_TRAINING >= 2 * BATCH),
    "ratio scoring": (7, lambda watch: watch.is_at("correction_started")),
    "epoch boundary": (10, lambda watch: watch.new_step > 0 and ends_epoch(watch.new_step)),
    "refit": (11, lambda watch: watch.is_at("ratios_scored")),
    "before promotion": (15, lambda watch: watch.is_at("refit_finished")),
    "publish": (17, lambda watch: watch.new_step > 0),
    "checkpoint write": (20, lambda watch: bool(watch.new_partials)),
}
"""The step from which a point is looked for, and whether the run is there: right behind a line a publish goes on."""


def start(config: dict[str, Any], resume: bool) -> "subprocess.Popen[str]":
    """The program in a process of its own, over the configuration's own folder; its output goes to a file there."""
    folder = Path(config["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config['name']}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "ocrm_ray", "run", str(path), *(["--resume"] if resume else [])]
    with path.with_suffix(".log").open("a") as log:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True)


def finish(config: dict[str, Any], resume: bool) -> None:
    """Run to the end."""
    require_success(config, start(config, resume).wait(DEADLINE_S))


def require_success(config: dict[str, Any], status: int) -> None:
    """RuntimeError if the run ended with another status than 0."""
    if status:
        raise RuntimeError(f"the run ended with status {status}: {Path(config['output_dir']) / config['name']}.log")


def kill_at(config: dict[str, Any], resume: bool, first_step: int, is_there: Callable[[Watch], bool]) -> bool:
    """Start or resume the run and kill it as soon as it ``is_there``, from ``first_step`` on; False if it ended."""
    run_dir = Path(config["output_dir"]) / config["name"]
    watch, driver, until = Watch(run_dir), start(config, resume), time.monotonic() + DEADLINE_S
    try:
        while not (watch.step >= first_step and is_there(watch)):
            if (status := driver.poll()) is not None:
                require_success(config, status)
                return False
            if time.monotonic() > until:
                raise TimeoutError(f"not there after {DEADLINE_S:g} s")
            time.sleep(POLL_S)
    except BaseException:
        driver.terminate()
        raise
    coordinator = json.loads((run_dir / "lease.json").read_bytes())["pid"]
    for process in (driver.pid, coordinator):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    driver.wait()
    return True


def differences(whole: Path, other: Path) -> Iterator[str]:
    """Of two run folders: where lines of ``other``'s metrics or its last policy are not those of ``whole``."""
    from safetensors.torch import load_file

    expected = {row["step"]: row for row in rows_of(whole / "metrics.jsonl")}
    rows = rows_of(other / "metrics.jsonl")
    for row in rows:
        for name in sorted(row.keys() - TIMES):
            if row[name] != expected[row["step"]][name]:
                yield f"step {row['step']}: {name} is {row[name]}, not {expected[row['step']][name]}"
    if missing := expected.keys() - {row["step"] for row in rows}:
        yield f"no line of steps {sorted(missing)}"
    policy, found = (load_file(folder / "policy" / "model.safetensors") for folder in (whole, other))
    for name in policy:
        if not bool((policy[name] == found[name]).all()):
            yield f"policy: {name} differs"


def main(folder: Path, points: Sequence[str]) -> int:
    shared = {"output_dir": str(folder.resolve()), "stages_dir": str(folder.resolve() / "stages")}
    whole, killed = ({"name": name, **shared, **RUN} for name in ("whole", "killed"))
    if (folder / "killed" / "metrics.jsonl").exists():
        sys.exit(f"{folder / 'killed'} is there already: remove it")
    finish(whole, resume=(folder / "whole").exists())
    all_met, resume = True, False
    print(f"{'killed':18} {'at step':>8} {'goes on behind':>15} {'seconds to there':>17}", flush=True)
    for point in points:
        started = time.monotonic()
        is_met = kill_at(killed, resume, *POINTS[point])
        steps = [row["step"] for row in rows_of(folder / "killed" / "metrics.jsonl")]
        saved = [int(path.name.removeprefix("step-")) for path in (folder / "killed" / "checkpoints").glob("step-*")]
        seen = f"{steps[-1] if steps else 0:8} {max(saved, default=0):15}" if is_met else "not met".rjust(8 + 16)
        print(f"{point:18} {seen} {time.monotonic() - started:17.1f}", flush=True)
        all_met, resume = all_met and is_met, True
    finish(killed, resume)
    found = list(differences(folder / "whole", folder / "killed"))
    num_lines = len(rows_of(folder / "killed" / "metrics.jsonl"))
    print(f"{num_lines} lines of metrics and the last policy: {'equal' if not found else 'NOT EQUAL'}")
    for difference in found[:20]:
        print(difference)
    return int(bool(found) or not all_met)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the two runs and their stages go")
    parser.add_argument("--points", nargs="+", choices=POINTS, default=list(POINTS), help="instead of all of them")
    arguments = parser.parse_args()
    sys.exit(main(arguments.folder, arguments.points))
