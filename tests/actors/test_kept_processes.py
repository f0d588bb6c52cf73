"""One run after another on the same processes, on a real local Ray with actors that have no networks."""

import asyncio

import psutil
import pytest
from dummy_actors import HANG
from test_groups import BUNDLE, DEADLINES, ask, respond, runner, session

from actors.generation_group import RayGenerationPool
from actors.groups import RayPolicyPool, RayScoringPool
from actors.placement import GroupRequest, Slot
from actors.remote_actor import ActorSpec, ranks_of
from actors.shared_group import StandingGroups

pytestmark = pytest.mark.real

__all__ = ["runner", "session"]


class Runs:
    """Runs with one pool each, one after the other in one place."""

    def __init__(self, runner, kind, num_actors):
        self.runner, self.kind, self.groups = runner, kind, StandingGroups()
        self.request = GroupRequest(kind.name, (Slot(kind.name, BUNDLE),) * num_actors)

    def begin(self, path, *arguments, ranks=False):
        """The pool of the next run; an actor for each of ``arguments``."""
        is_engine = self.kind is RayGenerationPool
        specs = [
            ActorSpec(f"{self.kind.name}-{n}", f"dummy_actors:{path}", each, 1, is_engine)
            for n, each in enumerate(arguments)
        ]
        share = self.groups.shares([self.request])[self.kind.name]
        return self.runner.run(self.kind.start_in(share, ranks_of(specs) if ranks else specs, DEADLINES))

    def end(self, pool, may_rest=True):
        self.runner.run(pool.close(may_rest))


@pytest.fixture
def runs(runner):
    begun = []

    def of(kind, num_actors=1):
        begun.append(Runs(runner, kind, num_actors))
        return begun[-1]

    yield of
    for each in begun:
        runner.run(each.groups.end())


def process_ids(runner, pool):
    return runner.run(pool.ask_all(pool.actors, "process_id", deadline_s=20))


def test_the_next_runs_actors_are_new_ones_in_the_old_processes(runner, runs):
    scoring = runs(RayScoringPool, 2)
    first = scoring.begin("DummyScorer", (0,), (1,))
    runner.run(first.commit("p", 1))
    before = process_ids(runner, first)
    scoring.end(first)
    second = scoring.begin("DummyScorer", (5,), (1,))
    assert process_ids(runner, second) == before
    assert runner.run(second.actors[0].call("memory", deadline_s=20)) == []
    assert runner.run(second.score(respond(7), ("sft",)))[0][0].tolist() == [7, 5]
    scoring.end(second)


def test_a_process_that_died_at_rest_is_replaced(runner, runs):
    scoring = runs(RayScoringPool)
    first = scoring.begin("DummyScorer", (0,))
    (before,) = process_ids(runner, first)
    scoring.end(first)
    process = psutil.Process(before)
    process.kill()
    process.wait(20)
    second = scoring.begin("DummyScorer", (0,))
    assert process_ids(runner, second) != [before]
    scoring.end(second)


def test_after_a_run_that_failed_no_process_is_left(runner, runs):
    scoring = runs(RayScoringPool)
    first = scoring.begin("DummyScorer", (0,))
    (before,) = process_ids(runner, first)
    scoring.end(first, may_rest=False)
    psutil.wait_procs([psutil.Process(before)] if psutil.pid_exists(before) else [], timeout=20)
    assert not psutil.pid_exists(before)


def test_ranks_that_have_met_are_not_kept(runner, runs):
    policy = runs(RayPolicyPool, 2)
    first = policy.begin("DummyPolicy", (0,), (1,), ranks=True)
    before = set(process_ids(runner, first))
    policy.end(first)
    second = policy.begin("DummyPolicy", (0,), (1,), ranks=True)
    assert not before & set(process_ids(runner, second))
    policy.end(second)


def test_an_actor_that_hangs_is_ended(runner, runs, monkeypatch):
    monkeypatch.setattr("actors.remote_actor.FAREWELL_S", 0.2)
    policy = runs(RayPolicyPool)
    first = policy.begin("DummyPolicy", (0,))
    (before,) = process_ids(runner, first)

    async def hang():
        update = asyncio.create_task(first.update([HANG]))
        while not first.actors[0]._unanswered:
            await asyncio.sleep(0)
        update.cancel()
        await asyncio.gather(update, return_exceptions=True)

    runner.run(hang())
    policy.end(first)
    second = policy.begin("DummyPolicy", (0,))
    assert process_ids(runner, second) != [before]
    policy.end(second)


@pytest.mark.parametrize("can_stay", [True, False])
def test_an_engine_that_is_asked_for_again_stays_and_another_ends(runner, runs, can_stay, tmp_path):
    generation, grave = runs(RayGenerationPool), tmp_path / "grave"
    first = generation.begin("DummyEngine", (0.25, str(grave)))

    async def leave_open():
        await first.generate(ask("first"))
        request, submitted = asyncio.create_task(first.generate(ask("first-hang", HANG))), []
        while len(submitted) < 2:
            submitted, _ = await first.actors[0].call("history", deadline_s=20)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)

    runner.run(leave_open())
    (before,) = process_ids(runner, first)
    generation.end(first)
    second = generation.begin("DummyEngine", (0.25 if can_stay else 0.5, str(grave)))
    assert process_ids(runner, second) == [before], "the process stays in both cases"
    assert grave.exists() != can_stay
    assert len(runner.run(second.generate(ask("second")))) == 1
    submitted, _ = runner.run(second.actors[0].call("history", deadline_s=20))
    assert ("first-" in str(submitted)) == can_stay
    generation.end(second)
