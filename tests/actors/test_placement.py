"""What pools ask of Ray, and what of it a cluster lacks: told from node tables, without Ray."""

import asyncio
from pathlib import Path

import pytest

from actors.placement import (
    GroupRequest,
    Node,
    Slot,
    cluster_problems,
    matches,
    plan_bundles,
    plan_groups,
    shortage,
    unplaced,
)
from actors.ray_cluster import RunActor
from actors.shared_group import StandingGroups
from ocrm_ray.config import GenerationPool, Pool, Pools, RewardPool

CPU = {"CPU": 0.1}
GPU = {"CPU": 0.1, "GPU": 1.0}


@pytest.mark.parametrize(
    ("pools", "expected"),
    [
        (
            Pools(),
            {"generation": [CPU], "policy": [CPU], "scoring": [CPU] * 2, "reward": [CPU] * 2, "evaluation": [CPU]},
        ),
        (
            Pools(
                generation=GenerationPool(num_actors=2, gpus_per_actor=1.0),
                policy=Pool(num_actors=3, gpus_per_actor=1.0, resources={"policy": 0.01}),
                scoring=Pool(gpus_per_actor=0.5),
                reward=RewardPool(num_actors=2, cpus_per_actor=2.0, num_refit_ranks=3),
            ),
            {
                "generation": [GPU] * 2,
                "policy": [GPU | {"policy": 0.01}] * 3,
                "scoring": [{"CPU": 0.1, "GPU": 0.5}] * 2,
                "reward": [{"CPU": 2.0}] * 5,
                "evaluation": [CPU],
            },
        ),
    ],
    ids=["defaults fit two cores", "on GPUs the background actors get their own share"],
)
def test_plan_has_a_bundle_for_every_actor_of_every_pool(pools, expected):
    assert plan_bundles(pools) == expected


def test_bundles_of_a_plan_do_not_share_one_dictionary():
    first, second = plan_bundles(Pools(policy=Pool(num_actors=2)))["policy"]
    assert first is not second


def groups_of(**pools):
    return {group.name: group for group in plan_groups(Pools(**pools))}


def test_a_colocated_pool_is_behind_its_host_and_keeps_its_labels():
    groups = groups_of(
        generation=GenerationPool(num_actors=2, strategy="strict_pack"),
        scoring=Pool(colocate_with="generation", labels={"zone": "a"}),
        policy=Pool(colocate_with="generation", resources={"policy": 0.01}),
    )
    assert list(groups) == ["generation", "reward", "evaluation"]
    assert groups["generation"].strategy == "strict_pack"
    assert groups["generation"].slots == (
        *(Slot("generation", CPU) for _ in range(2)),
        Slot("policy", CPU | {"policy": 0.01}),
        *(Slot("scoring", CPU, {"zone": "a"}) for _ in range(2)),
    )
    found = StandingGroups().shares(list(groups.values()))
    assert {name: share.first for name, share in found.items()} == {
        "generation": 0, "policy": 2, "scoring": 3, "reward": 0, "evaluation": 0,
    }  # fmt: skip
    assert found["policy"].group is found["generation"].group is not found["reward"].group


def node(name, labels=None, busy=None, **resources):
    free = {key: amount - (busy or {}).get(key, 0.0) for key, amount in resources.items()}
    return Node(name, resources, free, labels or {})


def asked(strategy, *bundles, labels=None):
    return GroupRequest("policy", tuple(Slot("policy", bundle, labels or {}) for bundle in bundles), strategy)


FOUR = [node(f"n{number}", CPU=8, GPU=4) for number in range(2)]


@pytest.mark.parametrize(
    ("strategy", "num_asked", "num_missing"),
    [
        ("pack", 8, 0),
        ("pack", 9, 1),
        ("spread", 8, 0),
        ("spread", 9, 1),
        ("strict_pack", 4, 0),
        ("strict_pack", 5, 1),
        ("strict_spread", 2, 0),
        ("strict_spread", 3, 1),
    ],
)
def test_each_strategy_finds_the_places_that_there_are(strategy, num_asked, num_missing):
    assert len(unplaced([asked(strategy, *[GPU] * num_asked)], FOUR)[0]) == num_missing


def left_of(strategy, num_asked):
    _, left = unplaced([asked(strategy, *[GPU] * num_asked)], FOUR)
    return sorted(free["GPU"] for free in left.values())


def test_packed_actors_are_on_few_nodes_and_spread_ones_on_all():
    assert left_of("pack", 4) == left_of("strict_pack", 4) == [0, 4]
    assert left_of("spread", 4) == [2, 2]


