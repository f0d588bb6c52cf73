"""Where actors are placed: what each pool asks of Ray, what of it a cluster does not have, and waiting for it."""

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TypeAlias

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from actors.session import connection
from ocrm_ray.config import Pool, Pools
from ocrm_ray.errors import DeadlineError, Problem, UserError

logger = logging.getLogger(__name__)

Bundle: TypeAlias = dict[str, float]
Tell: TypeAlias = Callable[[str, str | None], None]
"""Told which group waits and what is missing, again and again, and None at the end of the wait."""

COORDINATOR: Bundle = {"CPU": 0.1}
_REPORT_S = 5.0
_EPSILON = 1e-6


@dataclass(frozen=True)
class Slot:
    """What one actor of a pool asks for; ``labels``: selectors, by the name of a node's label."""

    pool: str
    bundle: Bundle
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupRequest:
    """A placement group: the slots of the pool ``name``, then of those colocated with it."""

    name: str
    slots: tuple[Slot, ...]
    strategy: str = "pack"


@dataclass(frozen=True)
class Node:
    """A node of a cluster: its resources, what of them is free, and its labels."""

    name: str
    total: Mapping[str, float]
    free: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


def plan_bundles(pools: Pools) -> dict[str, list[Bundle]]:
    """Ray resources of every actor, by pool: one bundle an actor, in the order in which a pool spawns them.

    What corrections use is last in its list.
    """
    plan: dict[str, list[Bundle]] = {}
    for name, pool in pools:
        gpus = {"GPU": pool.gpus_per_actor} if pool.gpus_per_actor > 0 else {}
        plan[name] = [{"CPU": pool.cpus_per_actor, **gpus, **pool.resources} for _ in range(pools.num_placed(name))]
    return plan


def plan_groups(pools: Pools) -> list[GroupRequest]:
    """The placement groups of a run: one for each pool that is not colocated with another."""
    settings: dict[str, Pool] = dict(pools)
    slots = {
        name: tuple(Slot(name, bundle, settings[name].labels) for bundle in bundles)
        for name, bundles in plan_bundles(pools).items()
    }
    groups = {name: slots[name] for name in slots if settings[name].colocate_with is None}
    for guest, of_guest in slots.items():
        if (host := settings[guest].colocate_with) is not None:
            groups[host] += of_guest
    return [GroupRequest(name, of_group, settings[name].strategy) for name, of_group in groups.items()]


def unplaced(requests: Seq[GroupRequest], nodes: Seq[Node]) -> tuple[list[Slot], dict[str, Bundle]]:
    """The slots that find no node, and what the others leave free, by node: a greedy packing, as Ray's own is one.

    The largest actors come first. What a group without all its slots would take is not left for the next.
    """
    left = {node.name: dict(node.free) for node in nodes}
    missing: list[Slot] = []
    for request in sorted(requests, key=lambda request: (not request.strategy.startswith("strict"), _size(request))):
        missing += _fill(request, nodes, left)
    return missing, left


def _size(request: GroupRequest) -> float:
    """Groups with larger actors sort first."""
    return -max(slot.bundle.get("GPU", 0.0) for slot in request.slots)


def _fill(request: GroupRequest, nodes: Seq[Node], left: dict[str, Bundle]) -> list[Slot]:
    """Take the group's slots from ``left``, as its strategy says; returns those that found no node."""
    if request.strategy == "strict_pack":
        trials = []
        for node in nodes:
            trial = {node.name: dict(left[node.name])}
            trials.append((_take(request, [node], trial), trial))
        missing, taken = min(trials, key=lambda trial: len(trial[0]), default=(list(request.slots), {}))
        left.update(taken)
        return missing
    return _take(request, nodes, left)


def _take(request: GroupRequest, nodes: Seq[Node], left: dict[str, Bundle]) -> list[Slot]:
    used: Counter[str] = Counter()
    missing: list[Slot] = []
    spreads = 1 if request.strategy.endswith("spread") else -1
    for slot in sorted(request.slots, key=lambda slot: -sum(slot.bundle.values())):
        fits = [
            (spreads * used[node.name], sum(left[node.name][key] for key in slot.bundle), node.name)
            for node in nodes
            if not _lacks(slot, node, left[node.name]) and not (request.strategy == "strict_spread" and used[node.name])
        ]
        if not fits:
            missing.append(slot)
            continue
        _, _, name = min(fits)
        used[name] += 1
        for key, amount in slot.bundle.items():
            left[name][key] -= amount
    return missing


def _lacks(slot: Slot, node: Node, left: Mapping[str, float]) -> list[str]:
    """What a node does not have for an actor, in words."""
    wrong = [
        f"label {key} is {node.labels.get(key, 'not set')}"
        for key, selector in slot.labels.items()
        if not matches(selector, node.labels.get(key))
    ]
    short = [
        f"{max(0.0, round(left.get(key, 0.0), 4)):g} of {node.total.get(key, 0.0):g} {key} left"
        for key, amount in slot.bundle.items()
        if left.get(key, 0.0) + _EPSILON < amount
    ]
    return wrong or short


