"""Going back to the newest checkpoint after a process died; a run with a summary is taken for done."""

import asyncio
import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import tiny_run
from test_checkpoints import state_of, write

from ocrm_ray import reinforcement
from ocrm_ray.checkpoints import Checkpoint
from ocrm_ray.config import RunConfig
from ocrm_ray.errors import ActorDiedError, DeadlineError, RunError
from ocrm_ray.metrics import RunLog


class OpenCluster:
    """Remembers from where it was started and whether it was closed."""

    def __init__(self, saved: Checkpoint | None) -> None:
        self.saved = saved
        self.is_closed = False

    async def close(self, is_done: bool) -> None:
        self.is_closed = True


def restart(
    config: RunConfig, errors: list[Exception], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[OpenCluster], list[list[str]]]:
    """Run with attempts that fail with ``errors`` in turn, each after a checkpoint; then one succeeds."""
    clusters: list[OpenCluster] = []
    told: list[list[str]] = []

    def start(saved: Checkpoint | None) -> OpenCluster:
        assert all(cluster.is_closed for cluster in clusters), "two clusters at once"
        clusters.append(OpenCluster(saved))
        return clusters[-1]

    async def attempt(*_: object) -> dict[str, object]:
        told.append(list(_[4]))  # type: ignore[call-overload]
        number = len(clusters)
        if number > len(errors):
            return {"steps": 12}
        if number > 1:
            write(config.run_dir, state_of(number))
        else:
            (config.run_dir / "metrics.jsonl").write_text("{}\n")
        raise errors[number - 1]

    monkeypatch.setattr(reinforcement, "run_to_the_end", attempt)
    try:
        asyncio.run(reinforcement.run_with_restarts(config, start, lambda state: None, asyncio.Event()))  # type: ignore[arg-type]
    finally:
        assert all(cluster.is_closed for cluster in clusters)
    return clusters, told


def test_after_a_death_or_a_hang_the_run_goes_on_from_the_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(output_dir=str(tmp_path))
    errors: list[Exception] = [ActorDiedError("policy-0 died"), DeadlineError("refit hangs"), ActorDiedError("again")]
    clusters, told = restart(config, errors, monkeypatch)
    assert [cluster.saved.state.step if cluster.saved else None for cluster in clusters] == [None, None, 2, 3]
    assert told == [[], ["policy-0 died"], ["policy-0 died", "refit hangs"], ["policy-0 died", "refit hangs", "again"]]


def test_what_a_run_without_a_checkpoint_had_written_is_gone_before_it_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(output_dir=str(tmp_path))
    restart(config, [ActorDiedError("policy-0 died")], monkeypatch)
    assert not (config.run_dir / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ([ActorDiedError("first"), ActorDiedError("second"), ActorDiedError("third")], "third"),
        ([RunError("the gradient is not finite")], "the gradient is not finite"),
    ],
)
def test_too_many_deaths_and_errors_of_another_kind_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: list[Exception], message: str
) -> None:
    config = tiny_run(**{"output_dir": str(tmp_path), "faults.max_restarts": 2})
    with pytest.raises(RunError, match=message):
        restart(config, errors, monkeypatch)


class Instant:
    """Stages without work, and a coordinator whose run is its first line."""

    def __init__(self, *arguments: Any) -> None:
        self.log = next((each for each in arguments if isinstance(each, RunLog)), None)

    async def run(self, stopping: object = None) -> bool:
        if self.log is not None:
            self.log.event("promoted")
            self.log.hold(0)
        return True


async def no_listener(emit: object) -> None: ...


async def no_pools() -> None:
    return None


def test_a_run_whose_report_could_not_be_written_has_no_summary_and_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    told: list[str] = []
    config = RunConfig.model_validate({"name": "a", "output_dir": str(tmp_path), "world": {}})
    for name in ("Stages", "Coordinator"):
        monkeypatch.setattr(reinforcement, name, Instant)
    monkeypatch.setattr(reinforcement, "training_data", lambda *_: None)
    monkeypatch.setattr(reinforcement, "write_report", fail)

    config.run_dir.mkdir(parents=True)

    def run() -> None:
        observe: Any = lambda kind, figures: told.append(kind)  # noqa: E731
        cluster: Any = SimpleNamespace(pools=no_pools, saved=None, listen=no_listener, observe=observe)
        asyncio.run(reinforcement.run_to_the_end(config, cluster, lambda state: None, asyncio.Event()))

    with pytest.raises(OSError, match="No space left"):
        run()
    assert told == ["promoted", "step"], "the cluster is told what the log is"
    assert (config.run_dir / "metrics.jsonl").stat().st_size > 0
    assert not (config.run_dir / "summary.json").exists()
    monkeypatch.setattr(reinforcement, "write_report", lambda run_dir: run_dir)
    (config.run_dir / "metrics.jsonl").unlink()
    run()
    assert (config.run_dir / "summary.json").exists()
