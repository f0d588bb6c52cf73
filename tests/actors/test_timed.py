"""The real coordinator over the real pools and timed actors, on a virtual clock: the step is the limit, exactly."""

import asyncio
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes import tiny_run
from virtual_clock import run_virtual

from actors.rehearsal import actor_specs, rehearse, rehearse_over
from actors.timed import NUM_PAIRS, TimedActor, TimedEngine, TimedScorer
from ocrm_ray.config import Duration, Rehearsal, Rollout, RunConfig
from ocrm_ray.cost import rehearsed_cost
from ocrm_ray.records import GenerationRequest, PolicyWeights, Prompt, Sequence
from ocrm_ray.rehearsal import Figures, prepared

WEIGHTS = PolicyWeights(1, Path(), 8)


class InProcess:
    """What a pool asks of a ``RemoteActor``, for an actor in this process."""

    rank, num_ranks, num_replaced = 0, 1, 0

    def __init__(self, spec):
        self.role = spec.role
        module, _, name = spec.path.partition(":")
        self.actor = getattr(importlib.import_module(module), name)(*spec.arguments)

    async def call(self, method, *arguments, deadline_s):
        async with asyncio.timeout(deadline_s):
            return await getattr(self.actor, method)(*arguments)


def config_of(**overrides: object) -> RunConfig:
    """8 prompts a step, two engines of 4 slots: by default 1 s a step in every pool, none the slowest."""
    rehearsal = {
        "num_updates": 24,
        "generate": {"item_s": 1.0},
        "engine_slots": 4,
        "score": {"item_s": 0.125},
        "reward": {"item_s": 0.001},
        "train": {"item_s": 0.125},
        "weights_gib": 1.0,
    }
    keys = {"rehearsal": rehearsal, "rollout.prompts_per_step": 8, "rollout.max_staleness": 6}
    return prepared(tiny_run(**(keys | {"pools.generation.num_actors": 2, "correction.strategy": "none"} | overrides)))


def rehearsed(folder: Path, **overrides: object) -> Figures:
    config = config_of(**overrides)

    async def run() -> Figures:
        await asyncio.sleep(1000)  # a machine's clock does not start with the run
        pools = [
            kind([InProcess(spec) for spec in specs], None, config.deadlines)
            for kind, specs in actor_specs(config).items()
        ]
        return await rehearse_over(config, pools, folder, lambda state: None)

    return run_virtual(run())


SLOWER = {
    "generation": {"rehearsal.generate.item_s": 2.0},
    "scoring": {"rehearsal.score.item_s": 0.25, "rollout.max_staleness": 3},
    "reward": {"rehearsal.reward.item_s": 0.25, "rollout.max_staleness": 3},
    "policy": {"rehearsal.train.item_s": 0.25},
    "publish": {"rehearsal.weights_gib": 2.0},
}


@pytest.mark.parametrize("pool", SLOWER)
def test_the_step_is_what_the_slowest_pool_draws(tmp_path, pool):
    found = rehearsed(tmp_path, **SLOWER[pool])
    assert found.bottleneck == pool
    assert found.step_s == pytest.approx(found.limit_s, rel=1e-9)
    assert found.step_s == pytest.approx(2.0, rel=1e-9)


def test_pools_of_equal_seconds_overlap_completely(tmp_path):
    found = rehearsed(tmp_path)
    assert found.step_s == pytest.approx(1.0, rel=1e-9)
    assert [found.busy_s[pool] for pool in SLOWER] == pytest.approx([1.0, 1.0, 0.008, 1.0, 1.0])


def test_more_workers_divide_the_seconds_of_a_pool(tmp_path):
    more = {"pools.generation.num_actors": 4, "pools.scoring.num_actors": 4, "rehearsal.generate.item_s": 4.0}
    found = rehearsed(tmp_path, **more, **{"rehearsal.score.item_s": 0.5})
    assert [found.busy_s[pool] for pool in ("generation", "scoring")] == pytest.approx([2.0, 1.0])
    assert found.step_s == pytest.approx(2.0, rel=1e-9)


def test_the_pause_of_a_publish_is_what_generation_pays(tmp_path):
    found = rehearsed(tmp_path, **{"rehearsal.generate.item_s": 2.0, "rehearsal.pause_s": 0.25})
    assert found.bottleneck == "generation"
    assert found.step_s == pytest.approx(2.25, rel=1e-9)
    assert found.efficiency == pytest.approx(1.0, rel=1e-9)


def test_fresh_rollouts_wait_for_every_stage(tmp_path):
    found = rehearsed(tmp_path, **{"rollout.max_staleness": 0})
    assert found.step_s == pytest.approx(4.0)
    assert found.efficiency == pytest.approx(0.25)
    assert set(found.staleness) == {0}


