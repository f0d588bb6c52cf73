import pytest

from actors.ray_pool import describe_shortage, plan_bundles
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
                policy=Pool(num_actors=3, gpus_per_actor=1.0),
                scoring=Pool(gpus_per_actor=0.5),
                reward=RewardPool(num_actors=2, cpus_per_actor=2.0, num_refit_ranks=3),
            ),
            {
                "generation": [GPU] * 2,
                "policy": [GPU] * 3,
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


def test_shortage_names_what_was_asked_for_and_what_is_free():
    text = describe_shortage([GPU, CPU], free={"CPU": 1.5}, total={"CPU": 2.0, "GPU": 0.0, "memory": 9.0})
    assert text == "asked for 2 bundles (0.1 CPU, 1 GPU + 0.1 CPU), the cluster has free 1.5 of 2 CPU, 0 of 0 GPU"
