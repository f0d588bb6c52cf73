"""What this machine has, and what a configuration asks of it.

Memory of a network of P parameters in a pool of dtype d (4 bytes for float32, 2 for bfloat16), on CPU pools:
training 16 P (weights, gradients and two Adam moments in float32; the same in bfloat16 with a float32 master copy),
serving d P. An engine holds its weights three times (vLLM repacks them, and the next ones beside them) and its KV
cache; scoring holds SFT model, anchor and one snapshot; the reward pool a live and a shadow reward model and one in
training. To these come processes (2.5 GiB an engine, 0.5 GiB another actor, 0.5 GiB Ray) and the chunk of logits that
the policy's trainer holds, with its gradient, in float32. With ``gpus_per_actor`` only the processes count.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ocrm_ray.config import Dtype, RunConfig
from ocrm_ray.errors import Problem

GIB = 2**30
ENGINE_GIB = 2.5
ACTOR_GIB = 0.5
RAY_GIB = 0.5
TRAINING_BYTES = 16
DTYPE_BYTES: Mapping[Dtype, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class NetworkSizes:
    """Parameters of the networks, and tokens of the vocabulary."""

    policy: int
    reward: int
    vocabulary: int
    gold: int = 0


def machine_problems(config: RunConfig, sizes: NetworkSizes | None) -> list[Problem]:
    """What the pools ask beyond this machine; nothing where ``RAY_ADDRESS`` names a cluster, whose size is its own."""
    import psutil
    import torch

    if os.environ.get("RAY_ADDRESS"):
        return []
    cpus = {name: pool.num_actors * pool.cpus_per_actor for name, pool in config.pools}
    gpus = {name: pool.num_actors * pool.gpus_per_actor for name, pool in config.pools if pool.gpus_per_actor}
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
    """Host memory by pool, and of Ray; the module's text has the formula."""
    from ocrm_ray.algorithm.logprobs import MAX_LOGITS

    pools = config.pools
    critic = sizes.reward if config.policy.algorithm == "ppo" else 0
    logits = 2 * 4 * min(config.policy.micro_batch_tokens * sizes.vocabulary, MAX_LOGITS)
    training_share = pools.policy.num_actors if config.policy.zero_stage else 1
    bytes_of = {name: DTYPE_BYTES[pool.dtype] for name, pool in config.pools}
    num_rewards = (2 if config.correction.strategy == "none" else 3) * config.reward.ensemble.num_members
    networks = {
        "generation": 3 * bytes_of["generation"] * sizes.policy + pools.generation.kv_cache_gib * GIB,
        "policy": TRAINING_BYTES * (sizes.policy + critic) / training_share + logits,
        "scoring": 3 * bytes_of["scoring"] * sizes.policy,
        "reward": num_rewards * bytes_of["reward"] * sizes.reward + TRAINING_BYTES * sizes.reward,
        "evaluation": bytes_of["evaluation"] * sizes.gold,
    }
    memory: dict[str, float] = {}
    for name, pool in config.pools:
        process = ENGINE_GIB if name == "generation" else ACTOR_GIB
        memory[name] = pool.num_actors * (process + (0 if pool.gpus_per_actor else networks[name] / GIB))
    return memory | {"ray": RAY_GIB}
