"""A study's driver: which runs begin, which are left alone. Ray and the runs themselves are stand-ins."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from synthetic_runs import Shape, write_run

from actors import launcher
from ocrm_ray.checkpoints import forget_unsaved
from ocrm_ray.config import RunConfig, StudyConfig

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
