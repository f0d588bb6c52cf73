"""A study's driver: which runs begin, which are left alone. Ray and the runs themselves are stand-ins."""

import json
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
from ocrm_ray.progress import ProgressState

JUDGE = {"kind": "judge", "base_url": "http://h", "model_name": "m"}
STUDY = StudyConfig.model_validate(
    {"name": "s", "base": {"world": {}}, "arms": {"a": {}, "b": {}}, "seeds": [1, 2], "arm_seeds": {"b": [2]}}
)


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that begin, in the current directory; each leaves a finished run's files, the third fails."""
    names: list[str] = []

    async def run(
        runs: list[tuple[str, RunConfig]], shared_memory: Path, display: object, report: Callable[[], object]
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
    def session(name: str) -> Iterator[Path]:
        yield tmp_path

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "_run", run)
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


def test_with_several_jobs_only_unfinished_runs_are_given_to_processes(
    begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[str, int]] = []

    def side_by_side(runs: list[tuple[str, int, RunConfig]], num_jobs: int, report: object) -> None:
        assert num_jobs == 2
        for arm, seed, config in runs:
            given.append((arm, seed))
            write_run(config.run_dir, Shape(num_updates=20))

    monkeypatch.setattr(launcher, "run_side_by_side", side_by_side)
    write_run(Path("runs/s/a/seed-2"), Shape(num_updates=20))
    launcher.run_study(STUDY, 2)
    assert given == [("a", 1), ("b", 2)]
    assert begun == []


class Coordinator:
    """The coordinator's pool and its one actor; ``summaries``: what its runs give."""

    def __init__(self, summaries: list[dict[str, object] | None]) -> None:
        self.actors, self.summaries = [self], summaries
        self.told: list[str] = []

    async def start_in(self, share: object, specs: list[ActorSpec], deadlines: object) -> "Coordinator":
        assert [spec.secrets for spec in specs] == [("FIRST_KEY", "SECOND_KEY")]
        self.told.append("start")
        return self

    async def watch(
        self, method: str, config: RunConfig, *, tell: Callable[[ProgressState], None], deadline_s: float
    ) -> dict[str, object] | None:
        self.told.append(f"{method} {config.name}")
        tell(ProgressState(stage="rl"))
        return self.summaries.pop(0)

    async def close(self) -> None:
        self.told.append("close")


def given_to_one_coordinator(
    summaries: list[dict[str, object] | None], monkeypatch: pytest.MonkeyPatch
) -> tuple[Coordinator, list[tuple[str | None, str]], Callable[[], list[dict[str, object]]]]:
    """The coordinator, what is displayed, and the launch of three runs; a report counts as told, too."""
    coordinator, shown = Coordinator(summaries), []
    monkeypatch.setattr(launcher.CoordinatorPool, "start_in", coordinator.start_in)
    display: Any = SimpleNamespace(update=lambda state: shown.append((state.arm, state.stage)))
    keys = {"a": "FIRST_KEY", "b": "SECOND_KEY", "c": "FIRST_KEY"}
    runs = [
        (name, RunConfig.model_validate({"name": name, "world": {}, "gold": JUDGE | {"api_key_env": keys[name]}}))
        for name in keys
    ]
    report = lambda: coordinator.told.append("report")  # noqa: E731
    return coordinator, shown, lambda: launcher._run_in_turn(runs, Path("unused"), display, report)


def test_all_runs_of_a_study_are_one_coordinators_and_each_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator, shown, launch = given_to_one_coordinator([{"x": 1.0}, {"x": 2.0}, {"x": 3.0}], monkeypatch)
    assert launch() == [{"x": 1.0}, {"x": 2.0}, {"x": 3.0}]
    assert coordinator.told == ["start", "run a", "report", "run b", "report", "run c", "report", "close"]
    assert shown == [("a", "rl"), ("b", "rl"), ("c", "rl")]


def test_a_run_that_was_to_finish_is_the_last_and_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator, _, launch = given_to_one_coordinator([{"x": 1.0}, None], monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        launch()
    assert coordinator.told == ["start", "run a", "report", "run b", "close"]
