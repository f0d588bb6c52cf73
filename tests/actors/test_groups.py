"""The pools over a real local Ray, with actors that have no networks (``dummy_actors``)."""

import asyncio
import dataclasses
import os
import pickle
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from dummy_actors import DIE, FAIL, HANG, UNSENDABLE
from ray.util import placement_group_table

from actors import placement
from actors.generation_group import RayGenerationPool
from actors.groups import PAIR_CHUNK, RayPolicyPool, RayRewardPool, RayScoringPool, split_evenly
from actors.placement import GroupRequest, Slot, plan_groups
from actors.remote_actor import ActorSpec
from actors.session import LOOPBACK, log_folder, ray_session
from actors.shared_group import Share, SharedGroup, StandingGroups, alone
from ocrm_ray.config import Deadlines, Pool, Pools, RewardPool
from ocrm_ray.errors import ActorDiedError, DeadlineError, Problem, RunError, UserError
from ocrm_ray.records import GenerationRequest, PolicyWeights, Prompt, RefitReport, RefitRequest, Sequence

pytestmark = pytest.mark.real

TOKEN = "hf_a_token_that_no_log_may_show"
DEADLINES = Deadlines(start_s=60, request_s=20, publish_s=20, refit_s=20)
HASTY = Deadlines(start_s=60, request_s=0.3, publish_s=0.3, refit_s=0.3)
BUNDLE = {"CPU": 0.1}
SNAPSHOT = PolicyWeights(version=7, path=Path("unread"), num_bytes=11)


@pytest.fixture(scope="module")
def session():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        with ray_session("test") as session:
            patch.delenv("HF_TOKEN")
            yield session


@pytest.fixture(scope="module")
def runner(session):
    """One event loop for the module: a pool lives on the loop that started it."""
    with asyncio.Runner() as runner:
        yield runner


def start(runner, pool_class, *actors, deadlines=DEADLINES):
    """A pool of ``actors``, each (class name, arguments)."""
    specs = [
        ActorSpec(f"{pool_class.name}-{index}", f"dummy_actors:{name}", arguments, 1, name == "DummyEngine")
        for index, (name, arguments) in enumerate(actors)
    ]
    return runner.run(pool_class.start(specs, [BUNDLE] * len(specs), deadlines))


@pytest.fixture(scope="module")
def engines(runner):
    """Two engines that stand still for 0.25 and 0.5 s at a publish."""
    pool = start(runner, RayGenerationPool, ("DummyEngine", (0.25,)), ("DummyEngine", (0.5,)))
    yield pool
    runner.run(pool.close())


@pytest.fixture(scope="module")
def policy(runner):
    pool = start(runner, RayPolicyPool, ("DummyPolicy", (0,)), ("DummyPolicy", (1,)))
    yield pool
    runner.run(pool.close())


@pytest.fixture(scope="module")
def scoring(runner):
    pool = start(runner, RayScoringPool, *(("DummyScorer", (number,)) for number in range(3)))
    yield pool
    runner.run(pool.close())


@pytest.fixture(scope="module")
def reward(runner):
    pool = start(runner, RayRewardPool, ("DummyRewardServer", ()), ("DummyRefitter", ()))
    yield pool
    runner.run(pool.close())


def ask(name, text="", num_samples=1, seed=0):
    return GenerationRequest(name, Prompt(0, text, (1, 2)), num_samples, 8, 1.0, seed)


def respond(*tokens):
    return [Sequence((1,), (token,), has_eos=True) for token in tokens]


async def history(actor):
    """(batches submitted, requests aborted), as the engine saw them."""
    return await actor.call("history", deadline_s=20)


def test_requests_of_one_turn_reach_each_engine_as_one_message(runner, engines):
    async def generate():
        await asyncio.gather(*(engines.generate(ask(f"turn-{index}", seed=index)) for index in range(8)))
        return [(await history(actor))[0][-1] for actor in engines.actors]

    assert runner.run(generate()) == [[f"turn-{i}" for i in range(0, 8, 2)], [f"turn-{i}" for i in range(1, 8, 2)]]


def test_answers_in_another_order_reach_who_asked(runner, engines):
    async def generate():
        return await asyncio.gather(
            *(engines.generate(ask(f"order-{seed}", num_samples=2, seed=seed)) for seed in range(20))
        )

    answers = runner.run(generate())
    assert [{sample.sequence.response_ids for sample in samples} for samples in answers] == [
        {(seed,)} for seed in range(20)
    ]


