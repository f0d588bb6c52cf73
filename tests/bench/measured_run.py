"""A run of ocrm-ray under observation: what its files say, and what memory and processor time each role used.

The benches that import this run with ``PYTHONPATH=.`` from the root of the repository.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from peak_memory import pss_bytes

from ocrm_ray.run_files import Row, Run, read_run

ROOT = Path(__file__).resolve().parents[2]
OTHERS = "Ray itself"
ENDED_S = 30.0
"""For processes to be gone after the program that started them."""
SHARED_MEMORY = Path("/dev/shm")
FEW_EVALUATIONS = {
    "evaluation.every": 10**6,
    "evaluation.num_prompts": 32,
    "evaluation.num_pair_prompts": 0,
    "evaluation.num_samples_saved": 0,
    "checkpoint.every": 10**6,
}
"""Only before the first update and after the last."""


def embedded_config() -> dict[str, Any]:
    """The base of the demo study: the praise world, 32 prompts x 4 samples of 13 tokens an update."""
    base: dict[str, Any] = yaml.safe_load((ROOT / "configs/study/demo.yaml").read_text())["base"]
    return base


def smollm2_config() -> dict[str, Any]:
    """SmolLM2-135M-Instruct on Alpaca prompts: 8 prompts x 4 samples of up to 48 tokens an update, bfloat16."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs/smollm2-alpaca.yaml").read_text())
    return config


@dataclass(slots=True)
class ProcessState:
    """What was last seen of a process; PSS in bytes (None: not measured), processor time in seconds."""

    role: str
    cpu_s: float
    pss: int | None = None
    peak_rss: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """All processes at one moment (seconds since the epoch), summed up by role; ended ones keep their CPU seconds."""

    time_s: float
    cpu_s: Mapping[str, float]
    pss: Mapping[str, int]


