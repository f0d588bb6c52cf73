"""Checkpoints as files, and runs that are cut off anywhere and go on from them, over fakes on a virtual clock."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from disk_faults import full_after
from fakes import FakeGeneration, FakePolicy, FakePools, FakeReward, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_clock import run_virtual
from virtual_runs import NUM_PROMPTS, coordinate, cut_off, events, metrics, trained

from ocrm_ray import checkpoints
from ocrm_ray.algorithm.schedule import CorrectionClock
from ocrm_ray.checked_files import Entry, write_arrays
from ocrm_ray.checkpoints import STATE, RunState, newest
from ocrm_ray.config import RunConfig
from ocrm_ray.errors import UserError
from ocrm_ray.records import OnPolicyState, Prompt, Responses, Sequence

WRITTEN = "model.safetensors is not what was written"
RULES = ({}, {"correction.promote_after": 2}, {"correction.schedule": "blocking"}, {"correction.max_lag": 3})


def state_of(step: int, **changes: object) -> RunState:
    fields: dict[str, object] = {"reward_version": 0, "anchor_version": 0, "num_issued": step, "outstanding": ()}
    fields |= {"clock": CorrectionClock(every=4), "on_policy": OnPolicyState(), "probe_bound": (0.1, 0.2)}
    return RunState(step=step, **(fields | changes))  # type: ignore[arg-type]


def write(
    run_dir: Path, state: RunState, num_kept: int = 10, written: Callable[[Path], dict[str, Entry]] = lambda _: {}
) -> Path:
    """``written``: writes files of its own into the folder, and returns their entries."""
    partial = checkpoints.begin(run_dir, state.step)
    (partial / "policy").mkdir()
    (partial / "policy" / "model.safetensors").write_bytes(b"weights of %d" % state.step)
    (partial / STATE / "trainer.json").write_text("{}")
    return checkpoints.finish(partial, state, written(partial), num_kept)


def test_a_checkpoint_reads_back_as_it_was_written_with_everything_inside(tmp_path: Path) -> None:
    sequence = Sequence((1, 2), (3,), True)
    kept = Responses(Prompt(7, "text", (1, 2), "reference"), (sequence, sequence), (0.1, 1 / 3))
    state = state_of(
        4,
        anchor_version=3,
        outstanding=(2, 5),
        clock=CorrectionClock(every=4, promote_after=2, snapshot=4, num_deferred=1),
        on_policy=OnPolicyState(
            (kept,), ((sequence, sequence),), (4, ((sequence, sequence),), ((sequence,),)), (5, (kept, kept))
        ),
    )
    folder = write(tmp_path, state)
    found = newest(tmp_path)
    assert found is not None
    assert (found.state, found.folder, found.refused) == (state, folder, ())
    assert found.anchor_path == str(folder / STATE / "anchor")


def moments(partial: Path) -> dict[str, Entry]:
    file = f"{STATE}/policy-exp_avg-0.safetensors"
    return {file: write_arrays({"weight": np.arange(6, dtype=np.float32)}, partial / file)}


def lost_moments(partial: Path) -> dict[str, Entry]:
    entries = moments(partial)
    (partial / next(iter(entries))).unlink()
    return entries


def other_moments(partial: Path) -> dict[str, Entry]:
    return {name: entry | {"crc32": entry["crc32"] ^ 1} for name, entry in moments(partial).items()}


def test_files_that_were_on_the_disk_before_are_in_the_checkpoint_like_the_others(tmp_path: Path) -> None:
    folder = write(tmp_path, state_of(4), written=moments)
    found = newest(tmp_path)
    assert found is not None
    assert (found.folder, found.refused) == (folder, ())
    path = folder / STATE / "policy-exp_avg-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"exp_avg-0\.safetensors is not what was written"):
        newest(tmp_path)


@pytest.mark.parametrize(
    ("written", "reason"), [(lost_moments, "No such file or directory"), (other_moments, "is not what was written")]
)
def test_a_file_that_is_not_what_its_writer_told_is_noticed(
    tmp_path: Path, written: Callable[[Path], dict[str, Entry]], reason: str
) -> None:
    older = write(tmp_path, state_of(2))
    write(tmp_path, state_of(4), written=written)
    found = newest(tmp_path)
    assert found is not None
    assert found.folder == older
    assert len(found.refused) == 1
    assert found.refused[0].endswith(reason)


def test_the_newest_stay_and_no_partial_folder_is_left(tmp_path: Path) -> None:
    for step in (2, 6, 10):
        write(tmp_path, state_of(step), num_kept=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-10", "step-6"]


def test_damaged_checkpoints_of_a_future_that_was_given_up_take_no_place_of_those_behind_which_it_goes_on(
    tmp_path: Path,
) -> None:
    for step in (2, 8, 9):
        write(tmp_path, state_of(step))
    for step in (8, 9):
        (tmp_path / "checkpoints" / f"step-{step}" / "model.safetensors").unlink()
    folder = write(tmp_path, state_of(4), num_kept=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-4"]
    found = newest(tmp_path)
    assert found is not None
    assert (found.folder, found.refused) == (folder, ())


def test_a_resumed_run_keeps_the_checkpoint_whose_anchor_its_scorers_start_with(tmp_path: Path) -> None:
    config = tiny_run(**{"correction.kl_reference": "moving", "checkpoint.every": 1, "output_dir": str(tmp_path)})
    assert cut_off(config, FakePools(policy=FakePolicy(write_s=0.0)), 10.0)
    saved = newest(config.run_dir)
    assert saved is not None
    assert saved.state.anchor_version > 0
    assert saved.state.step < 9, "no checkpoint would push it out"
    assert not cut_off(config, FakePools.of(saved), 10_000.0, saved)
    assert saved.folder.exists()
    kept = [path for path in (config.run_dir / "checkpoints").iterdir() if path != saved.folder]
    assert len(kept) == config.checkpoint.num_kept


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"weights of 9"), WRITTEN),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"weights"), WRITTEN),
        (lambda folder: (folder / "model.safetensors").unlink(), "No such file or directory"),
        (lambda folder: (folder / STATE / "run.json").write_text("{}"), "state/run.json is not what was written"),
        (lambda folder: (folder / STATE / "manifest.json").write_text("{"), "Expecting property name"),
        (lambda folder: (folder / STATE / "manifest.json").unlink(), "No such file or directory"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path: Path, damage, reason: str) -> None:  # type: ignore[no-untyped-def]
    older = write(tmp_path, state_of(2))
    damage(write(tmp_path, state_of(8)))
    found = newest(tmp_path)
    assert found is not None
    assert found.folder == older
    assert len(found.refused) == 1
    assert found.refused[0].startswith("checkpoints/step-8: ")
    assert reason in found.refused[0]


def test_a_live_reward_model_that_changed_later_breaks_the_checkpoint(tmp_path: Path) -> None:
    reward = tmp_path / "reward" / "v3"
    reward.mkdir(parents=True)
    (reward / "model.safetensors").write_bytes(b"reward")
    write(tmp_path, state_of(2, reward_version=3))
    assert newest(tmp_path) is not None
    (reward / "model.safetensors").write_bytes(b"other!")
    with pytest.raises(UserError, match=r"step-2: \.\./\.\./reward/v3/model\.safetensors is not what was written"):
        newest(tmp_path)


def test_where_every_checkpoint_is_broken_the_error_says_what_to_do(tmp_path: Path) -> None:
    (write(tmp_path, state_of(2)) / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"need one that is whole: remove .*checkpoints to begin RL again"):
        newest(tmp_path)
    assert newest(tmp_path / "elsewhere") is None


def test_wherever_the_disk_is_full_while_a_checkpoint_is_written_the_one_before_it_is_whole_and_used(
    tmp_path: Path,
) -> None:
    older = write(tmp_path, state_of(2))
    for num_files in range(100):
        try:
            with full_after(num_files):
                write(tmp_path, state_of(4))
        except OSError:
            found = newest(tmp_path)
            assert found is not None
            assert (found.folder, found.refused) in [(older, ()), (tmp_path / "checkpoints" / "step-4", ())]
            continue
        break
    assert num_files > 2
    found = newest(tmp_path)
    assert found is not None
    assert found.state.step == 4


def test_a_folder_that_was_not_finished_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints.begin(tmp_path, 3)
    assert newest(tmp_path) is None
    assert not checkpoints.is_any(tmp_path)


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.floats(0.5, 40), min_size=1, max_size=3),
    every=st.integers(1, 4),
    staleness=st.integers(0, 2),
    speeds=st.lists(st.sampled_from([0.2, 1.0, 5.0]), min_size=1, max_size=5),
    rule=st.sampled_from(
        [{}, {"correction.promote_after": 2}, {"correction.schedule": "blocking"}, {"correction.max_lag": 3}]
    ),
)
def test_however_often_a_run_is_cut_off_every_prompt_is_trained_on_once(
    tmp_path_factory: pytest.TempPathFactory,
    cuts: list[float],
    every: int,
    staleness: int,
    speeds: list[float],
    rule: dict[str, object],
) -> None:
    folder = {"output_dir": str(tmp_path_factory.mktemp("run"))}
    config = tiny_run(**folder, **{"checkpoint.every": every, "rollout.max_staleness": staleness}, **rule)
    lineage: list[list[int]] = []
    for seconds in [*cuts, 10_000.0]:
        saved = newest(config.run_dir)
        engines = {"generation": FakeGeneration(seconds=lambda n: speeds[n % len(speeds)])}
        fakes = FakePools.of(saved, **engines) if saved else FakePools(**engines)
        del lineage[saved.state.step if saved else 0 :]
        is_cut = cut_off(config, fakes, seconds, saved)
        lineage += trained(fakes)
        if not is_cut:
            break
    assert len(lineage) == config.policy.num_updates
    assert sorted(number for batch in lineage for number in batch) == list(range(12 * 4))


def test_a_correction_in_flight_starts_again_from_its_snapshot_and_is_promoted_in_time(tmp_path: Path) -> None:
    changes = {"correction.promote_after": 3, "checkpoint.every": 5, "output_dir": str(tmp_path)}
    config = tiny_run(**changes)
    never = FakePools(reward=FakeReward(refit_s=lambda n: float("inf")))
    assert cut_off(config, never, 30.0)
    saved = newest(config.run_dir)
    assert saved is not None
    assert (saved.state.step, saved.state.clock.snapshot) == (5, 4)
    again = FakePools.of(saved)
    assert not cut_off(config, again, 10_000.0, saved)
    assert again.scoring.snapshots[0] == 4
    promoted = events(config.run_dir, "promoted")
    assert [(row["snapshot_version"], row["policy_version"]) for row in promoted] == [(4, 7), (8, 11)]
    assert again.policy.exported == [12], "held weights were given back"


def test_what_was_deferred_before_a_checkpoint_is_not_counted_again_behind_it(tmp_path: Path) -> None:
    changes = {"correction.every": 2, "correction.promote_after": 5, "checkpoint.every": 5}
    config = tiny_run(**changes, output_dir=str(tmp_path))
    slow = FakePools(reward=FakeReward(refit_s=lambda n: 100.0), policy=FakePolicy(write_s=0.0))
    assert cut_off(config, slow, 18.0)
    saved = newest(config.run_dir)
    assert saved is not None
    assert saved.state.clock.num_deferred == 1
    num_before = len(metrics(config.run_dir))
    again = FakePools.of(saved, reward=FakeReward(refit_s=lambda n: 100.0))
    assert not cut_off(config, again, 10_000.0, saved)
    assert [row["num_deferred_corrections"] for row in metrics(config.run_dir)[num_before:]] == [1, 0, 1, 0, 1, 0, 0]


def test_a_resumed_run_brings_its_weights_into_the_engines_before_it_samples(tmp_path: Path) -> None:
    config = tiny_run(**{"checkpoint.every": 5, "output_dir": str(tmp_path)})
    assert cut_off(config, FakePools(), 12.0)
    saved = newest(config.run_dir)
    assert saved is not None
    again = FakePools.of(saved)
    assert not cut_off(config, again, 10_000.0, saved)
    first = again.policy.updates[0][1]
    assert {rollout.first_version for rollout in first} == {5}


def test_the_metrics_of_a_resumed_run_go_on_at_its_step_and_in_its_time(tmp_path: Path) -> None:
    config = tiny_run(**{"checkpoint.every": 4, "output_dir": str(tmp_path)})
    assert cut_off(config, FakePools(policy=FakePolicy(write_s=0.0)), 13.0)
    before = metrics(config.run_dir)
    saved = newest(config.run_dir)
    assert saved is not None
    assert not cut_off(config, FakePools.of(saved), 10_000.0, saved)
    rows = metrics(config.run_dir)[len(before) :]
    assert [row["step"] for row in rows] == list(range(saved.state.step + 1, 13))
    assert rows[0]["time_s"] > before[-1]["time_s"]


def test_a_checkpoint_waits_for_the_evaluation_of_its_step(tmp_path: Path) -> None:
    config = tiny_run(**{"checkpoint.every": 6, "evaluation.every": 6, "output_dir": str(tmp_path)})
    fakes = FakePools(policy=FakePolicy(write_s=0.0))
    slow = asyncio.Event()
    evaluate = fakes.evaluator.evaluate

    async def stuck(step: int, *measured: object) -> object:
        if step == 6:
            await slow.wait()
        return await evaluate(step, *measured)  # type: ignore[arg-type]

    fakes.evaluator.evaluate = stuck  # type: ignore[method-assign, assignment]
    assert cut_off(config, fakes, 200.0)
    assert newest(config.run_dir) is None


def stopped(config: RunConfig, fakes: FakePools, seconds: float) -> float:
    """Ask the run to stop after so many virtual seconds; when it had ended."""

    async def run() -> float:
        stopping = asyncio.Event()
        asyncio.get_running_loop().call_later(seconds, stopping.set)
        return await coordinate(config, fakes, config.run_dir, num_prompts=NUM_PROMPTS, stopping=stopping)

    return float(run_virtual(run()))


def test_a_run_that_is_to_stop_ends_behind_its_update_with_a_checkpoint_of_it(tmp_path: Path) -> None:
    config = tiny_run(**{"checkpoint.every": 100, "output_dir": str(tmp_path)})
    fakes = FakePools()
    ended_s = stopped(config, fakes, 9.0)
    saved = newest(config.run_dir)
    assert saved is not None
    assert saved.state.step == fakes.policy.version < 12
    last_update_s = fakes.policy.updates[-1][0]
    assert fakes.policy.updates[-2][0] < 9.0 <= last_update_s <= ended_s
    assert fakes.policy.saved == []
    again = FakePools.of(saved)
    assert not cut_off(config, again, 10_000.0, saved)
    assert again.policy.version == 12


def test_a_run_that_is_to_stop_when_it_ends_anyway_is_complete(tmp_path: Path) -> None:
    config = tiny_run(**{"output_dir": str(tmp_path)})
    whole = FakePools()
    ended_s = stopped(config, whole, 10_000.0)
    late = FakePools()
    stopped(config.model_copy(update={"name": "late"}), late, ended_s - 0.01)
    assert late.policy.version == whole.policy.version == 12
    assert "policy" in [name for name, _ in late.policy.saved]