def test_a_request_goes_to_the_engine_with_fewer_open_samples(runner, engines):
    async def generate():
        long = asyncio.create_task(engines.generate(ask("long", HANG, num_samples=50)))
        await asyncio.gather(*(engines.generate(ask(f"short-{index}")) for index in range(5)))
        batches = [(await history(actor))[0][-1] for actor in engines.actors]
        await engines.abort("long")
        await asyncio.wait([long])
        await asyncio.gather(*(engines.generate(ask(f"later-{index}")) for index in range(2)))
        return batches, [(await history(actor))[0][-1] for actor in engines.actors]

    during, after = runner.run(generate())
    assert sorted(during) == [["long"], [f"short-{index}" for index in range(5)]]
    assert sorted(after) == [["later-0"], ["later-1"]]


def test_a_full_engine_leaves_requests_in_the_queue_until_one_ends(runner):
    pool = start(runner, RayGenerationPool, ("DummyEngine", ()))
    pool.max_open_samples = 2

    async def generate():
        long = asyncio.create_task(pool.generate(ask("long", HANG)))
        waiting = [asyncio.create_task(pool.generate(ask(name))) for name in ("first", "second")]
        await asyncio.wait(waiting)
        batches = (await history(pool.actors[0]))[0]
        await pool.abort("long")
        await asyncio.wait([long])
        return batches

    assert runner.run(generate()) == [["long", "first"], ["second"]]
    runner.run(pool.close())


def test_an_urgent_request_overtakes_those_that_wait_for_an_engine(runner):
    pool = start(runner, RayGenerationPool, ("DummyEngine", ()))
    pool.max_open_samples = 1

    async def generate():
        requests = [ask("first"), ask("second"), dataclasses.replace(ask("urgent"), priority=-1)]
        await asyncio.gather(*(pool.generate(request) for request in requests))
        return (await history(pool.actors[0]))[0]

    assert runner.run(generate()) == [["urgent"], ["first"], ["second"]]
    runner.run(pool.close())


def test_a_request_larger_than_an_engine_s_room_runs_alone(runner, engines):
    pool = start(runner, RayGenerationPool, ("DummyEngine", ()))
    pool.max_open_samples = 2
    assert len(runner.run(pool.generate(ask("large", num_samples=5)))) == 5
    runner.run(pool.close())


def test_a_request_that_fails_raises_its_own_error_and_no_other(runner, engines):
    async def generate():
        requests = [ask("works", seed=3), ask("fails", FAIL), ask("works too", seed=4)]
        return await asyncio.gather(*(engines.generate(request) for request in requests), return_exceptions=True)

    first, error, last = runner.run(generate())
    assert isinstance(error, LookupError)
    assert str(error) == "fails"
    assert [samples[0].sequence.response_ids for samples in (first, last)] == [(3,), (4,)]


