"""What this machine has, and what a configuration asks of it.

To the networks (``ocrm_ray.memory``) come processes (2.5 GiB an engine, 0.5 GiB another actor, 0.5 GiB Ray) and the
policy's weights on their way, twice. With ``gpus_per_actor`` only these are on the host.
"""

import os
from collections.abc import Mapping

from ocrm_ray.config import RunConfig
from ocrm_ray.errors import Problem
from ocrm_ray.memory import GIB, NUM_EXPORTS, NetworkSizes, export_bytes, memory_ranks

ENGINE_GIB = 2.5
ACTOR_GIB = 0.5
RAY_GIB = 0.5


def machine_problems(config: RunConfig, sizes: NetworkSizes | None) -> list[Problem]:
    """What the pools ask beyond this machine; nothing where ``RAY_ADDRESS`` names a cluster, whose size is its own."""
    import psutil
    import torch

    if os.environ.get("RAY_ADDRESS"):
        return []
    placed = [(name, config.pools.num_placed(name), pool) for name, pool in config.pools]
    cpus = {name: num * pool.cpus_per_actor for name, num, pool in placed}
    gpus = {name: num * pool.gpus_per_actor for name, num, pool in placed if pool.gpus_per_actor}
    memory = {} if sizes is None else memory_gib(config, sizes)
    smaller = "use smaller models, bfloat16, fewer actors, a smaller kv_cache_gib"
    demands: list[tuple[str, Mapping[str, float], float, str]] = [
        ("CPUs", cpus, os.cpu_count() or 1, "lower cpus_per_actor or num_actors, or set RAY_ADDRESS to a cluster"),
        (
            "GPUs",
            gpus,
            torch.cuda.device_count() if gpus else 0,
            "lower gpus_per_actor, or set RAY_ADDRESS to a cluster",
        ),
        ("GiB of memory", memory, psutil.virtual_memory().total / GIB, smaller),
    ]
    problems = []
    for unit, asked, available, do in demands:
        if sum(asked.values()) > available:
            shares = ", ".join(f"{name} {round(amount, 2):g}" for name, amount in asked.items())
            got = f"{round(sum(asked.values()), 2):g} {unit} ({shares})"
            problems.append(Problem("pools", got, f"at most {round(available, 2):g} (this machine's)", do))
    return problems


def memory_gib(config: RunConfig, sizes: NetworkSizes) -> dict[str, float]:
    """Host memory by pool, and of Ray."""
    memory = dict.fromkeys((name for name, _ in config.pools), 0.0)
    for rank in memory_ranks(config, sizes):
        pool = getattr(config.pools, rank.pool)
        process = 0.0 if rank.role == "critic" else ENGINE_GIB if rank.role == "engine" else ACTOR_GIB
        num_processes = pool.num_actors if rank.role == "engine" else rank.num_ranks
        memory[rank.pool] += num_processes * process
        if not pool.gpus_per_actor:
            memory[rank.pool] += rank.num_ranks * rank.total / GIB
    memory["policy"] += NUM_EXPORTS * export_bytes(config, sizes) / GIB
    return memory | {"ray": RAY_GIB}
