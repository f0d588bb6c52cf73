"""Memory of every rank by part, from arithmetic: tests hold it against DeepSpeed's tensors and torch's saved ones.

Of P parameters in a dtype of d bytes on n ranks, training keeps (weights; gradients; masters; moments), in bytes:

- float32 without ZeRO: 4 P; 4 P; none; 8 P
- ZeRO 1: d P; 4 P, with bfloat16 2 P more; 4 P / n; 8 P / n (so bfloat16 without ZeRO)
- ZeRO 2: d P; 4 P / n; 4 P / n; 8 P / n
- ZeRO 3: d P / n; 4 P / n and a bucket; 4 P / n; 8 P / n

With LoRA the adapters are that P, beside d bytes of each frozen parameter, at ZeRO 3 on one of the n ranks.

What exists during a pass counts as activations: a bucket of gradients, at ZeRO 3 the parameters that are gathered
(10^9), a chunk of logits with its gradient in float32, and what the layers save. A layer with hidden width h, queries
of width q, keys of width k, an MLP of width f and a heads saves 8 h + d (4 h + 2 q + 2 k + 4 f) + 4 a bytes a token
(norms in float32, fused attention, a gated MLP), or with checkpointing d h, and one layer all of it; the last norm
and the head's input 8 h + d h.

An engine on CPU holds its weights three times (vLLM repacks them, and the next ones beside them); on GPUs its KV cache
is what is left of ``gpu_memory_share``. A scorer holds the SFT model, with a moving anchor that and a staged one too,
the one that scores pairs a snapshot; a reward server the live models and, with corrections, staged ones.
What ``policy.offload`` moves to the host is counted where it would be without.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from ocrm_ray import praise
from ocrm_ray.config import Dtype, Lora, Pool, RunConfig

GIB = 2**30
DTYPE_BYTES: Mapping[Dtype, int] = {"float32": 4, "bfloat16": 2}
BUCKET = 500_000_000
GATHERED = 1_000_000_000
"""Parameters that ZeRO 3 holds whole at once, unless there are fewer."""
ENGINE_TOKENS = 8192
"""In one step of an engine on GPUs."""
NUM_EXPORTS = 2
PARTS = ("weights", "gradients", "masters", "moments", "activations", "KV cache")
Parts: TypeAlias = dict[str, float]
"""Bytes by part."""


@dataclass(frozen=True)
class Layers:
    """Of a decoder's layers what memory follows from: their number, and widths as the module's text names them."""

    num_layers: int
    hidden: int
    query: int
    key: int
    intermediate: int
    num_heads: int


@dataclass(frozen=True)
class NetworkSizes:
    """Parameters of the networks, and tokens of the vocabulary; without layers, activations are not counted."""

    policy: int
    reward: int
    vocabulary: int
    gold: int = 0
    policy_layers: Layers | None = None
    reward_layers: Layers | None = None
    tied_head: int = 0
    """Parameters of a policy's head that are also those of its embeddings: exported under both names."""


@dataclass(frozen=True)
class Rank:
    """One process of a role, ``num_ranks`` of which there are; an engine on several GPUs is as many."""

    role: str
    pool: str
    num_ranks: int
    parts: Parts

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Training:
    """What the memory of a network that trains follows from, beside its size."""

    dtype: Dtype
    zero_stage: int
    num_ranks: int
    checkpointing: bool
    num_tokens: int
    """Of the largest forward pass."""
    num_adapted: int | None = None
    """Parameters of adapters, where those alone are trained."""

    def parts(self, num_parameters: int, layers: Layers | None) -> Parts:
        """Bytes of one rank, without logits."""
        num_trained = num_parameters if self.num_adapted is None else self.num_adapted
        num_held = num_parameters + (self.num_adapted or 0)
        width, partition = DTYPE_BYTES[self.dtype], 4 * num_trained / self.num_ranks
        stage = max(self.zero_stage, 1 if self.dtype == "bfloat16" else 0)
        bucket = width * min(num_trained, BUCKET)
        full_gradients = (6 if self.dtype == "bfloat16" else 4) * num_trained
        in_pass = [bucket if self.num_ranks > 1 else 0, bucket, bucket, width * min(num_held, GATHERED)][stage]
        return {
            "weights": width * num_held / (self.num_ranks if stage == 3 else 1),
            "gradients": [full_gradients, full_gradients, partition, partition + bucket][stage],
            "masters": partition if stage else 0,
            "moments": 2 * partition if stage else 8 * num_trained,
            "activations": in_pass + saved_bytes(layers, self),
        }


def layers_of(settings: Mapping[str, Any]) -> Layers | None:
    """From a ``config.json``; None where it names its widths in a way of its own."""
    settings = settings.get("text_config") or settings

    def find(*names: str) -> int:
        return next((int(settings[name]) for name in names if settings.get(name)), 0)

    hidden, heads = find("hidden_size", "n_embd"), find("num_attention_heads", "n_head")
    num_layers = find("num_hidden_layers", "n_layer")
    if not (hidden and heads and num_layers):
        return None
    head = find("head_dim") or hidden // heads
    key_heads = find("num_key_value_heads") or heads
    return Layers(
        num_layers, hidden, heads * head, key_heads * head, find("intermediate_size", "n_inner") or 4 * hidden, heads
    )