def test_a_group_on_one_node_is_placed_before_others_take_parts_of_all():
    requests = [asked("spread", *[GPU] * 4), asked("strict_pack", *[GPU] * 4)]
    assert unplaced(requests, FOUR)[0] == []


def test_a_large_actor_is_placed_before_small_ones_take_parts_of_its_node():
    nodes = [node("small", CPU=16, GPU=1), node("large", CPU=8, GPU=4)]
    large = GPU | {"GPU": 4.0}
    assert unplaced([asked("pack", GPU), asked("pack", large)], nodes)[0] == []
    assert unplaced([asked("pack", GPU, large)], nodes)[0] == []


def test_custom_resources_and_labels_decide_which_node_is_taken():
    nodes = [node("a", CPU=8, policy=1), node("b", {"zone": "b"}, CPU=8, policy=1)]
    missing, left = unplaced([asked("pack", CPU | {"policy": 0.5}, labels={"zone": "b"})], nodes)
    assert missing == []
    assert [free["policy"] for free in left.values()] == [1, 0.5]
    assert len(unplaced([asked("pack", CPU | {"reward": 0.01})], nodes)[0]) == 1


@pytest.mark.parametrize(
    ("selector", "matching"),
    [("a", ["a"]), ("!a", ["b", None]), ("in(a,b)", ["a", "b"]), ("in(a, b)", ["a", "b"]), ("!in(a,b)", [None])],
)
def test_label_selectors_are_read_as_rays(selector, matching):
    assert [value for value in ("a", "b", None) if matches(selector, value)] == matching


def test_a_shortage_names_the_actors_and_what_each_node_lacks():
    nodes = [node("n0", {"zone": "a"}, CPU=8, GPU=4), node("n1", {"zone": "b"}, busy={"GPU": 3}, CPU=8, GPU=4)]
    text = shortage([asked("pack", *[GPU] * 3, labels={"zone": "b"})], nodes)["policy"]
    assert text == ("2 x 0.1 CPU + 1 GPU + label zone=b find no node (n0: label zone is a; n1: 0 of 4 GPU left)")
    assert shortage([asked("pack", GPU, labels={"zone": "b"})], nodes) == {}
    strict = shortage([asked("strict_spread", CPU, CPU, CPU)], nodes)["policy"]
    assert strict == "1 x 0.1 CPU find no node (n0, n1: not beside the others)"


def test_a_cluster_without_room_is_told_pool_by_pool_with_every_node():
    pools = Pools(
        generation=GenerationPool(num_actors=2, gpus_per_actor=2.0, strategy="strict_spread"),
        policy=Pool(num_actors=4, gpus_per_actor=1.0, resources={"policy": 0.01}),
    )
    nodes = [node("n0", CPU=8, GPU=4), node("n1", CPU=8, GPU=4, policy=1)]
    assert [str(problem) for problem in cluster_problems(pools, nodes)] == [
        "pools.policy: got 4 actors (pack), need room: 2 x 0.1 CPU + 1 GPU + 0.01 policy find no node "
        "(n0: 0 of 0 policy left; n1: 0 of 4 GPU left): add nodes, or lower num_actors, cpus_per_actor or "
        "gpus_per_actor"
    ]
    enough = [*nodes, node("n2", CPU=8, GPU=2, policy=1)]
    assert cluster_problems(pools, enough) == []
    busy = [*nodes, node("n2", CPU=8, GPU=2, policy=1, busy={"GPU": 1})]
    assert [(problem.path, problem.do) for problem in cluster_problems(pools, busy)] == [
        ("pools.policy", "wait until it is free")
    ]


def test_a_cluster_without_nodes_has_no_room_for_anything():
    problems = cluster_problems(Pools(), [])
    assert [problem.path.removeprefix("pools.") for problem in problems] == [
        "coordinator", "generation", "policy", "scoring", "reward", "evaluation",
    ]  # fmt: skip
    assert "there is none" in problems[0].need


def test_a_run_shows_what_it_waits_for_until_it_has_a_place():
    actor = RunActor(Path("unused"))

    async def play():
        actor._tell_wait("policy", "pool policy: no GPU")
        actor._tell_wait("reward", "pool reward: no GPU")
        waiting = await actor.progress()
        actor._tell_wait("policy", None)
        return waiting.figures, (await actor.progress()).figures

    assert asyncio.run(play()) == (
        "waiting: pool policy: no GPU; waiting: pool reward: no GPU",
        "waiting: pool reward: no GPU",
    )