def matches(selector: str, value: str | None) -> bool:
    """Whether a node's label is what Ray's ``selector`` asks for."""
    wanted = selector.removeprefix("!")
    values = [each.strip() for each in wanted[3:-1].split(",")] if wanted.startswith("in(") else [wanted]
    return (value in values) != selector.startswith("!")


def shortage(requests: Seq[GroupRequest], nodes: Seq[Node]) -> dict[str, str]:
    """By pool, what it asks for and, if not all of its actors find a place, why each node takes no more."""
    missing, left = unplaced(requests, nodes)
    texts: dict[str, str] = {}
    for pool in dict.fromkeys(slot.pool for slot in missing):
        slots = [slot for slot in missing if slot.pool == pool]
        alike: dict[str, list[str]] = {}
        for node in nodes:
            cause = ", ".join(_lacks(slots[0], node, left[node.name])) or "not beside the others"
            alike.setdefault(cause, []).append(node.name)
        causes = "; ".join(f"{', '.join(names)}: {cause}" for cause, names in alike.items())
        texts[pool] = f"{len(slots)} x {_shown(slots[0])} find no node ({causes or 'there is none'})"
    return texts


def _shown(slot: Slot) -> str:
    parts = [f"{amount:g} {name}" for name, amount in slot.bundle.items()]
    return " + ".join([*parts, *(f"label {name}={selector}" for name, selector in slot.labels.items())])


def cluster_problems(pools: Pools, nodes: Seq[Node]) -> list[Problem]:
    """What of a run a cluster has no place for as it is now, pool by pool."""
    requests = [GroupRequest("coordinator", (Slot("coordinator", COORDINATOR),)), *plan_groups(pools)]
    strategies = {slot.pool: request.strategy for request in requests for slot in request.slots}
    idle = [Node(node.name, node.total, node.total, node.labels) for node in nodes]
    is_busy = not unplaced(requests, idle)[0]
    do = "wait until it is free" if is_busy else "add nodes, or lower num_actors, cpus_per_actor or gpus_per_actor"
    num_actors = Counter(slot.pool for request in requests for slot in request.slots)
    return [
        Problem(f"pools.{name}", f"{num_actors[name]} actors ({strategies[name]})", f"room: {text}", do)
        for name, text in shortage(requests, nodes).items()
    ]


def require_room(pools: Pools, address: str) -> str:
    """What the cluster at ``address`` has free, in words. UserError where a run would wait for a place on it."""
    with connection(address):
        nodes = live_nodes()
    if problems := cluster_problems(pools, nodes):
        raise UserError(problems)
    kinds = dict.fromkeys(kind for bundles in plan_bundles(pools).values() for bundle in bundles for kind in bundle)
    free = ", ".join(f"{sum(node.free.get(kind, 0.0) for node in nodes):g} {kind}" for kind in kinds)
    return f"placement: every actor finds a node; free on {len(nodes)} nodes: {free}"


def live_nodes() -> list[Node]:
    """Of the cluster that this process is connected to."""
    free = available_resources_per_node()
    return [
        Node(f"{n['NodeManagerAddress']} ({n['NodeID'][:6]})", n["Resources"], free.get(n["NodeID"], {}), n["Labels"])
        for n in ray.nodes()
        if n["Alive"]
    ]


def log_wait(group: str, missing: str | None) -> None:
    """Of a wait for a place; nothing of its end."""
    if missing is not None:
        logger.info("%s", missing)


async def place(request: GroupRequest, deadline_s: float, tell: Tell) -> PlacementGroup:
    """Reserve a placement group; every 5 s of waiting are told.

    Raises DeadlineError with what was asked for and what is free; the group is then gone from the cluster.
    """
    selectors = [dict(slot.labels) for slot in request.slots]
    # a suffix: Ray refuses a second group of one name, and a removed one keeps its name for a moment
    group = placement_group(
        [dict(slot.bundle) for slot in request.slots],
        strategy=request.strategy.upper(),
        name=f"{request.name}-{secrets.token_hex(4)}",
        bundle_label_selector=selectors if any(selectors) else None,
    )
    ready = asyncio.ensure_future(group.ready())
    pool = f"pool {' and '.join(dict.fromkeys(slot.pool for slot in request.slots))}"
    has_told = False

    def missing() -> str:
        return ", ".join(shortage([request], live_nodes()).values()) or "Ray is starting its actors"

    try:
        async with asyncio.timeout(deadline_s):
            while not (await asyncio.wait({ready}, timeout=_REPORT_S))[0]:
                has_told = True
                tell(request.name, f"{pool}: {missing()}")
        ready.result()
        return group
    except BaseException as error:
        ready.cancel()
        remove_placement_group(group)
        if isinstance(error, TimeoutError):
            raise DeadlineError(
                f"{pool} was not placed within {deadline_s:g} s: {missing()}; free the cluster, add nodes, or lower "
                f"pools.{request.name}.num_actors, cpus_per_actor or gpus_per_actor"
            ) from None
        raise
    finally:
        if has_told:
            tell(request.name, None)
