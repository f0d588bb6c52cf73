"""Where actors run: the bundles that each pool asks the cluster for, and placement groups that are waited for."""

import asyncio
import logging
import secrets
from collections.abc import Mapping
from collections.abc import Sequence as Seq

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from ocrm_ray.config import Pools
from ocrm_ray.errors import DeadlineError

logger = logging.getLogger(__name__)

Bundle = dict[str, float]

_REPORT_S = 10.0


def plan_bundles(pools: Pools) -> dict[str, list[Bundle]]:
    """Ray resources of every actor, by pool: one bundle an actor, in the order in which a pool spawns them.

    Two pools have one actor more than ``num_actors``, the last of its list: scoring its background actor
    (snapshots and pair ratios), reward its refitter. Evaluation always is one actor.
    """
    plan: dict[str, list[Bundle]] = {}
    for name, pool in pools:
        num_actors = 1 if name == "evaluation" else pool.num_actors + (name in ("scoring", "reward"))
        gpus = {"GPU": pool.gpus_per_actor} if pool.gpus_per_actor > 0 else {}
        plan[name] = [{"CPU": pool.cpus_per_actor, **gpus} for _ in range(num_actors)]
    return plan


async def place(pool: str, bundles: Seq[Bundle], deadline_s: float) -> PlacementGroup:
    """Reserve ``bundles`` together as one placement group; every 10 s of waiting is logged.

    Raises DeadlineError with what was asked for and what is free; the group is then gone from the cluster.
    """
    # a suffix: Ray refuses a second group of one name, and a removed one keeps its name for a moment
    group = placement_group(list(bundles), strategy="PACK", name=f"{pool}-{secrets.token_hex(4)}")
    ready = asyncio.ensure_future(group.ready())
    try:
        async with asyncio.timeout(deadline_s):
            while not (await asyncio.wait({ready}, timeout=_REPORT_S))[0]:
                logger.info("pool %s waits for a place: %s", pool, _shortage(bundles))
        ready.result()
        return group
    except BaseException as error:
        ready.cancel()
        remove_placement_group(group)
        if isinstance(error, TimeoutError):
            raise DeadlineError(
                f"pool {pool} was not placed within {deadline_s:g} s: {_shortage(bundles)}; "
                f"free the cluster, add nodes, or lower pools.{pool}.num_actors, cpus_per_actor or gpus_per_actor"
            ) from None
        raise


def _shortage(bundles: Seq[Bundle]) -> str:
    return describe_shortage(bundles, ray.available_resources(), ray.cluster_resources())


def describe_shortage(bundles: Seq[Bundle], free: Mapping[str, float], total: Mapping[str, float]) -> str:
    """What was asked for against what the cluster has, resource by resource."""
    asked = " + ".join(", ".join(f"{amount:g} {name}" for name, amount in bundle.items()) for bundle in bundles)
    names = sorted({name for bundle in bundles for name in bundle})
    has = ", ".join(f"{free.get(name, 0.0):g} of {total.get(name, 0.0):g} {name}" for name in names)
    return f"asked for {len(bundles)} bundles ({asked}), the cluster has free {has}"