KEEPS_UP = {"correction.strategy": "ocrm", "correction.every": 6, "rehearsal.ratio_s": 2.0, "rehearsal.refit_s": 4.0}


@pytest.mark.parametrize("pool", [pool for pool in SLOWER if pool != "reward"])
def test_a_correction_that_keeps_up_stalls_nothing(tmp_path, pool):
    without = rehearsed(tmp_path / "without", **SLOWER[pool])
    found = rehearsed(tmp_path / "with", **SLOWER[pool], **KEEPS_UP)
    assert found.lags.total() == 4
    assert found.step_s == pytest.approx(without.step_s, rel=2e-3 if pool == "scoring" else 1e-9)
    assert found.busy_s["generation"] == pytest.approx(without.busy_s["generation"], rel=1e-9)
    assert found.wait_s["correction"] == 0
    assert found.num_deferred == 0
    assert (found.busy_s["ratios"], found.busy_s["refit"]) == (pytest.approx(2 / 6), pytest.approx(4 / 6))


def test_what_a_candidates_scores_cost_a_full_reward_pool_stays_within_the_prediction(tmp_path):
    found = rehearsed(tmp_path, **SLOWER["reward"], **KEEPS_UP)
    cost = rehearsed_cost(config_of(**SLOWER["reward"], **KEEPS_UP))
    assert cost is not None
    assert cost.step_s == pytest.approx(2.0 * (1 + 4 / 6))
    assert 2.0 < found.step_s <= cost.step_s * (1 + 1e-9)
    assert found.efficiency == pytest.approx(1.0, rel=1e-9)


def test_rollouts_that_wait_through_two_corrections_are_not_scored_late(tmp_path):
    rehearsed(tmp_path, **SLOWER["scoring"] | KEEPS_UP | {"rollout.max_staleness": 6})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["num_rescored_late"] or 0 for row in rows) == 0


def test_a_moving_anchor_is_scored_too_and_stalls_nothing(tmp_path):
    found = rehearsed(tmp_path, **SLOWER["policy"], **KEEPS_UP, **{"correction.kl_reference": "moving"})
    assert found.step_s == pytest.approx(2.0, rel=1e-9)
    assert found.busy_s["scoring"] > 1.01


FALLS_BEHIND = SLOWER["policy"] | {"correction.strategy": "ocrm", "correction.every": 2, "rehearsal.refit_s": 19.0}


def test_a_late_refit_is_promoted_when_it_is_ready_and_what_falls_due_is_deferred(tmp_path):
    found = rehearsed(tmp_path, **FALLS_BEHIND)
    assert set(found.lags) == {10}
    assert found.num_deferred > 0
    assert found.step_s == pytest.approx(2.0, rel=1e-9)
    assert found.wait_s["correction"] == 0


def test_promote_after_holds_and_the_wait_is_what_is_missing(tmp_path):
    found = rehearsed(tmp_path, **FALLS_BEHIND, **{"correction.promote_after": 4})
    assert set(found.lags) == {4}
    assert found.wait_s["correction"] > 1.0
    assert max(found.ages) == 7
    assert found.efficiency < 0.5


def test_max_lag_holds_and_is_no_more_than_a_bound(tmp_path):
    bounds = {"correction.max_lag": 5}
    late = rehearsed(tmp_path / "late", **FALLS_BEHIND, **bounds)
    quick = rehearsed(tmp_path / "quick", **FALLS_BEHIND | bounds | {"rehearsal.refit_s": 3.0})
    assert (set(late.lags), set(quick.lags)) == ({5}, {2})
    assert late.wait_s["correction"] > 0 == quick.wait_s["correction"]


RAGGED = {
    "rehearsal.generate": {"item_s": 1.0, "jitter": 0.4, "tail_share": 0.1, "tail_factor": 4.0},
    "rehearsal.train": {"item_s": 0.1, "jitter": 0.2},
}


