"""An actor that dies is replaced, and its work is done by the one in its place: on a real local Ray."""

import asyncio
from pathlib import Path

import numpy as np
import psutil
import pytest
from dummy_actors import DEADLY, DIE, ENDLESS, HANG
from test_groups import DEADLINES, SNAPSHOT, ask, respond, runner, session, start

from actors.generation_group import RayGenerationPool
from actors.groups import RayRewardPool, RayScoringPool
from ocrm_ray.errors import ActorDiedError, RunError
from ocrm_ray.records import PolicyWeights, RefitRequest

pytestmark = pytest.mark.real

__all__ = ["runner", "session"]
NEXT = PolicyWeights(version=8, path=Path("unread"), num_bytes=11)


class Mortal:
    """A pool whose actors may be replaced so often, what it told of them, and a way to kill one."""

    def __init__(self, runner, pool, max_replacements=1):
        self.runner, self.pool, self.events = runner, pool, []
        pool.max_replacements = max_replacements
        pool.emit = lambda event, **fields: self.events.append((event, fields["actor"]))

    async def kill(self, number):
        process = psutil.Process(await self.pool.actors[number].call("process_id", deadline_s=20))
        process.kill()
        await asyncio.to_thread(process.wait, 20)

    def memory(self, number):
        return self.runner.run(self.pool.actors[number].call("memory", deadline_s=20))


@pytest.fixture
def engines(runner):
    mortal = Mortal(runner, start(runner, RayGenerationPool, ("DummyEngine", ()), ("DummyEngine", ())))
    yield mortal
    runner.run(mortal.pool.close())


@pytest.fixture
def scorers(runner):
    mortal = Mortal(runner, start(runner, RayScoringPool, *(("DummyScorer", (number,)) for number in range(2))))
    yield mortal
    runner.run(mortal.pool.close())


def versions_of(answers):
    return {(sample.first_version, sample.last_version) for samples in answers for sample in samples}


def test_requests_of_a_dead_engine_are_answered_and_the_one_in_its_place_has_the_weights(runner, engines):
    async def play():
        await engines.pool.load_weights(SNAPSHOT)
        await engines.kill(0)
        answers = await asyncio.gather(*(engines.pool.generate(ask(f"n-{seed}", seed=seed)) for seed in range(6)))
        await engines.pool._engines[0].replacing
        later = await asyncio.gather(*(engines.pool.generate(ask(f"later-{seed}", seed=seed)) for seed in range(6)))
        return answers, later, (await engines.pool.actors[0].call("history", deadline_s=20))[0]

    answers, later, asked = runner.run(play())
    assert [samples[0].sequence.response_ids for samples in answers + later] == [(seed,) for seed in range(6)] * 2
    assert versions_of(answers + later) == {(7, 7)}
    assert any("later-0" in batch for batch in asked), "the new engine works"
    told = [event for event, actor in engines.events if actor == "generation-0"]
    assert told == ["actor_died", "actor_restarted", "engine_answers"]


def test_an_open_request_is_sent_again_when_its_engine_dies(runner, engines):
    async def play():
        engines.pool.max_open_samples = 1
        hanging = [asyncio.create_task(engines.pool.generate(ask(f"hang-{n}", HANG))) for n in range(2)]
        histories = [[], []]
        while not all(histories):
            histories = [(await actor.call("history", deadline_s=20))[0] for actor in engines.pool.actors]
        await engines.kill(1)
        while not engines.pool._engines[1].replacing:
            await asyncio.sleep(0)
        await engines.pool._engines[1].replacing
        while not (again := (await engines.pool.actors[1].call("history", deadline_s=20))[0]):
            await asyncio.sleep(0)
        for task in hanging:
            task.cancel()
        return histories[1], again

    before, again = runner.run(play())
    assert before == again


def test_a_new_engine_waits_for_weights_whose_place_is_not_being_written(runner, engines):
    async def play():
        await engines.pool.load_weights(SNAPSHOT)
        await engines.kill(0)
        await engines.pool.generate(ask("finds it dead"))
        await engines.pool.forget(SNAPSHOT)
        while engines.pool.actors[0].num_replaced == 0:
            await asyncio.sleep(0)
        await asyncio.wait([engines.pool._engines[0].replacing], timeout=0.5)
        is_up_before = engines.pool._engines[0].is_up
        report = await engines.pool.load_weights(NEXT)
        await engines.pool._engines[0].replacing
        answers = await asyncio.gather(*(engines.pool.generate(ask(f"n-{seed}")) for seed in range(4)))
        return is_up_before, report.version, versions_of(answers)

    assert runner.run(play()) == (False, 8, {(8, 8)})


