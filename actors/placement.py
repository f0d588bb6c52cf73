"""Where actors run: the bundles that each pool asks the cluster for, and placement groups that are waited for."""

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from ocrm_ray.config import Pool, Pools
from ocrm_ray.errors import DeadlineError

logger = logging.getLogger(__name__)

Bundle = dict[str, float]

_REPORT_S = 10.0


def plan_bundles(pools: Pools) -> dict[str, list[Bundle]]:
    """Ray resources of every actor, by pool: one bundle an actor, in the order in which a pool spawns them.

    Two pools have one actor more than ``num_actors``, the last of its list: scoring its background actor
    (snapshots and pair ratios), reward its refitter. Evaluation always is one actor.
    """
    return {
        "generation": _bundles(pools.generation, pools.generation.num_actors),
        "policy": _bundles(pools.policy, pools.policy.num_actors),
        "scoring": _bundles(pools.scoring, pools.scoring.num_actors + 1),
        "reward": _bundles(pools.reward, pools.reward.num_actors + 1),
        "evaluation": _bundles(pools.evaluation, 1),
    }


def _bundles(pool: Pool, num_bundles: int) -> list[Bundle]:
    bundle = {"CPU": pool.cpus_per_actor}
    if pool.gpus_per_actor > 0:
        bundle["GPU"] = pool.gpus_per_actor
    return [dict(bundle) for _ in range(num_bundles)]


async def place(pool: str, bundles: Seq[Bundle], deadline_s: float) -> PlacementGroup:
    """Reserve ``bundles`` together as one placement group; every 10 s of waiting is logged.

    Raises DeadlineError with what was asked for and what is free; the group is then gone from the cluster.
    """
    # a suffix: Ray refuses a second group of one name, and a removed one keeps its name for a moment
    group = placement_group(list(bundles), strategy="PACK", name=f"{pool}-{secrets.token_hex(4)}")
    try:
        await _wait_until_placed(pool, group, bundles, deadline_s)
    except BaseException:
        remove_placement_group(group)
        raise
    return group


async def _wait_until_placed(pool: str, group: PlacementGroup, bundles: Seq[Bundle], deadline_s: float) -> None:
    started = time.monotonic()
    ready = asyncio.ensure_future(group.ready())
    try:
        while (left_s := started + deadline_s - time.monotonic()) > 0:
            done, _ = await asyncio.wait({ready}, timeout=min(left_s, _REPORT_S))
            if done:
                ready.result()
                return
            logger.info("pool %s waits for a place: %s", pool, describe_shortage(bundles, *_resources()))
    finally:
        ready.cancel()
    raise DeadlineError(
        f"pool {pool} was not placed within {deadline_s:g} s: {describe_shortage(bundles, *_resources())}; "
        f"free the cluster, add nodes, or lower pools.{pool}.num_actors, cpus_per_actor or gpus_per_actor"
    )


def _resources() -> tuple[Mapping[str, float], Mapping[str, float]]:
    return ray.available_resources(), ray.cluster_resources()


def describe_shortage(bundles: Seq[Bundle], free: Mapping[str, float], total: Mapping[str, float]) -> str:
    """What was asked for against what the cluster has, resource by resource."""
    asked = " + ".join(_amounts(bundle) for bundle in bundles)
    names = sorted({name for bundle in bundles for name in bundle})
    has = ", ".join(f"{free.get(name, 0.0):g} of {total.get(name, 0.0):g} {name}" for name in names)
    return f"asked for {len(bundles)} bundles ({asked}), the cluster has free {has}"


def _amounts(bundle: Bundle) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
