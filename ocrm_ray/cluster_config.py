"""The sections that say what runs where, how long it may take, and how weights travel; and what all sections share.

``ocrm_ray.config`` puts them into the tree and names them again: import from there.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16"]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
PoolName = Literal["generation", "policy", "scoring", "reward", "evaluation"]
Strategy = Literal["pack", "spread", "strict_pack", "strict_spread"]


class Section(BaseModel):
    """A node of the tree: immutable, unknown keys refused, documented by the string under each field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class Lora(Section):
    """Low-rank adapters that are trained in place of a network's weights (arXiv 2106.09685). What leaves the trainer,
    for engines, scorers and model folders, has them merged."""

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    """An adapter's product counts alpha / rank times."""
    targets: tuple[str, ...] = ()
    """Layers that have one, by the end of their names, as ``q_proj``; none: every linear layer but the head."""


class Pool(Section):
    """One pool of actors."""

    num_actors: PositiveInt = 1
    cpus_per_actor: PositiveFloat = 0.1
    """Ray CPUs reserved for each actor; small, so that seven actors fit two cores."""
    gpus_per_actor: NonNegativeFloat = 0.0
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Of Ray's custom resources what each actor reserves, as ``{policy: 0.01}``: it is on a node that has them."""
    labels: dict[str, str] = Field(default_factory=dict)
    """What labels of Ray's nodes must be, each ``VALUE``, ``!VALUE``, ``in(A,B)`` or ``!in(A,B)``."""
    strategy: Strategy = "pack"
    """On few nodes, evenly over many, all on one, or each on another."""
    colocate_with: PoolName | None = None
    """A pool in whose placement group these actors are, by its ``strategy``, all of both or none; null: in their own.
    For small machines, with shares of GPUs."""
    threads_per_actor: PositiveInt = 1
    """Arithmetic threads of each actor on CPU."""
    dtype: Dtype = "float32"
    """Precision of the pool's networks."""
    batch_size: PositiveInt = 128
    """Most sequences a forward pass when scoring."""
    batch_tokens: PositiveInt = 16384
    """Most tokens, padding included, a forward pass when scoring; one longer sequence goes alone."""


class GenerationPool(Pool):
    """vLLM engines; one with several GPUs is spread over them (tensor parallel), all on one node."""

    kv_cache_gib: PositiveFloat = 1.0
    """KV cache of each engine on CPU."""
    max_running: PositiveInt = 256
    """Sequences that an engine decodes at once."""
    gpu_memory_share: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Share that an engine takes of its part (``gpus_per_actor``) of a GPU's memory; unused on CPU."""
    sleeps: bool = False
    """Whether engines leave their GPUs' memory to the trainer while it trains, for pools that share GPUs: vLLM's sleep
    mode. Rollouts and updates then take turns (``rollout.max_staleness`` 0)."""


class RewardPool(Pool):
    """Servers of the live reward model, and the ranks of the refitter beside them."""

    num_refit_ranks: PositiveInt = 1
    """Ranks that train a reward model together, each an actor like the servers."""
    refit_zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None
    """DeepSpeed ZeRO stage of these ranks; null: ``policy.zero_stage``."""


class Pools(Section):
    """The four pools, and the evaluation actor."""

    generation: GenerationPool = GenerationPool()
    policy: Pool = Pool()
    """Its actors are ranks that train together."""
    scoring: Pool = Pool()
    reward: RewardPool = RewardPool()
    evaluation: Pool = Pool()

    def num_placed(self, name: str) -> int:
        """Actors of a pool, with what corrections use: scoring has one more (snapshots and pair ratios), reward the
        ranks of its refitter. Evaluation always is one."""
        more = {"scoring": 1, "reward": self.reward.num_refit_ranks}
        pool: Pool = getattr(self, name)
        return 1 if name == "evaluation" else pool.num_actors + more.get(name, 0)