def adapted(lora: Lora | None, layers: Layers | None) -> int | None:
    """Parameters of the adapters on a decoder's layers, which are named as Llama's; None without ``lora``, or where
    the layers are not known."""
    if lora is None or layers is None:
        return None
    hidden, query, key, wide = layers.hidden, layers.query, layers.key, layers.intermediate
    widths = {"q_proj": hidden + query, "k_proj": hidden + key, "v_proj": hidden + key, "o_proj": query + hidden}
    widths |= {"gate_proj": hidden + wide, "up_proj": hidden + wide, "down_proj": wide + hidden}
    return layers.num_layers * lora.rank * sum(widths.get(name, 0) for name in lora.targets or widths)


def saved_bytes(layers: Layers | None, training: Training) -> float:
    """What the layers of a pass save for the way back."""
    if layers is None:
        return 0
    width, hidden = DTYPE_BYTES[training.dtype], layers.hidden
    products = 4 * hidden + 2 * layers.query + 2 * layers.key + 4 * layers.intermediate
    of_layer = 8 * hidden + width * products + 4 * layers.num_heads
    last_norm = (8 + width) * hidden
    if training.checkpointing:
        return training.num_tokens * (layers.num_layers * width * hidden + of_layer + last_norm)
    return training.num_tokens * (layers.num_layers * of_layer + last_norm)


def forward_bytes(layers: Layers | None, dtype: Dtype, num_tokens: int) -> float:
    """The most that exists at once in a pass that saves nothing."""
    if layers is None:
        return 0
    return num_tokens * (8 * layers.hidden + DTYPE_BYTES[dtype] * (4 * layers.hidden + 3 * layers.intermediate))


def logits_bytes(num_tokens: int, vocabulary: int) -> float:
    """Of a chunk with its gradient."""
    from ocrm_ray.algorithm.logprobs import MAX_LOGITS

    return 2 * 4 * min(num_tokens * vocabulary, MAX_LOGITS)


def prompt_tokens(config: RunConfig) -> int:
    """Of the longest prompt."""
    return config.data.max_prompt_tokens if config.world is None else praise.PROMPT_WORDS


def longest(config: RunConfig) -> int:
    """Tokens of the longest sequence."""
    return prompt_tokens(config) + config.rollout.max_new_tokens


def memory_ranks(config: RunConfig, sizes: NetworkSizes) -> list[Rank]:
    """Every kind of process with a network, and what one of each holds."""
    policy, pools, length = config.policy, config.pools, longest(config)
    micro = _pass_tokens(policy.micro_batch_tokens, policy.micro_batch_size * length, length)
    shared = policy.zero_stage, pools.policy.num_actors, policy.gradient_checkpointing
    trainer = Training(pools.policy.dtype, *shared, micro)
    learner = replace(trainer, num_adapted=adapted(policy.lora, sizes.policy_layers))
    of_policy = learner.parts(sizes.policy, sizes.policy_layers)
    of_policy["activations"] += logits_bytes(micro, sizes.vocabulary)
    ranks = [_engine(config, sizes), Rank("policy", "policy", trainer.num_ranks, of_policy)]
    if policy.algorithm == "ppo":
        of_critic = trainer.parts(sizes.reward, sizes.reward_layers)
        ranks.append(Rank("critic", "policy", trainer.num_ranks, of_critic))
    return [*ranks, *_scorers(config, sizes), *_rewards(config, sizes)]


def _pass_tokens(most: int, of_all: int, of_one: int) -> int:
    return max(min(most, of_all), of_one)


def _engine(config: RunConfig, sizes: NetworkSizes) -> Rank:
    pool, num_gpus = config.pools.generation, max(1, int(config.pools.generation.gpus_per_actor))
    weights = DTYPE_BYTES[pool.dtype] * sizes.policy
    if not pool.gpus_per_actor:
        parts = {"weights": 3.0 * weights, "KV cache": pool.kv_cache_gib * GIB}
        return Rank("engine", "generation", pool.num_actors, parts)
    logits = 2 * 4 * pool.max_running * sizes.vocabulary
    parts = {
        "weights": weights / num_gpus,
        "activations": (forward_bytes(sizes.policy_layers, pool.dtype, ENGINE_TOKENS) + logits) / num_gpus,
    }
    left = pool.gpu_memory_share * config.assumed.gpu_gib * GIB * min(1.0, pool.gpus_per_actor) - sum(parts.values())
    return Rank("engine", "generation", pool.num_actors * num_gpus, parts | {"KV cache": max(0.0, left)})


def running_sequences(config: RunConfig, sizes: NetworkSizes) -> int | None:
    """How many of the longest sequences an engine's KV cache holds; None where that is not known."""
    pool, layers = config.pools.generation, sizes.policy_layers
    if layers is None:
        return None
    engine = _engine(config, sizes)
    of_token = 2 * layers.num_layers * layers.key * DTYPE_BYTES[pool.dtype]
    return int(engine.parts["KV cache"] * engine.num_ranks / pool.num_actors / (of_token * longest(config)))