class Watch(threading.Thread):
    """Samples a process and all its descendants until told to stop; every ``pss_every``-th time also what takes
    the kernel longer: their PSS, and what they have mapped of shared memory."""

    def __init__(self, pid: int, interval_s: float = 0.5, pss_every: int = 10) -> None:
        super().__init__(daemon=True)
        self.samples: list[Sample] = []
        self.seen: dict[psutil.Process, ProcessState] = {}
        self.shared_inodes: set[int] = set()
        self._root = psutil.Process(pid)
        self._interval_s, self._pss_every = interval_s, pss_every
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(self._interval_s) and self._root.is_running():
            self._sample(with_pss=len(self.samples) % self._pss_every == 0)

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def peak_rss(self, role: str) -> int:
        """Largest resident set that any process of the role ever had, in bytes (the kernel's VmHWM)."""
        return max((state.peak_rss for state in self.seen.values() if state.role == role), default=0)

    def peak_pss(self) -> int:
        """Largest sum over all processes, in bytes."""
        return max((sum(sample.pss.values()) for sample in self.samples), default=0)

    def cpu_s(self, times_s: Sequence[float], roles: Sequence[str] | None = None) -> np.ndarray[Any, Any]:
        """CPU seconds used by ``roles`` (None: all) up to each moment."""
        used = [sum(s for role, s in x.cpu_s.items() if roles is None or role in roles) for x in self.samples]
        return np.interp(times_s, [x.time_s for x in self.samples], used)

    def survivors(self, deadline_s: float) -> list[psutil.Process]:
        """Processes once seen that still run ``deadline_s`` from now; returns as soon as there are none."""
        alive = list(self.seen)
        until = time.monotonic() + deadline_s
        while (alive := [process for process in alive if _runs(process)]) and time.monotonic() < until:
            time.sleep(0.2)
        return alive

    def left_in_shared_memory(self) -> list[str]:
        """Files that these processes had mapped and that are still there."""
        files = [path for path in SHARED_MEMORY.rglob("*") if path.is_file()]
        return sorted(str(path) for path in files if path.stat().st_ino in self.shared_inodes)

    def _sample(self, *, with_pss: bool) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [self._root, *self._root.children(recursive=True)]:
                self._look(process, with_pss)
        cpu_s: dict[str, float] = {}
        pss: dict[str, int] = {}
        for process, state in self.seen.items():
            cpu_s[state.role] = cpu_s.get(state.role, 0.0) + state.cpu_s
            if with_pss and state.pss and _runs(process):
                pss[state.role] = pss.get(state.role, 0) + state.pss
        self.samples.append(Sample(time.time(), cpu_s, pss))

    def _look(self, process: psutil.Process, with_pss: bool) -> None:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            known = self.seen.get(process)
            role = known.role if known and known.role != OTHERS else self._role(process)
            times = process.cpu_times()
            status = Path(f"/proc/{process.pid}/status").read_text().split("\n")  # a zombie's is without memory
            peaks = [int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM")]
            if with_pss:
                maps = Path(f"/proc/{process.pid}/maps").read_text().split("\n")
                self.shared_inodes.update(int(line.split()[4]) for line in maps if f" {SHARED_MEMORY}/" in line)
            self.seen[process] = ProcessState(
                role=role,
                cpu_s=times.user + times.system,
                pss=pss_bytes(process) if with_pss else known and known.pss,
                peak_rss=max([*peaks, known.peak_rss if known else 0]),
            )

    def _role(self, process: psutil.Process) -> str:
        """An actor's name as Ray writes it at the head of its log, which the actor's own children inherit."""
        if process == self._root:
            return "driver"
        for stream in (1, 2):
            log = Path(os.readlink(f"/proc/{process.pid}/fd/{stream}"))
            if not log.name.startswith("worker-"):
                continue
            with log.open(errors="replace") as lines:
                names = [line.split(":")[2].strip() for line in lines if line.startswith(":actor_name:")]
            if len(names) > 1:  # the first is its class
                return names[1] + ("" if log.stem.endswith(f"-{process.pid}") else " child")
        return OTHERS


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@dataclass(frozen=True)
class MeasuredRun:
    """A finished run: its files, its processes, its exit status and when (since the epoch) its RL began."""

    run: Run
    watch: Watch
    status: int
    began_s: float

    def steady(self, num_warmup: int) -> list[Row]:
        """Lines of the updates behind the first ``num_warmup``."""
        return [row for row in self.run.metrics if row["step"] > num_warmup]


@dataclass
class Launch:
    """A configuration in a folder, ready to be run; ``overrides`` are dotted keys."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    pss_every: int = 10
    stages: Path | None = None
    """Where stages are, or will be; None: in ``folder``."""

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / self.name

    @property
    def command(self) -> list[str]:
        path = self.folder / f"{self.name}.yaml"
        shared = {"output_dir": str(self.folder / "runs"), "stages_dir": str(self.stages or self.folder / "stages")}
        path.write_text(yaml.safe_dump({**self.config, **shared, "name": self.name}))
        changes = [f"{key}={json.dumps(value)}" for key, value in self.overrides.items()]
        return [sys.executable, "-m", "ocrm_ray", "run", str(path), *changes]

    @contextlib.contextmanager
    def started(self) -> Iterator[tuple["subprocess.Popen[bytes]", Watch]]:
        """The program, in a process group of its own, and its watch; on leaving, both are ended."""
        with (self.folder / f"{self.name}.log").open("wb") as log:
            program = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            watch = Watch(program.pid, pss_every=self.pss_every)
            watch.start()
            try:
                yield program, watch
            finally:
                if program.poll() is None:
                    os.killpg(program.pid, signal.SIGINT)
                    program.wait()
                watch.stop()

    def measure(self) -> MeasuredRun:
        """Run to the end. SystemExit, with the end of what it printed, where it fails."""
        note(f"{self.name}: {' '.join(f'{key}={value}' for key, value in self.overrides.items())}")
        with self.started() as (program, watch):
            status = program.wait()
        if status != 0:
            sys.exit(f"{self.name} ended with {status}:\n{(self.folder / f'{self.name}.log').read_text()[-3000:]}")
        run = read_run(self.run_dir)
        began_s = (self.run_dir / "events.jsonl").stat().st_mtime - run.events[-1]["time_s"]
        return MeasuredRun(run, watch, status, began_s)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the option that all benches on the embedded model have."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--stages", type=Path, help="keep the embedded world's stages there, and use them again")
    return parser


def mean_of(rows: Sequence[Row], key: str, part: str | None = None) -> float:
    """Mean of a key over metrics lines, or of a part of a nested one."""
    return statistics.fmean(row[key] if part is None else row[key][part] for row in rows)


def updates_per_s(rows: Sequence[Row]) -> float:
    return len(rows) / sum(row["step_s"] for row in rows)


def step_seconds(rows: Sequence[Row]) -> list[tuple[str, float]]:
    """(name, mean seconds a step) of stages, which overlap, and of waits, which do not; (name, share) of idle pools."""
    stages = [(f"{name}, busy s", mean_of(rows, "stage_s", name)) for name in rows[0]["stage_s"]]
    waits = [
        (f"{key.removesuffix('_s').replace('_', ' ')}, s", mean_of(rows, key))
        for key, value in rows[0].items()
        if key.endswith("_wait_s") and value is not None
    ]
    idle = [(f"{name}, idle share", mean_of(rows, "idle_share", name)) for name in rows[0]["idle_share"]]
    return stages + waits + idle


def note(text: str) -> None:
    """Progress, on stderr: the table stands alone on stdout."""
    print(text, file=sys.stderr, flush=True)


def table(title: str, rows: Sequence[Sequence[object]]) -> None:
    """Print rows, the first of which is the header, in aligned columns; a row of one cell is a heading."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells if len(row) > max(i, 1)) for i in range(max(map(len, cells)))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() if row[1:] else row[0]
        for row in cells
    ]
    print("\n".join([title, "", lines[0], "-" * max(map(len, lines)), *lines[1:]]))
