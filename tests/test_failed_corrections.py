"""Corrections that fail: tried once more, then the old reward model is kept or the run ends; nothing of them stays."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeGeneration, FakePolicy, FakePools, FakeReward, FakeScoring, prompts, tiny_run
from test_coordinator import trained_before, varied_fakes
from virtual_clock import run_virtual
from virtual_runs import events, metrics, run

from ocrm_ray.errors import mistake
from ocrm_ray.records import Rollout, Sample, Sequence
from ocrm_ray.rollout_scoring import RolloutScorer, ScoreVersions
from ocrm_ray.run_files import correction_windows, read_run

Error = Callable[[int], Exception | None]
DIVERGED = RuntimeError("refit diverged")


def first(num: int, error: Exception = DIVERGED) -> Error:
    return lambda call: error if call < num else None


def outcomes(folder: Path) -> list[tuple[object, ...]]:
    """(snapshot, attempt, what was done) of each failure."""
    return [(row["snapshot_version"], row["attempt"], row["action"]) for row in events(folder, "correction_failed")]


@pytest.mark.parametrize("step", ["ratios", "refit", "stage"])
def test_what_failed_once_is_tried_again_and_promoted(tmp_path: Path, step: str) -> None:
    error = first(1)
    reward = FakeReward(refit_error=error) if step == "refit" else FakeReward()
    reward.stage_error = error if step == "stage" else reward.stage_error
    fakes = FakePools(reward=reward, scoring=FakeScoring(ratio_error=error) if step == "ratios" else FakeScoring())
    run(tiny_run(**{"correction.promote_after": 3, "correction.kl_reference": "moving"}), fakes, tmp_path)
    assert outcomes(tmp_path) == [(4, 1, "retry")]
    assert events(tmp_path, "correction_failed")[0]["error"] == "RuntimeError: refit diverged"
    started = [(row["snapshot_version"], row["attempt"]) for row in events(tmp_path, "correction_started")]
    assert started == [(4, 1), (4, 2), (8, 1)]
    promoted = [(row["snapshot_version"], row["policy_version"]) for row in events(tmp_path, "promoted")]
    assert promoted == [(4, 7), (8, 11)]
    assert [window.outcome for window in correction_windows(read_run(tmp_path))] == ["failed", "promoted", "promoted"]


@pytest.mark.parametrize(
    "schedule",
    [{}, {"correction.promote_after": 3}, {"correction.max_lag": 1}, {"correction.schedule": "blocking"}],
)
def test_after_two_failures_the_old_reward_model_stays_and_the_next_correction_comes(
    tmp_path: Path, schedule: dict[str, object]
) -> None:
    fakes = FakePools(reward=FakeReward(refit_error=first(2), refit_s=lambda n: 0.1))
    run(tiny_run(**schedule, **{"evaluation.every": 100}), fakes, tmp_path)
    assert outcomes(tmp_path) == [(4, 1, "retry"), (4, 2, "keep_old")]
    assert [(row["snapshot_version"], row["reward_version"]) for row in events(tmp_path, "promoted")] == [(8, 1)]
    assert {row["reward_version"] for row in metrics(tmp_path)[:8]} == {0}
    assert sorted(fakes.policy.exported) in ([11, 12], [12]), "the weights of the snapshots are given back"


def test_a_failed_correction_that_is_promoted_at_a_fixed_update_frees_the_next_one_at_that_update(
    tmp_path: Path,
) -> None:
    fakes = FakePools(reward=FakeReward(refit_error=first(2), refit_s=lambda n: 0.1))
    run(tiny_run(**{"correction.every": 2, "correction.promote_after": 3}), fakes, tmp_path)
    started = [(row["snapshot_version"], row["attempt"]) for row in events(tmp_path, "correction_started")]
    assert started == [(2, 1), (2, 2), (5, 1), (8, 1), (11, 1)]


def test_a_correction_after_a_failed_one_scores_rollouts_only_before_its_promotion(tmp_path: Path) -> None:
    fakes = FakePools(reward=FakeReward(refit_error=first(2), refit_s=lambda n: 0.1))
    run(tiny_run(**{"correction.promote_after": 3, "correction.every": 4}), fakes, tmp_path)
    staged = [time for time, slot in fakes.reward.scored if slot == "snapshot-8-1"]
    assert min(staged) >= fakes.policy.updates[9][0]


def test_training_waits_for_the_second_attempt_and_no_longer(tmp_path: Path) -> None:
    fakes = FakePools(reward=FakeReward(refit_error=first(2), refit_s=lambda n: 50.0 if n < 2 else 0.1))
    run(tiny_run(**{"correction.max_lag": 1}), fakes, tmp_path)
    waits = {row["step"]: row["correction_wait_s"] for row in metrics(tmp_path) if row["correction_wait_s"]}
    assert list(waits) == [5]
    assert waits[5] == pytest.approx(100, abs=5)


def test_with_on_failure_stop_the_second_failure_ends_the_run_with_its_own_error(tmp_path: Path) -> None:
    fakes = FakePools(reward=FakeReward(refit_error=first(2)))
    with pytest.raises(RuntimeError, match="refit diverged"):
        run(tiny_run(**{"correction.on_failure": "stop"}), fakes, tmp_path)
    assert outcomes(tmp_path) == [(4, 1, "retry"), (4, 2, "stop")]


@pytest.mark.parametrize("error", [AssertionError("two at once"), TypeError("no len()"), mistake("a", "b", "c", "d")])
def test_a_mistake_is_not_tried_again_and_ends_the_run(tmp_path: Path, error: Exception) -> None:
    fakes = FakePools(scoring=FakeScoring(ratio_error=first(9, error)))
    with pytest.raises(type(error)):
        run(tiny_run(), fakes, tmp_path)
    assert outcomes(tmp_path) == [(4, 1, "stop")]
    assert fakes.reward.refits == []


def test_what_fails_outside_corrections_still_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="optimiser exploded"):
        run(tiny_run(), FakePools(policy=FakePolicy(fail_at=3)), tmp_path / "policy")
    with pytest.raises(RuntimeError, match="engine fell over"):
        run(tiny_run(), FakePools(generation=FakeGeneration(fail_at=9)), tmp_path / "engine")


@pytest.mark.parametrize("where", ["labels", "refit"])
def test_a_second_attempt_learns_from_the_pairs_of_the_first_each_once(tmp_path: Path, where: str) -> None:
    fakes = varied_fakes()
    labels, num_asked = fakes.evaluator.gold_of, 0

    async def gold_of(given: list[object], sequences: list[Sequence]) -> list[float]:
        nonlocal num_asked
        num_asked += 1
        if where == "labels" and num_asked == 1:
            raise DIVERGED
        return await labels(given, sequences)  # type: ignore[arg-type]

    fakes.evaluator.gold_of = gold_of  # type: ignore[method-assign, assignment]
    fakes.reward.refit_error = first(1) if where == "refit" else first(0)
    keys = {"correction.strategy": "relabel", "correction.rollout_prompts": 5, "pairs.labels": "argmax"}
    run(tiny_run(**keys, **{"policy.num_updates": 6}), fakes, tmp_path)
    expected = [(each.sequences[1], each.sequences[0]) for each in trained_before(fakes, 4, 5)]
    assert [list(request.extra_pairs) for request in fakes.reward.refits] == [expected] * (1 + (where == "refit"))
    assert num_asked == 1 + (where == "labels"), "gold may cost money"


class BrokenSlot(FakeReward):
    """The first scores under the first candidate fail: those of the queue."""

    has_failed: bool = False

    async def score(self, sequences: object, slot: str = "live") -> np.ndarray:
        if slot == "snapshot-4-1" and not self.has_failed:
            self.has_failed = True
            raise DIVERGED
        return await super().score(sequences, slot)  # type: ignore[arg-type]


def test_a_candidate_that_cannot_score_the_queue_makes_place_for_the_second_attempt(tmp_path: Path) -> None:
    fakes = FakePools(reward=BrokenSlot(refit_s=lambda n: 2.0), generation=FakeGeneration(seconds=lambda n: 0.2))
    run(tiny_run(**{"rollout.max_staleness": 2}), fakes, tmp_path)
    assert outcomes(tmp_path) == [(4, 1, "retry")]
    assert events(tmp_path, "promoted")[0]["promotion_id"] == "snapshot-4-2"


SCORES = {"live": 0.0, "bad": 1.0, "good": 2.0}


class SlowReward(FakeReward):
    """Scores by slot; those of ``held`` slots come when ``open`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.open = asyncio.Event()
        self.held: set[str] = set()

    async def score(self, sequences: object, slot: str = "live") -> np.ndarray:
        if slot in self.held:
            await self.open.wait()
        return np.full(len(sequences), SCORES[slot], dtype=np.float32)  # type: ignore[arg-type]


class BrokenAnchor(FakeScoring):
    """Log-probs under the staged anchor fail, after a moment."""

    async def score(self, sequences: object, models: object = ("live", "sft")) -> list[list[np.ndarray]]:
        await asyncio.sleep(1)
        if "bad" in models:  # type: ignore[operator]
            raise RuntimeError("out of memory")
        return [[np.zeros(2, dtype=np.float32) for _ in sequences] for _ in models]  # type: ignore[attr-defined]


def rollout(number: int) -> Rollout:
    sample = Sample(Sequence((1,), (2, 3), True), np.zeros(2, dtype=np.float32), 0, 0)
    return Rollout(prompts(number + 1)[number], (sample,), 0)


async def rewards_after_a_promotion(scorer: RolloutScorer, batch: dict[str, Rollout]) -> list[float]:
    """Under a good candidate of the very version that a bad one had."""
    await scorer.stage(ScoreVersions(1, 4, "good", "good"), batch)
    scorer.commit()
    return [scores.reward for each in await scorer.refresh(batch) for scores in each.scores or ()]


def test_scores_of_a_discarded_candidate_never_go_live() -> None:
    async def body() -> list[float]:
        reward, scoring = SlowReward(), FakeScoring(staged={"bad": 4, "good": 4})
        scorer = RolloutScorer(scoring, reward, ScoreVersions(0, 0))
        queue = await scorer.score({"a": rollout(0)})
        await scorer.stage(ScoreVersions(1, 4, "bad", "bad"), queue)
        await scorer.discard()
        await scorer.discard()
        return await rewards_after_a_promotion(scorer, queue)

    assert run_virtual(body()) == [SCORES["good"]]


def test_discarding_waits_for_scores_on_their_way_and_drops_them() -> None:
    async def body() -> list[float]:
        reward, scoring = SlowReward(), FakeScoring(staged={"bad": 4, "good": 4})
        scorer = RolloutScorer(scoring, reward, ScoreVersions(0, 0))
        await scorer.stage(ScoreVersions(1, 4, "bad", "bad"), {})
        reward.held = {"bad"}
        scoring_now = asyncio.create_task(scorer.score({"a": rollout(0)}))
        await asyncio.sleep(1)
        discarding = asyncio.create_task(scorer.discard())
        await asyncio.sleep(1)
        assert not discarding.done(), "a slot that is asked for would be gone"
        reward.open.set()
        await discarding
        return await rewards_after_a_promotion(scorer, await scoring_now)

    assert run_virtual(body()) == [SCORES["good"]]


def test_scores_that_come_after_their_candidate_was_discarded_are_dropped() -> None:
    async def body() -> list[float]:
        reward = SlowReward()
        scorer = RolloutScorer(BrokenAnchor(), reward, ScoreVersions(0, 0))
        queue = await scorer.score({"a": rollout(0)})
        reward.held = {"bad"}
        with pytest.raises(RuntimeError, match="out of memory"):
            await scorer.stage(ScoreVersions(1, 4, "bad", "bad"), queue)
        await scorer.discard()
        await scorer.stage(ScoreVersions(1, 4, "good", "good"), queue)
        reward.open.set()
        await asyncio.sleep(1)
        scorer.commit()
        return [scores.reward for each in await scorer.refresh(queue) for scores in each.scores or ()]

    assert run_virtual(body()) == [SCORES["good"]]
