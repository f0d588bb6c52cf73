"""What this machine has, and what a configuration asks of it. Torch-free: nothing is loaded to find out.

Memory of a network of P parameters in a pool of dtype d (4 bytes for float32, 2 for bfloat16), on CPU pools:
training 16 P (weights, gradients and two Adam moments in float32; the same in bfloat16 with a float32 master copy),
serving d P. An engine holds its weights twice (vLLM repacks them) beside its KV cache; scoring holds SFT model,
anchor and one snapshot; the reward pool holds a live and a shadow reward model and one in training. To these
come processes (2.5 GiB an engine, 0.5 GiB another actor, 0.5 GiB Ray) and the logits of one policy micro-batch,
three times in float32. With ``gpus_per_actor`` only the processes count.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ocrm_ray.config import Dtype, Pool, RunConfig
from ocrm_ray.errors import Problem

GIB = 2**30
ENGINE_GIB = 2.5
ACTOR_GIB = 0.5
RAY_GIB = 0.5
TRAINING_BYTES = 16
DTYPE_BYTES: Mapping[Dtype, int] = {"float32": 4, "bfloat16": 2}
_NVIDIA = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class NetworkSizes:
    """Parameters of the networks, and tokens of the vocabulary."""

    policy: int
    reward: int
    vocabulary: int
    gold: int = 0


def pools_by_name(config: RunConfig) -> dict[str, Pool]:
    """The four pools and the evaluation actor."""
    pools = config.pools
    return {name: getattr(pools, name) for name in type(pools).model_fields}


def num_gpus() -> int:
    """GPUs that processes started here can see."""
    if _NVIDIA.is_dir():
        found = len(list(_NVIDIA.iterdir()))
    elif command := shutil.which("nvidia-smi"):
        listing = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=30, check=False)
        found = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    else:
        found = 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    return min(found, sum(bool(device) and device != "-1" for device in visible.replace(" ", "").split(",")))


def machine_problems(config: RunConfig, sizes: NetworkSizes | None) -> list[Problem]:
    """What the pools ask beyond this machine; nothing where ``RAY_ADDRESS`` names a cluster, whose size is its own."""
    if os.environ.get("RAY_ADDRESS"):
        return []
    pools = pools_by_name(config)
    problems = []
    cpus = {name: pool.num_actors * pool.cpus_per_actor for name, pool in pools.items()}
    num_cpus = os.cpu_count() or 1
    if sum(cpus.values()) > num_cpus:
        do = "lower cpus_per_actor or num_actors, or set RAY_ADDRESS to a cluster"
        problems.append(Problem("pools", _total(cpus, "CPUs"), f"at most {num_cpus} (this machine's)", do))
    gpus = {name: pool.num_actors * pool.gpus_per_actor for name, pool in pools.items() if pool.gpus_per_actor}
    if gpus and sum(gpus.values()) > (found := num_gpus()):
        do = "lower gpus_per_actor or num_actors, or set RAY_ADDRESS to a cluster"
        problems.append(Problem("pools", _total(gpus, "GPUs"), f"at most {found} (this machine's)", do))
    if sizes is not None:
        import psutil

        memory = memory_gib(config, sizes)
        available = psutil.virtual_memory().total / GIB
        if sum(memory.values()) > available:
            do = "use smaller models, bfloat16, fewer actors, a smaller micro_batch_size or kv_cache_gib"
            got = "about " + _total({name: round(amount, 1) for name, amount in memory.items()}, "GiB of memory")
            problems.append(Problem("pools", got, f"at most {available:.1f} GiB (this machine's)", do))
    return problems


def _total(parts: Mapping[str, float], unit: str) -> str:
    shares = ", ".join(f"{name} {_short(amount)}" for name, amount in parts.items())
    return f"{_short(sum(parts.values()))} {unit} ({shares})"


def _short(amount: float) -> str:
    return f"{amount:.2f}".rstrip("0").rstrip(".")


def memory_gib(config: RunConfig, sizes: NetworkSizes) -> dict[str, float]:
    """Host memory by pool, and of Ray; the module's text has the formula."""
    pools = config.pools
    critic = sizes.reward if config.policy.algorithm == "ppo" else 0
    logits = 3 * 4 * config.policy.micro_batch_size * config.rollout.max_new_tokens * sizes.vocabulary
    training_share = pools.policy.num_actors if config.policy.zero_stage else 1
    bytes_of = {name: DTYPE_BYTES[pool.dtype] for name, pool in pools_by_name(config).items()}
    num_rewards = 2 if config.correction.strategy == "none" else 3
    networks = {
        "generation": 2 * bytes_of["generation"] * sizes.policy + pools.generation.kv_cache_gib * GIB,
        "policy": TRAINING_BYTES * (sizes.policy + critic) / training_share + logits,
        "scoring": 3 * bytes_of["scoring"] * sizes.policy,
        "reward": num_rewards * bytes_of["reward"] * sizes.reward + TRAINING_BYTES * sizes.reward,
        "evaluation": bytes_of["evaluation"] * sizes.gold,
    }
    processes = {name: ENGINE_GIB if name == "generation" else ACTOR_GIB for name in networks}
    memory = {
        name: pool.num_actors * (processes[name] + (0 if pool.gpus_per_actor else networks[name] / GIB))
        for name, pool in pools_by_name(config).items()
    }
    return memory | {"ray": RAY_GIB}