@pytest.mark.parametrize("straggler", ["wait", "reissue"])
def test_ragged_durations_stay_below_the_limit_and_follow_the_seed(tmp_path, straggler):
    first, again, other = (
        rehearsed(tmp_path / name, **RAGGED, **{"seed": seed, "rollout.straggler": straggler})
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert 0.8 < first.efficiency <= 1 + 1e-9
    assert first == again
    assert first.step_s != other.step_s


def rehearsal(**durations: float) -> Rehearsal:
    return Rehearsal(**{name: Duration(item_s=0.0) for name in ("generate", "score", "reward", "train")} | durations)


def request(name: str) -> GenerationRequest:
    return GenerationRequest(name, Prompt(0, "", (1, 2, 3)), num_samples=4, max_new_tokens=5, temperature=1.0, seed=0)


async def finish_times(engine: TimedEngine, num_requests: int) -> dict[str, float]:
    times: dict[str, float] = {}
    while len(times) < num_requests:
        for name, _ in await engine.collect():
            times[name] = asyncio.get_running_loop().time()
    return times


def test_a_pause_holds_up_what_runs_and_what_begins_in_it_and_nothing_else():
    async def run():
        section = rehearsal(generate=Duration(item_s=2.0), weights_gib=1.0, pause_s=0.25, engine_slots=4)
        engine = TimedEngine(section, Rollout(), 0)
        await engine.submit([request("before")])
        await asyncio.sleep(1.125)
        await engine.submit([request("runs")])
        publish = asyncio.create_task(engine.load_weights(WEIGHTS))  # stands still from 1.875 to 2.125
        await asyncio.sleep(0.875)
        await engine.submit([request("begins")])
        await publish
        await engine.submit([request("after")])
        return await finish_times(engine, 4), (await engine.booked())["generation"]

    times, booked = run_virtual(run())
    assert times == {"before": 2.25, "runs": 3.375, "begins": 4.125, "after": 4.125}
    assert sorted(booked) == [(0.0, 2.25), (1.125, 2.25), (2.0, 2.125), (2.125, 2.0)]


def test_requests_beyond_the_slots_wait_and_an_aborted_one_frees_its_slot():
    async def run():
        engine = TimedEngine(rehearsal(generate=Duration(item_s=2.0), engine_slots=1), Rollout(), 0)
        await engine.submit([request("a"), request("b"), request("c")])
        await asyncio.sleep(0.5)
        await engine.abort(["a"])
        return await finish_times(engine, 2), (await engine.booked())["generation"]

    assert run_virtual(run()) == ({"b": 2.5, "c": 4.5}, [(0.0, 0.5), (0.5, 2.0), (2.5, 2.0)])


def test_samples_have_the_size_of_real_ones_and_the_versions_that_made_them():
    async def run():
        section = rehearsal(generate=Duration(item_s=2.0), weights_gib=1.0)
        engine = TimedEngine(section, Rollout(max_new_tokens=7), 0)
        await engine.submit([request("a")])
        await engine.load_weights(WEIGHTS)
        return (await engine.collect())[0][1]

    samples = run_virtual(run())
    assert [(s.first_version, s.last_version) for s in samples] == [(0, 1)] * 4
    assert {(len(s.sequence.prompt_ids), len(s.sequence.response_ids), s.logprobs.shape) for s in samples} == {
        (3, 7, (7,))
    }
    assert len({id(s.logprobs) for s in samples}) == 4  # what is shared is sent once


def test_an_actor_answers_one_message_at_a_time_and_books_its_own_seconds():
    async def run():
        section = rehearsal(score=Duration(item_s=1.0, call_s=0.5), ratio_s=3.0)
        actor = TimedScorer(section, Rollout(samples_per_prompt=2), 0)
        rows = [Sequence((1,), (2, 3), True)] * 4
        await asyncio.gather(actor.score(rows, ("live", "sft")), actor.score(rows, ("snapshot-4",)))
        await actor.pair_logprobs(WEIGHTS, np.arange(NUM_PAIRS // 2))
        return asyncio.get_running_loop().time(), await actor.booked()

    assert run_virtual(run()) == (5.5, {"scoring": [(0.0, 2.5), (2.5, 1.5)], "ratios": [(4.0, 1.5)]})


def test_drawn_seconds_have_the_expected_mean_and_spread():
    duration = Duration(item_s=1.0, call_s=0.5, jitter=0.3, tail_share=0.1, tail_factor=3.0)
    actor = TimedActor(rehearsal(), Rollout(), seed=5)
    drawn = np.array([actor._draw(duration, 2) for _ in range(20_000)])
    second_moment = 2.5**2 * np.exp(0.3**2) * (0.9 + 0.1 * 9)
    deviation = np.sqrt(second_moment - duration.mean_s(2) ** 2)
    assert duration.mean_s(2) == pytest.approx(3.0)
    assert drawn.mean() == pytest.approx(3.0, abs=4 * deviation / np.sqrt(len(drawn)))
    assert drawn.std() == pytest.approx(deviation, rel=0.05)


def test_timed_actors_load_no_torch():
    code = "import sys, actors.timed; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.real
def test_a_rehearsal_on_ray_prints_its_figures_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    overrides = {"rehearsal.num_updates": 4, "rollout.max_staleness": 1, "correction.every": 3}
    quick = {f"rehearsal.{key}.item_s": value for key, value in (("generate", 0.2), ("score", 0.02), ("train", 0.02))}
    text = rehearse(config_of(**KEEPS_UP | overrides | quick | {"rehearsal.weights_gib": 0.05}))
    assert "overlap efficiency" in text
    assert "corrections by updates until promotion" in text
    assert not list(tmp_path.iterdir())
