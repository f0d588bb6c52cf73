"""A study's driver: which runs begin, which are left alone. Ray and the runs themselves are stand-ins."""

import asyncio
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from synthetic_runs import Shape, write_run

from actors import launcher
from actors.remote_actor import ActorSpec
from ocrm_ray.checkpoints import forget_unsaved
from ocrm_ray.config import RunConfig, StudyConfig
from ocrm_ray.errors import RunError
from ocrm_ray.progress import ProgressState

JUDGE = {"kind": "judge", "base_url": "http://h", "model_name": "m"}
STUDY = StudyConfig.model_validate(
    {"name": "s", "base": {"world": {}}, "arms": {"a": {}, "b": {}}, "seeds": [1, 2], "arm_seeds": {"b": [2]}}
)


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that begin, in the current directory; each leaves a finished run's files, the third fails."""
    names: list[str] = []

    def run_all(
        runs: list[tuple[str, RunConfig]], shared_memory: Path, report: Callable[[], object], num_jobs: int
    ) -> list[dict[str, object]]:
        for arm, config in runs:
            assert config.run_dir.is_absolute()
            names.append(arm)
            if arm == "b seed 2" and len(names) == 3:
                config.run_dir.mkdir(parents=True)
                (config.run_dir / "metrics.jsonl").write_text('{"step": 0, "time_s": 0.1}\n')
                raise KeyboardInterrupt
            if config.run_dir.exists():
                forget_unsaved(config.run_dir)  # as every run does once it holds its folder
                config.run_dir.rmdir()
            write_run(config.run_dir, Shape(num_updates=20))
            report()
        return [{}] * len(runs)

    @contextmanager
    def session(name: str, num_runs: int) -> Iterator[Path]:
        yield tmp_path

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "_run_all", run_all)
    monkeypatch.setattr(launcher, "ray_session", session)
    return names


