"""Pools whose actors are ranks of one process group: order of calls, failures, replacement. No Ray, no network."""

import asyncio
import os
from pathlib import Path

import pytest

from actors import placement, ray_cluster, shared_group
from actors.groups import RayPolicyPool, RayRewardPool
from actors.ray_pool import together
from actors.remote_actor import ActorHost, ActorSpec, ranks_of
from actors.shared_group import StandingGroups
from ocrm_ray.config import Deadlines, RunConfig
from ocrm_ray.errors import ActorDiedError, RunError
from ocrm_ray.records import RefitReport


class Rank:
    """Stands in for a ``RemoteActor``; ``answers``: what its calls give, or raise."""

    def __init__(self, role, rank=0, num_ranks=1, answers=()):
        self.role, self.rank, self.num_ranks = role, rank, num_ranks
        self.num_replaced = 0
        self.answers, self.told = list(answers), []

    async def call(self, method, *arguments, deadline_s):
        self.told.append(method)
        await asyncio.sleep(0)
        self.told.append(f"{method} done")
        answer = self.answers.pop(0) if self.answers else self.rank
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def meeting_point(self, deadline_s):
        return "node", 1234

    def replace(self):
        self.num_replaced += 1

    async def start(self, deadline_s, meeting):
        self.told.append(("start", meeting))


def test_calls_of_the_policy_pool_reach_every_rank_one_after_another():
    ranks = [Rank(f"policy-{rank}", rank, 2) for rank in range(2)]

    async def play():
        pool = RayPolicyPool(ranks, None, Deadlines())
        return await asyncio.gather(pool.logprobs(()), pool.stage("promotion", None), pool.export_weights())

    assert asyncio.run(play()) == [0, 0, 0], "rank 0 answers for all"
    for rank in ranks:
        methods = ("logprobs", "stage", "export_weights")
        assert rank.told == [step for method in methods for step in (method, f"{method} done")]


def test_a_death_is_told_rather_than_the_broken_connections_of_the_others():
    async def play():
        noticed = asyncio.Event()

        async def survivor():
            noticed.set()
            raise RuntimeError("connection closed by peer")

        async def dead():
            await noticed.wait()
            await asyncio.sleep(0)
            raise ActorDiedError("actor policy-1 died")

        await together([survivor(), dead()])

    with pytest.raises(ActorDiedError, match="policy-1"):
        asyncio.run(play())


def test_all_ranks_of_a_refit_are_replaced_when_one_of_them_dies_and_the_server_stays():
    server = Rank("reward-0")
    refitters = [
        Rank("refit-0", 0, 2, [RuntimeError("connection closed by peer"), "a report"]),
        Rank("refit-1", 1, 2, [ActorDiedError("actor refit-1 died")]),
    ]

    async def play():
        pool = RayRewardPool([server, *refitters], None, Deadlines())
        pool.max_replacements = 1
        with pytest.raises(RunError, match=r"refit-1 died; another process") as caught:
            await pool.refit(None)
        assert not isinstance(caught.value, ActorDiedError)
        return await pool.refit(None)

    assert asyncio.run(play()) == "a report"
    assert [actor.num_replaced for actor in (server, *refitters)] == [0, 1, 1]
    for refitter in refitters:
        assert ("start", ("node", 1234)) in refitter.told


def test_scores_come_from_the_servers_alone_whatever_the_ranks_of_the_refit():
    actors = [Rank("reward-0"), Rank("reward-1"), *(Rank(f"refit-{rank}", rank, 3) for rank in range(3))]
    pool = RayRewardPool(actors, None, Deadlines())
    assert [actor.role for actor in pool.servers] == ["reward-0", "reward-1"]
    assert [actor.role for actor in pool.background] == ["refit-0", "refit-1", "refit-2"]


class Environment:
    """An actor that only looks at its surroundings."""

    def start(self):
        self.found = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}

    def look(self):
        return self.found


def test_a_rank_finds_in_its_environment_who_it_is_and_where_the_others_are(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "unset")
    _, second = ranks_of([ActorSpec(f"refit-{n}", "test_rank_groups:Environment", (), 1) for n in range(2)])
    host = ActorHost(second.role, {})
    host.start(second, ("10.0.0.7", 4711))
    expected = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4711"}
    assert host.call("look", ()) == expected


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Its policy's ranks are placed behind the servers and the refit's ranks."""
    pools = {
        "policy": {"num_actors": 3, "colocate_with": "reward"},
        "reward": {"num_actors": 2, "num_refit_ranks": 2},
    }
    config = RunConfig.model_validate({"name": "test", "output_dir": tmp_path, "pools": pools})
    monkeypatch.setattr(ray_cluster, "_num_nodes", lambda: 1)
    return ray_cluster.RayCluster(config, tmp_path, lambda kind, figures: None, StandingGroups(), None)


def test_roles_and_ranks_of_trainers_follow_the_pools(cluster):
    specs = {pool: [(s.role, s.rank, s.num_ranks) for s in cluster._specs(pool)] for pool in ("policy", "reward")}
    assert specs["policy"] == [("policy-0", 0, 3), ("policy-1", 1, 3), ("policy-2", 2, 3)]
    assert specs["reward"] == [("reward-0", 0, 1), ("reward-1", 0, 1), ("refit-0", 0, 2), ("refit-1", 1, 2)]
    bundles = placement.plan_bundles(cluster.config.pools)
    assert {pool: len(bundles[pool]) for pool in specs} == {pool: len(found) for pool, found in specs.items()}


class Trainee(Rank):
    """Stands in for a rank of a stage; rank 0 is watched."""

    async def watch(self, method, *, tell, deadline_s):
        tell((1, 2))
        return await self.call(method, deadline_s=None)

    def kill(self):
        self.told.append("killed")


@pytest.mark.parametrize(
    ("stage", "method", "roles", "bundles"),
    [
        ("sft", "train", ["sft-0", "sft-1", "sft-2"], [4, 5, 6]),
        ("reward", "fit_first", ["reward-0", "reward-1"], [0, 1]),
    ],
)
def test_a_stage_trains_on_all_ranks_in_the_place_of_their_pool(cluster, monkeypatch, stage, method, roles, bundles):
    trainees, places, groups, shown = [], [], [], []

    async def place(request, deadline_s, tell):
        groups.append(request.name)
        return request.name

    def spawn(spec, where, kept):
        places.append((where.group, where.bundle))
        trainees.append(Trainee(spec.role, spec.rank, spec.num_ranks, [RefitReport(1, Path(), 0.0, 1.0, 0.5)]))
        return trainees[-1]

    async def train():
        await getattr(cluster, f"train_{stage}")(shown.append)
        assert groups == ["reward"], "the run keeps its place"
        await cluster.close()

    monkeypatch.setattr(shared_group, "place", place)
    monkeypatch.setattr(shared_group, "remove_placement_group", groups.remove)
    monkeypatch.setattr(shared_group, "RemoteActor", spawn)
    asyncio.run(train())
    assert [trainee.role for trainee in trainees] == roles
    assert places == [("reward", bundle) for bundle in bundles]
    for trainee in trainees:
        assert trainee.told == [("start", ("node", 1234)), method, f"{method} done", "killed"]
    assert [(state.stage, state.done, state.total) for state in shown] == [(stage, 1, 2)]
    assert groups == []