class Assumed(Section):
    """What ``check`` takes for granted of models and GPUs that are not here; without effect on a run."""

    policy: Path | None = None
    """A folder with the policy's ``config.json``, where ``sft`` names a model that is not on this machine."""
    reward: Path | None = None
    """The same of the reward model, where ``reward`` names one."""
    gpu_gib: PositiveFloat = 80.0
    """Memory of one GPU."""


class Deadlines(Section):
    """Longest waits. What passes one of the first four is taken for dead, as ``faults`` says."""

    start_s: PositiveFloat = 300.0
    """For the actors of a pool to be placed and ready."""
    request_s: PositiveFloat = 900.0
    """For one answer of an actor (generation, scoring, update)."""
    publish_s: PositiveFloat = 120.0
    """For the engines to take new weights."""
    refit_s: PositiveFloat = 3600.0
    """For one refit of the reward model."""
    progress_s: PositiveFloat = 7200.0
    """For one update, with all that it waits for; then the run ends and says what each pool is asked for. So it does
    where a fit before RL has done no step for as long."""


class Lease(Section):
    """A run holds its folder by a heartbeat in ``lease.json``; another run may take it over from a dead one only."""

    heartbeat_s: PositiveFloat = 5.0
    """Between two heartbeats; each is a small write."""
    num_missed: Annotated[int, Field(ge=2)] = 12
    """Heartbeats in a row that do not come until a run that waits takes the folder over."""


class Publish(Section):
    """How the policy's weights reach engines and scorers, beside the next update."""

    transport: Literal["auto", "shared_memory", "object_store", "nccl"] = "auto"
    """``shared_memory``: persistent segments of one node, read in place; ``object_store``: Ray's, between nodes;
    ``nccl``: between GPUs. ``auto``: nccl where trainer and engines have GPUs, else shared memory on one node."""
    checksum: bool = False
    """Readers compare a checksum of the bytes with the trainer's before they use them."""


class Duration(Section):
    """Seconds that a rehearsed actor takes for one message: ``call_s + item_s * items``, times what is drawn."""

    item_s: NonNegativeFloat
    """Of each prompt with its samples."""
    call_s: NonNegativeFloat = 0.0
    """Of each message whatever it holds: what makes large batches cheap."""
    jitter: NonNegativeFloat = 0.0
    """Sigma of a lognormal factor of mean 1."""
    tail_share: Share = 0.0
    """Share of the messages that take ``tail_factor`` times as long."""
    tail_factor: Annotated[float, Field(ge=1)] = 1.0

    def mean_s(self, items: float) -> float:
        """Expected seconds of a message of ``items`` prompts."""
        return (self.call_s + self.item_s * items) * (1 + self.tail_share * (self.tail_factor - 1))


class Rehearsal(Section):
    """What engines are replaced by in ``rehearse``: time. ``check`` predicts from it too."""

    num_updates: PositiveInt = 30
    """Updates that are measured; those that fill the pipeline and drain it come on top."""
    generate: Duration
    """A prompt in a slot of an engine."""
    engine_slots: PositiveInt = 8
    """Prompts that an engine decodes at once."""
    score: Duration
    """Anchor and SFT log-probs, by one actor of the scoring pool."""
    reward: Duration
    """Reward scores, by one actor of the reward pool."""
    train: Duration
    """An update, by the policy pool."""
    weights_gib: NonNegativeFloat = 0.0
    """Size of the policy's weights."""
    publish_gib_per_s: PositiveFloat = 1.0
    """Their way from the trainer into an engine."""
    pause_s: NonNegativeFloat = 0.0
    """Seconds of a publish in which an engine stands still."""
    ratio_s: NonNegativeFloat = 0.0
    """One correction's importance ratios."""
    refit_s: NonNegativeFloat = 0.0
    """One correction's refit."""

    @property
    def publish_s(self) -> float:
        """Seconds until an engine has new weights."""
        return max(self.weights_gib / self.publish_gib_per_s, self.pause_s)