def test_abort_cancels_the_request_and_tells_its_engine(runner, engines):
    async def generate():
        waiting = asyncio.create_task(engines.generate(ask("stuck", HANG)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # the request has left
        await engines.abort("stuck")
        await asyncio.wait([waiting])
        return waiting.cancelled(), [(await history(actor)) for actor in engines.actors]

    cancelled, seen = runner.run(generate())
    assert cancelled
    assert [(["stuck"] in batches, "stuck" in aborted) for batches, aborted in seen].count((True, True)) == 1


def test_a_request_aborted_before_it_left_is_never_sent(runner, engines):
    async def generate():
        calls = engines.generate(ask("early")), engines.generate(ask("other", seed=6)), engines.abort("early")
        early, other, _ = await asyncio.gather(*calls, return_exceptions=True)
        return early, other, [batch for actor in engines.actors for batch in (await history(actor))[0]]

    early, other, batches = runner.run(generate())
    assert isinstance(early, asyncio.CancelledError)
    assert other[0].sequence.response_ids == (6,)
    assert not any("early" in batch for batch in batches)


def test_publish_reports_the_engine_that_stood_still_longest(runner, engines):
    report = runner.run(engines.load_weights(SNAPSHOT))
    assert (report.version, report.num_bytes, report.pause_s) == (7, 11, 0.5)


def test_engine_scores_come_from_every_engine_in_turn(runner, engines):
    assert np.array_equal(runner.run(engines.score(respond(5))), [[0.25], [0.5]])


def test_a_hanging_request_passes_its_deadline(runner):
    pool = start(runner, RayGenerationPool, ("DummyEngine", ()), deadlines=HASTY)
    with pytest.raises(DeadlineError, match=r"generation-0 .* generate of slow within 0\.3 s"):
        runner.run(pool.generate(ask("slow", HANG)))
    runner.run(pool.close())


def test_the_death_of_an_engine_reaches_every_open_request(runner):
    pool = start(runner, RayGenerationPool, ("DummyEngine", ()))

    async def generate():
        waiting = asyncio.create_task(pool.generate(ask("waiting", HANG)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        dying = pool.generate(ask("dying", DIE))
        return await asyncio.gather(waiting, dying, return_exceptions=True)

    errors = runner.run(generate())
    assert [type(error) for error in errors] == [ActorDiedError, ActorDiedError]
    assert all("generation-0" in str(error) for error in errors)
    runner.run(pool.close())


@pytest.mark.parametrize("yields", [False, True])
def test_only_an_actor_that_yields_runs_under_sched_idle_with_every_thread(runner, yields):
    spec = ActorSpec("generation-0", "dummy_actors:DummyEngine", (), 1, asynchronous=True, yields=yields)
    pool = runner.run(RayGenerationPool.start([spec], [BUNDLE], DEADLINES))
    process = psutil.Process(runner.run(pool.actors[0].call("process_id", deadline_s=20)))
    policies = {os.sched_getscheduler(thread.id) for thread in process.threads()}
    runner.run(pool.close())
    assert policies == {os.SCHED_IDLE if yields else os.SCHED_OTHER}


def test_close_shuts_the_engine_down_and_leaves_no_process(runner, tmp_path):
    pool = start(runner, RayGenerationPool, ("DummyEngine", (0.0, str(tmp_path / "grave"))))
    process = psutil.Process(runner.run(pool.actors[0].call("process_id", deadline_s=20)))
    runner.run(pool.close())
    assert psutil.wait_procs([process], timeout=20)[1] == []
    assert (tmp_path / "grave").read_text() == "shut down"


def test_every_rank_takes_a_policy_call_and_the_first_one_answers(runner, policy):
    assert runner.run(policy.update([])).version == 0


def test_the_trainer_sends_only_weights_that_engines_get_by_nccl(runner, policy):
    runner.run(policy.send_weights(SNAPSHOT))
    with pytest.raises(LookupError, match="asked to send version 7"):
        runner.run(policy.send_weights(dataclasses.replace(SNAPSHOT, nccl={"group": {}})))


def test_what_an_actor_raises_is_what_the_caller_gets(runner, policy):
    with pytest.raises(UserError) as caught:
        runner.run(policy.update([FAIL]))
    assert type(caught.value) is UserError
    assert str(caught.value) == "gold.path: got nothing, need a function: write one"
    assert "raised in policy-" in caught.value.__notes__[0]
    assert "dummy_actors.py" in caught.value.__notes__[0]


def test_an_error_that_cannot_be_sent_still_says_what_it_was(runner, policy):
    with pytest.raises(
        RunError, match=r"(?s)policy-[01]\.update failed with an error that cannot be sent.*LookupError"
    ):
        runner.run(policy.update([UNSENDABLE]))


def test_a_user_error_survives_pickling_with_its_problems():
    problems = (Problem("a.b", "1", "2", "count"), Problem("c", "x", "y", "spell"))
    copy = pickle.loads(pickle.dumps(UserError(problems)))
    assert (copy.problems, str(copy)) == (problems, str(UserError(problems)))


@pytest.mark.parametrize(
    ("lever", "error", "message"),
    [
        (HANG, DeadlineError, r"policy-0 did not answer update within 0\.3 s"),
        (DIE, ActorDiedError, "policy-0 died during update"),
    ],
)
def test_a_policy_that_hangs_or_dies_is_named(runner, lever, error, message):
    pool = start(runner, RayPolicyPool, ("DummyPolicy", (0,)), deadlines=HASTY if lever is HANG else DEADLINES)
    pool.has_farewell = False
    with pytest.raises(error, match=message):
        runner.run(pool.update([lever]))
    runner.run(pool.close())


def test_an_actor_that_cannot_start_says_why_and_leaves_nothing(runner):
    before = placed_groups("policy")
    with pytest.raises(LookupError, match="no such model"):
        start(runner, RayPolicyPool, ("DummyPolicy", (FAIL,)))
    assert placed_groups("policy") == before


def test_a_pool_that_finds_no_place_says_what_is_missing_and_leaves_the_queue(runner, monkeypatch):
    monkeypatch.setattr(placement, "_REPORT_S", 0.05)
    before, told = placed_groups("reward"), []
    spec = ActorSpec("reward-0", "dummy_actors:DummyRefitter", (), 1)
    share = alone("reward", [{"CPU": 0.1, "GPU": 5}], lambda *wait: told.append(wait))
    with pytest.raises(DeadlineError, match=r"pool reward .* 1 x 0.1 CPU \+ 5 GPU find no node .* 0 of 0 GPU left"):
        runner.run(RayRewardPool.start_in(share, [spec], Deadlines(start_s=0.5)))
    assert placed_groups("reward") == before
    assert "0 of 0 GPU left" in told[0][1]
    assert told[-1] == ("reward", None)


def test_the_clusters_nodes_are_read_with_what_is_free(runner, policy):
    (node,) = placement.live_nodes()
    assert node.total["CPU"] == ray.cluster_resources()["CPU"] > node.free["CPU"]
    assert node.labels["ray.io/node-id"] == ray.nodes()[0]["NodeID"]
    assert placement.cluster_problems(Pools(), [node]) == []
    (problem,) = placement.cluster_problems(Pools(policy=Pool(resources={"policy": 0.01})), [node])
    assert "0 of 0 policy left" in problem.need


def test_a_node_with_another_label_is_not_taken(runner):
    (node,) = ray.nodes()
    slot = Slot("reward", BUNDLE, {"ray.io/node-id": f"!{node['NodeID']}"})
    spec = ActorSpec("reward-0", "dummy_actors:DummyRefitter", (), 1)
    share = Share(SharedGroup(GroupRequest("reward", (slot,))))
    with pytest.raises(DeadlineError, match=r"1 x 0.1 CPU .*label ray.io/node-id is"):
        runner.run(RayRewardPool.start_in(share, [spec], Deadlines(start_s=0.5)))


def test_colocated_pools_are_in_one_group_until_it_ends_and_a_new_actor_is_in_the_old_bundle(
    runner,
):
    settings = Pools(
        policy=Pool(num_actors=2, strategy="strict_pack"), reward=RewardPool(cpus_per_actor=0.2, colocate_with="policy")
    )
    before, groups = len(placed_groups("policy")), StandingGroups()
    found = groups.shares(plan_groups(settings))
    policy = [ActorSpec(f"policy-{rank}", "dummy_actors:DummyPolicy", (rank,), 1) for rank in range(2)]
    reward = [ActorSpec(f"reward-{name}", f"dummy_actors:Dummy{name}", (), 1) for name in ("RewardServer", "Refitter")]

    async def play():
        first, second = await asyncio.gather(
            RayPolicyPool.start_in(found["policy"], policy, DEADLINES),
            RayRewardPool.start_in(found["reward"], reward, DEADLINES),
        )
        placed = placed_groups("policy")
        second.actors[1].replace()
        await second.actors[1].start(DEADLINES.start_s)
        await first.close()
        still = placed_groups("policy")
        report = await second.refit(RefitRequest(1, np.arange(3), None, seed=0))
        await second.close()
        left = placed_groups("policy")
        await groups.end()
        return len(placed), len(still), len(left), report.reward_version

    assert placed_groups("reward") == []
    assert runner.run(play()) == (before + 1, before + 1, before + 1, 1)
    assert len(placed_groups("policy")) == before


def test_an_actor_gets_its_threads_and_the_token_but_no_log_does(runner, session, policy, tmp_path):
    runner.run(policy.save(str(tmp_path / "environment")))
    threads, math_threads, token = (tmp_path / "environment").read_text().splitlines()
    assert (threads, math_threads) == ("OMP_NUM_THREADS=1", "MKL_NUM_THREADS=1")
    assert token == f"HF_TOKEN={TOKEN}"
    logs = [path for path in Path(log_folder()).rglob("*") if path.is_file()]
    assert any("OMP_NUM_THREADS" in path.read_text(errors="replace") for path in logs)
    assert not any(TOKEN in path.read_text(errors="replace") for path in logs)


def test_a_batch_is_spread_over_the_scorers_and_comes_back_in_order(runner, scoring):
    anchors, sft = runner.run(scoring.score(respond(*range(5)), ("staged", "sft")))
    assert [row.tolist() for row in sft] == [[0, 0], [1, 0], [2, 1], [3, 1], [4, 1]]
    assert [row.tolist() for row in anchors] == [[2.0]] * 5


def test_pairs_go_in_chunks_to_the_background_actor_alone(runner, scoring):
    indices = np.arange(PAIR_CHUNK + 3)[::-1]
    logprobs = runner.run(scoring.pair_logprobs(SNAPSHOT, indices))
    assert np.array_equal(logprobs, np.stack([indices, np.full(len(indices), 7)], axis=1))
    chunks = runner.run(chunks_of(scoring))
    assert chunks == [[], [], [PAIR_CHUNK, 3]]


async def chunks_of(pool):
    return [await actor.call("history", deadline_s=20) for actor in pool.actors]


@pytest.mark.parametrize("num_sequences", [0, 1, 5])
def test_rewards_come_back_in_order_as_float32(runner, reward, num_sequences):
    scores = runner.run(reward.score(respond(*range(num_sequences)), "staged"))
    assert scores.tolist() == [index + 0.5 for index in range(num_sequences)]
    assert scores.dtype == np.float32


def test_serving_goes_on_while_a_refit_runs(runner, tmp_path):
    until = tmp_path / "scored"
    reward = start(runner, RayRewardPool, ("DummyRewardServer", ()), ("DummyRefitter", (until,)))

    async def refit_and_score():
        refit = asyncio.create_task(reward.refit(RefitRequest(2, np.arange(3), None, seed=0)))
        scores = await reward.score(respond(4))
        until.touch()
        return scores.tolist(), (await refit).reward_version

    assert runner.run(refit_and_score()) == ([4.0], 2)
    runner.run(reward.close())


def test_staging_returns_the_servers_calibration(runner, reward):
    refit = RefitReport(3, Path(), 0.0, 1.0, 0.5)
    assert runner.run(reward.stage("p", refit)).mean == 3.0


@pytest.mark.parametrize(("num_items", "num_parts"), [(0, 2), (1, 3), (7, 3), (8, 4)])
def test_shares_are_even_complete_and_never_empty(num_items, num_parts):
    shares = split_evenly(range(num_items), num_parts)
    lengths = [len(share) for share in shares]
    assert [item for share in shares for item in share] == list(range(num_items))
    assert not lengths or (min(lengths) >= 1 and max(lengths) - min(lengths) <= 1)
    assert len(shares) == min(num_items, num_parts)


def listening(process):
    """Where a process listens; nowhere if it has ended meanwhile."""
    try:
        found = process.net_connections("tcp")
    except psutil.NoSuchProcess:
        return []
    return [connection.laddr.ip for connection in found if connection.status == psutil.CONN_LISTEN]


def test_ray_listens_on_loopback_alone(session):
    addresses = [address for process in psutil.Process().children(recursive=True) for address in listening(process)]
    assert ray.get_runtime_context().gcs_address.startswith(LOOPBACK)
    assert addresses
    assert {address.removeprefix("::ffff:") for address in addresses} == {LOOPBACK}


def placed_groups(pool):
    groups = placement_group_table().values()
    return [group["name"] for group in groups if group["name"].startswith(pool) and group["state"] != "REMOVED"]


def test_weights_in_the_object_store_reach_scorers_in_place_and_engines_through_one_file_of_their_node(runner, session):
    import torch

    from actors.weight_transport import LocalCopy, WeightExporter, WeightReader

    async def publish(version, tensors):
        weights = exporter.export(version, [tensors])
        local = await copy.fetch(weights)
        for read in (weights, local):
            with reader.read(read) as received:
                assert {name: value.tolist() for name, value in received.items()} == {
                    name: value.tolist() for name, value in tensors.items()
                }
        exporter.release(weights)
        return local.path

    versions = [
        {"a": torch.full((3, 5), float(version)), "b": torch.arange(version, version + 7)} for version in (1, 2)
    ]
    exporter, copy, reader = WeightExporter(None, versions[0], True), LocalCopy(), WeightReader()
    first, second = (runner.run(publish(version, tensors)) for version, tensors in enumerate(versions, start=1))
    assert first == second
    assert first.exists()
    copy.close()
    assert not first.parent.exists()


def test_weights_that_come_by_nccl_are_not_fetched_from_the_store_too(runner):
    from actors.weight_transport import LocalCopy

    weights = dataclasses.replace(SNAPSHOT, reference=object(), nccl=("127.0.0.1", 1))
    assert runner.run(LocalCopy().fetch(weights)) is weights