def test_a_run_with_its_summary_is_skipped_and_an_interrupted_one_begins_again(begun: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        launcher.run_study(STUDY)
    assert begun == ["a seed 1", "a seed 2", "b seed 2"]
    study = json.loads(Path("runs/s/study.json").read_text())
    assert [figures["missing_seeds"] for figures in study["arms"].values()] == [[], [2]]
    first = Path("runs/s/a/seed-1/metrics.jsonl")
    before = first.stat().st_mtime_ns
    said = launcher.run_study(STUDY)
    assert begun[3:] == ["b seed 2"]
    assert first.stat().st_mtime_ns == before
    assert said.endswith("report: runs/s/study.html")
    study = json.loads(Path("runs/s/study.json").read_text())
    assert [figures["missing_seeds"] for figures in study["arms"].values()] == [[], []]


def test_a_study_that_is_done_starts_no_ray_and_only_reports(begun: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arm, seed in (("a", 1), ("a", 2), ("b", 2)):
        write_run(Path(f"runs/s/{arm}/seed-{seed}"), Shape(num_updates=20))
    monkeypatch.setattr(launcher, "ray_session", None)
    assert "report: runs/s/study.html" in launcher.run_study(STUDY)
    assert begun == []


class Coordinators:
    """Stand-ins for the coordinators' actors; ``results``: by run, what it gives, or raises, once ``peers`` go on."""

    def __init__(self, results: dict[str, Any], peers: int) -> None:
        self.results, self.peers = results, peers
        self.told: list[str] = []
        self.begun, self.finished = asyncio.Event(), asyncio.Event()

    async def start_in(self, share: object, specs: list[ActorSpec], deadlines: object) -> SimpleNamespace:
        assert [spec.secrets for spec in specs] == [("FIRST_KEY", "SECOND_KEY")]
        self.told.append("start")
        return SimpleNamespace(actors=[self], close=self.close, deadlines=deadlines)

    async def watch(
        self, method: str, config: RunConfig, *, tell: Callable[[ProgressState], None], deadline_s: float
    ) -> dict[str, object] | None:
        self.told.append(f"{method} {config.name}")
        tell(ProgressState(stage="rl"))
        if sum(text.startswith(method) for text in self.told) >= self.peers:
            self.begun.set()
        await self.begun.wait()
        result = self.results[config.name]
        if isinstance(result, Exception):
            raise result
        if callable(result):
            return await result(self)  # type: ignore[no-any-return]
        for _ in range(5):  # turns of the loop, in which those that fail do so first
            await asyncio.sleep(0)
        self.told.append(f"{config.name} ends")
        return result  # type: ignore[no-any-return]

    async def call(self, method: str, deadline_s: float) -> None:
        self.told.append(method)
        self.finished.set()

    async def close(self) -> None:
        self.told.append("close")


def launch(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch, num_jobs: int = 1
) -> tuple[list[str], Callable[[], list[dict[str, object]]]]:
    """What is told, and the launch of the runs a, b and c."""
    coordinators = Coordinators(results, num_jobs)
    monkeypatch.setattr(launcher.CoordinatorPool, "start_in", coordinators.start_in)
    keys = {"a": "FIRST_KEY", "b": "SECOND_KEY", "c": "FIRST_KEY"}
    runs = [
        (name, RunConfig.model_validate({"name": name, "world": {}, "gold": JUDGE | {"api_key_env": key}}))
        for name, key in keys.items()
    ]
    told = coordinators.told
    return told, lambda: launcher._run_all(runs, Path("unused"), lambda: told.append("report"), num_jobs)


def test_all_runs_of_a_study_are_one_coordinators_and_each_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told, run_all = launch({"a": {"x": 1.0}, "b": {"x": 2.0}, "c": {"x": 3.0}}, monkeypatch)
    assert run_all() == [{"x": 1.0}, {"x": 2.0}, {"x": 3.0}]
    of_each = [text for name in "abc" for text in (f"run {name}", f"{name} ends", "report")]
    assert told == ["start", *of_each, "close"]
    assert [f"{name} · rl" in line for name, line in zip("abc", capsys.readouterr().err.splitlines(), strict=True)]


def test_as_many_runs_go_on_at_once_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    told, run_all = launch({"a": {"x": 1.0}, "b": {"x": 2.0}, "c": {"x": 3.0}}, monkeypatch, num_jobs=2)
    assert len(run_all()) == 3
    assert told[:4] == ["start", "start", "run a", "run b"]
    assert told.count("report") == 3
    assert told[-2:] == ["close", "close"]


def test_after_a_failure_no_run_begins_and_those_under_way_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told, run_all = launch({"a": RunError("no room"), "b": {"x": 2.0}, "c": {}}, monkeypatch, num_jobs=2)
    with pytest.raises(RunError, match="no room"):
        run_all()
    assert told == ["start", "start", "run a", "run b", "b ends", "report", "close", "close"]
    assert "a failed: no room" in capsys.readouterr().err


def test_a_run_that_was_to_finish_is_the_last_and_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    told, run_all = launch({"a": {"x": 1.0}, "b": None}, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run_all()
    assert told == ["start", "run a", "a ends", "report", "run b", "b ends", "close"]


async def interrupted(coordinator: Coordinators) -> None:
    """A run that gets Ctrl-C and ends behind its update, having been told."""
    signal.raise_signal(signal.SIGINT)
    await coordinator.finished.wait()
    coordinator.told.append("checkpoint")


async def interrupted_twice(coordinator: Coordinators) -> None:
    signal.raise_signal(signal.SIGINT)
    await coordinator.finished.wait()
    signal.raise_signal(signal.SIGINT)
    await asyncio.Event().wait()


def test_the_first_signal_has_the_run_finish_its_update_and_no_other_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told, run_all = launch({"a": interrupted, "b": {"x": 1.0}, "c": {}}, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run_all()
    assert told == ["start", "run a", "finish", "checkpoint", "close"]
    assert "finishing this update, then a checkpoint; again to end now" in capsys.readouterr().err


def test_the_second_signal_ends_at_once_what_never_would_and_closes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told, run_all = launch({"a": interrupted_twice, "b": {}, "c": {}}, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run_all()
    assert told == ["start", "run a", "finish", "close"]