def _scorers(config: RunConfig, sizes: NetworkSizes) -> list[Rank]:
    pool, pairs, correction = config.pools.scoring, config.pairs, config.correction
    is_other = pairs.ready is not None and pairs.behaviour not in ("sft", "unknown")
    num_networks = {
        "scorer": (pool.num_actors, 3 if correction.kl_reference == "moving" else 1),
        "pair scorer": (1, 1 + correction.scores_pairs + is_other),
    }
    of_pass = _scoring_pass(config, pool, sizes.policy_layers)
    of_pass += logits_bytes(pool.batch_tokens, sizes.vocabulary) / 2
    return [
        Rank(role, "scoring", num, {"weights": each * DTYPE_BYTES[pool.dtype] * sizes.policy, "activations": of_pass})
        for role, (num, each) in num_networks.items()
    ]


def _scoring_pass(config: RunConfig, pool: Pool, layers: Layers | None) -> float:
    length = longest(config)
    return forward_bytes(layers, pool.dtype, _pass_tokens(pool.batch_tokens, pool.batch_size * length, length))


def _rewards(config: RunConfig, sizes: NetworkSizes) -> list[Rank]:
    pool, pairs, training = config.pools.reward, 2 * longest(config), config.correction.training
    num_networks = config.reward.ensemble.num_members * (1 if config.correction.strategy == "none" else 2)
    server = {
        "weights": num_networks * DTYPE_BYTES[pool.dtype] * float(sizes.reward),
        "activations": _scoring_pass(config, pool, sizes.reward_layers),
    }
    micro = _pass_tokens(training.micro_batch_tokens, training.micro_batch_size * pairs, pairs)
    shared = config.refit_zero_stage, pool.num_refit_ranks, config.policy.gradient_checkpointing
    num_adapted = adapted(config.reward.lora, sizes.reward_layers)
    refit = Training(pool.dtype, *shared, micro, num_adapted).parts(sizes.reward, sizes.reward_layers)
    ranks = [Rank("reward server", "reward", pool.num_actors, server)]
    if config.correction.strategy != "none" or config.reward.ready is None:
        ranks.append(Rank("refit", "reward", pool.num_refit_ranks, refit))
    gold = {"weights": float(DTYPE_BYTES[config.pools.evaluation.dtype] * sizes.gold)}
    return [*ranks, Rank("evaluation", "evaluation", 1, gold)]


def export_bytes(config: RunConfig, sizes: NetworkSizes) -> int:
    """Of the policy's weights, once, on their way to engines and scorers."""
    return DTYPE_BYTES[config.pools.policy.dtype] * (sizes.policy + sizes.tied_head)


def memory_lines(config: RunConfig, sizes: NetworkSizes) -> list[str]:
    """A table of the ranks in GiB, whether those on GPUs fit ``assumed.gpu_gib``, and what a KV cache holds."""
    ranks = memory_ranks(config, sizes)
    lines = [f"{'GiB of each':15}{'ranks':>6}" + "".join(f"{part:>12}" for part in (*PARTS, "together"))]
    for rank in filter(lambda rank: rank.total, ranks):
        figures = (*(rank.parts.get(part, 0.0) for part in PARTS), rank.total)
        lines.append(f"{rank.role:15}{rank.num_ranks:6}" + "".join(f"{figure / GIB:12.2f}" for figure in figures))
    demands = gpu_demands(config, ranks)
    too_much = [f"{role} {asked:.0f} GiB of {room:.0f}" for role, asked, room in demands if asked > room]
    gpus = f"GPUs of {config.assumed.gpu_gib:g} GiB (assumed.gpu_gib)"
    gpus += "" if config.policy.offload == "none" else " without policy.offload"
    if demands:
        lines.append(f"memory: too much for {gpus}: {', '.join(too_much)}" if too_much else f"memory: fits {gpus}")
    if (num_sequences := running_sequences(config, sizes)) is not None:
        most = config.pools.generation.max_running
        lines.append(f"KV cache: {num_sequences} of the longest sequences, max_running is {most}")
    return lines


def gpu_demands(config: RunConfig, ranks: Sequence[Rank]) -> list[tuple[str, float, float]]:
    """(role, GiB asked, GiB that it may have) of every process on a GPU; policy and critic are one.

    The trainer may have what sleeping engines leave, too.
    """
    asked: dict[str, float] = {}
    rooms: dict[str, float] = {}
    for rank in ranks:
        if gpus := getattr(config.pools, rank.pool).gpus_per_actor:
            role = "policy" if rank.pool == "policy" else rank.role
            asked[role] = asked.get(role, 0.0) + rank.total / GIB
            if role == "policy" and config.pools.generation.sleeps:
                gpus += config.pools.generation.gpus_per_actor
            rooms[role] = config.assumed.gpu_gib * min(1.0, gpus)
    return [(role, asked[role], rooms[role]) for role in asked]