def test_weights_go_to_the_one_in_its_place_where_the_only_engine_is_dead(runner):
    mortal = Mortal(runner, start(runner, RayGenerationPool, ("DummyEngine", ())))

    async def play():
        await mortal.kill(0)
        report = await mortal.pool.load_weights(SNAPSHOT)
        return report.version, versions_of([await mortal.pool.generate(ask("n"))])

    assert runner.run(play()) == (7, {(7, 7)})
    runner.run(mortal.pool.close())


def test_a_request_that_kills_every_engine_fails_when_they_were_replaced_often_enough(runner):
    mortal = Mortal(runner, start(runner, RayGenerationPool, ("DummyEngine", ())), max_replacements=2)
    with pytest.raises(ActorDiedError, match="generation-0"):
        runner.run(mortal.pool.generate(ask("poison", DIE)))
    assert mortal.events == [("actor_died", "generation-0"), ("actor_restarted", "generation-0")] * 2
    runner.run(mortal.pool.close())


def test_a_scorer_in_the_place_of_a_dead_one_has_its_anchors_and_answers(runner, scorers):
    async def play():
        await scorers.pool.stage_anchor("first", SNAPSHOT)
        await scorers.pool.commit("first", 7)
        await scorers.pool.capture()
        await scorers.pool.stage_anchor("second", NEXT)
        await scorers.kill(0)
        return await scorers.pool.score(respond(5), ("sft",))

    assert runner.run(play())[0][0].tolist() == [5, 0]
    first = [("stage_anchor", "first", 7), ("commit", "first", 7)]
    assert scorers.memory(0) == [*first, ("capture",), *first, ("stage_anchor", "second", 8)]
    assert scorers.events == [("actor_died", "scoring-0"), ("actor_restarted", "scoring-0")]


def test_pair_ratios_go_on_in_the_place_of_a_dead_background_scorer(runner, scorers):
    async def play():
        await scorers.kill(1)
        return await scorers.pool.pair_logprobs(SNAPSHOT, np.arange(3))

    assert runner.run(play()).tolist() == [[0, 7], [1, 7], [2, 7]]
    assert scorers.memory(1) == []


def test_the_death_of_the_refitter_fails_the_refit_and_the_next_one_has_another(runner):
    mortal = Mortal(runner, start(runner, RayRewardPool, ("DummyRewardServer", ()), ("DummyRefitter", ())))
    with pytest.raises(RunError, match=r"(?s)reward-1 died during refit.*another process") as caught:
        runner.run(mortal.pool.refit(RefitRequest(1, np.arange(3), None, seed=DEADLY)))
    assert not isinstance(caught.value, ActorDiedError), "a correction tries again after other failures only"
    assert runner.run(mortal.pool.refit(RefitRequest(1, np.arange(3), None, seed=0))).reward_version == 1
    runner.run(mortal.pool.close())


def test_a_refit_that_passes_its_deadline_leaves_the_next_one_another_process(runner):
    deadlines = DEADLINES.model_copy(update={"refit_s": 0.5})
    pool = start(runner, RayRewardPool, ("DummyRewardServer", ()), ("DummyRefitter", ()), deadlines=deadlines)
    mortal = Mortal(runner, pool)
    with pytest.raises(RunError, match=r"reward-1 did not answer refit within 0.5 s; another process"):
        runner.run(pool.refit(RefitRequest(1, np.arange(3), None, seed=ENDLESS)))
    assert mortal.events == [("actor_died", "reward-1"), ("actor_restarted", "reward-1")]
    pool.deadlines = DEADLINES
    assert runner.run(pool.refit(RefitRequest(2, np.arange(3), None, seed=0))).reward_version == 2
    runner.run(pool.close())


def test_a_scorer_that_replaces_a_dead_one_is_not_told_of_what_a_failed_correction_staged(runner, scorers):
    async def play():
        await scorers.pool.stage_anchor("failed", SNAPSHOT)
        await scorers.pool.discard()
        await scorers.kill(0)
        return await scorers.pool.score(respond(5), ("sft",))

    assert runner.run(play())[0][0].tolist() == [5, 0]
    assert scorers.memory(0) == []
