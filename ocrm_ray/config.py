"""The configuration: one frozen tree, unknown keys refused, every default here and nowhere else.

``ocrm_ray.config_file`` reads YAML and ``key=value`` overrides into a ``RunConfig``; components receive their
own section, never the whole tree. Lengths are in tokens, times in seconds (``_s``), counts start with ``num_``.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ocrm_ray.cluster_config import (
    Assumed,
    Deadlines,
    Dtype,
    Duration,
    GenerationPool,
    Lease,
    Lora,
    NonNegativeFloat,
    NonNegativeInt,
    Pool,
    Pools,
    PositiveFloat,
    PositiveInt,
    Publish,
    Rehearsal,
    RewardPool,
    RunName,
    Section,
    Seed,
    Share,
)
from ocrm_ray.gold_config import ClassifierGold, FunctionGold, Gold, JudgeGold, SimilarityGold
from ocrm_ray.reward_config import (
    Correction,
    MetaStep,
    RepresentationLoss,
    Reward,
    RewardTraining,
    SyntheticPairs,
    Weights,
)

__all__ = [
    "Assumed",
    "Deadlines",
    "Dtype",
    "Duration",
    "GenerationPool",
    "Lease",
    "Lora",
    "Pool",
    "Pools",
    "Publish",
    "Rehearsal",
]
__all__ += ["RewardPool", "Section"]
__all__ += ["Correction", "MetaStep", "RepresentationLoss", "Reward", "RewardTraining", "SyntheticPairs", "Weights"]
__all__ += ["ClassifierGold", "FunctionGold", "Gold", "JudgeGold", "SimilarityGold"]


class PraiseWorld(Section):
    """The embedded world: a word-level language in which a little praise is liked and hype is not."""

    kind: Literal["praise"] = "praise"
    num_prompts: PositiveInt = 8000
    """Prompts of four topic words, drawn without repetition; the last ``data.num_heldout`` are held out."""
    response_words: Annotated[int, Field(ge=1, le=123)] = 12
    """Of a reference response. Gold's thresholds grow with it: four praise words and eight different ones in twelve."""
    policy_hidden_size: PositiveInt = 64
    """Width of the policy (2 layers, heads of 32)."""
    reward_hidden_size: PositiveInt = 32
    """Width of the reward model (1 layer): too small on purpose, so that it can be gamed."""


class DataFile(Section):
    """A data set: JSON, JSONL (also .gz), Parquet, or a name on the Hugging Face Hub."""

    path: str
    """A file, or a Hub name such as ``org/dataset``."""
    split: str = "train"
    """Split of a Hub data set; a file is one split."""
    limit: PositiveInt | None = None
    """Use the first so many rows; null: all."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a line that is no JSON object, or a row of a wrong form, does: end the run, or be left out and counted."""


class Data(Section):
    """Prompts, and how they are split."""

    prompts: DataFile | None = None
    """Rows with ``prompt``, ``instruction`` (+ ``input``) or chat ``messages``; ``output``, ``reference`` or
    ``response`` is the optional reference response. Null only with ``world``."""
    num_heldout: PositiveInt = 1024
    """Prompts kept from training, for evaluation; drawn once, with ``seed``."""
    max_prompt_tokens: PositiveInt = 512
    """Longer prompts are dropped and counted, as empty ones are."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """Wrap plain prompts as one user message in the tokenizer's chat template; ``auto``: where there is one."""


class Sft(Section):
    """The SFT model: a ready one, or a base model fine-tuned on the prompts' reference responses."""

    ready: str | None = None
    """A ready SFT model (folder or Hub name): nothing is trained."""
    base: str | None = None
    """The model to fine-tune (folder or Hub name). Null with ``world``: the world's own untrained model."""
    num_epochs: PositiveInt = 3
    batch_size: PositiveInt = 64
    """Sequences an optimiser step."""
    micro_batch_size: PositiveInt = 64
    """Most sequences a forward pass."""
    micro_batch_tokens: PositiveInt = 16384
    """Most tokens, padding included, a forward pass; one longer sequence goes alone."""
    learning_rate: PositiveFloat = 1e-3
    """Peak of a linear decay to 0."""


class Pairs(Section):
    """Preference pairs: ready ones, or sampled from the SFT model and labelled by gold."""

    ready: DataFile | None = None
    """Ready pairs: ``prompt, chosen, rejected``, chat-message pairs, or transcripts with a shared prefix."""
    behaviour: str = "sft"
    """Who wrote them: ``sft``, a model's folder or Hub name, or ``unknown`` (refused by importance weighting)."""
    allow_unknown_behaviour: bool = False
    """Weight pairs of unknown origin as if the SFT model had written them."""
    num_pairs: PositiveInt = 20000
    """Pairs to sample, spread evenly over the training prompts."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of the pairs: the denominator of the importance ratio is taken at it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling of the pairs; anything below 1 makes the ratio biased."""
    top_k: NonNegativeInt = 0
    """Top-k sampling of the pairs; 0: off."""
    labels: Literal["argmax", "bradley_terry"] = "bradley_terry"
    """The higher gold score wins, or a coin weighted by sigmoid(gold difference) decides."""
    heldout_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the pairs kept from RM training, to measure its accuracy."""


class MissingEosPenalty(Section):
    """Responses without EOS get this reward in place of the model's."""

    penalty: float


class Rollout(Section):
    """What the policy generates for its own training."""

    prompts_per_step: PositiveInt = 32
    samples_per_prompt: PositiveInt = 4
    max_new_tokens: PositiveInt = 64
    """Longest response, EOS included."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature: the numerator of the importance ratio is taken at it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = 0
    max_staleness: NonNegativeInt = 1
    """Used at policy version v, a rollout began no earlier than v - max_staleness."""
    importance_cap: PositiveFloat | None = 2.0
    """Each token's loss is weighted by min(trainer's / sampler's probability, cap): stale rollouts and engines that
    compute differently are corrected for. Null: off, as if they were on-policy."""
    straggler: Literal["wait", "reissue"] = "wait"
    """At the bound, wait for the late rollout, or abort it and issue its prompt again."""
    missing_eos: Literal["mask"] | MissingEosPenalty = MissingEosPenalty(penalty=-1.0)
    """``mask`` leaves responses without EOS out of the loss."""


class DirectPreference(Section):
    """DPO and WPO: the policy learns from the preference pairs alone, without rollouts and reward model."""

    beta: PositiveFloat = 0.05
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of swapped labels."""
    pairs_per_step: PositiveInt = 128
    """Training pairs of an update; each epoch takes all, in a new order."""


class Policy(Section):
    """One policy update."""

    algorithm: Literal["ppo", "rloo", "grpo", "dpo", "wpo"] = "rloo"
    """``dpo`` and ``wpo`` are the offline baselines on the same pairs: nothing is corrected."""
    direct: DirectPreference = DirectPreference()
    num_updates: PositiveInt = 140
    """Policy updates of the whole run."""
    learning_rate: PositiveFloat = 1e-4
    critic_learning_rate: PositiveFloat = 1e-4
    """PPO only."""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """``linear`` decays to 0 over the run, or over ``correction.every`` updates if ``reset_optimizer``."""
    num_epochs: PositiveInt = 1
    """Passes over a step's rollouts."""
    num_minibatches: PositiveInt = 1
    """Optimiser steps a pass."""
    micro_batch_size: PositiveInt = 128
    """Most sequences a forward pass."""
    micro_batch_tokens: PositiveInt = 8192
    """Most tokens, padding included, a forward pass; one longer sequence goes alone."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, more time. Of every
    network that trains."""
    reuse_logprobs_within: NonNegativeFloat = 0.01
    """Where an update has several optimiser steps, the sampler's log-probs stand for the trainer's own while their
    mean gap was at most so many nats a token; 0: never. Rollouts of older weights are always computed again."""
    kl_coefficient: NonNegativeFloat = 0.1
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_placement: Literal["reward", "loss"] = "reward"
    """Subtract the KL from the reward, or add it to the loss."""
    clip_range: PositiveFloat = 0.2
    value_clip_range: PositiveFloat = 0.2
    """PPO only."""
    value_coefficient: NonNegativeFloat = 0.1
    """PPO only."""
    gamma: Share = 1.0
    gae_lambda: Share = 0.95
    """PPO only."""
    max_grad_norm: PositiveFloat = 1.0
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    lora: Lora | None = None
    """Train adapters alone; null: all weights. PPO's critic trains all of its own."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage of policy and critic, and of a refit unless ``pools.reward`` has its own."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Of what ``zero_stage`` spreads, keep the optimiser's states, or ``all`` with the weights, in host memory."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """More of DeepSpeed's own settings, as in its JSON file, laid over what follows from the others here."""

    @property
    def is_offline(self) -> bool:
        """Whether it learns from the preference pairs alone."""
        return self.algorithm in ("dpo", "wpo")


class Probe(Section):
    """After a publish, engine and trainer score the same stored sequences."""

    every: PositiveInt = 10
    """Probe the first publish, then every so many."""
    num_sequences: PositiveInt = 32
    factor: Annotated[float, Field(ge=1)] = 2.0
    """Bound: so many times the mean absolute gap of the freshly started engine."""
    floor: PositiveFloat = 2e-3
    """Bound: never below this gap, in nats a token."""


class Guards(Section):
    """What is done about numbers that should not be; each finding is an event ``guard``."""

    max_skipped_steps: NonNegativeInt = 3
    """Optimiser steps of the policy, and of the critic, that are skipped in a row because their gradient is not finite;
    one more ends the run. In other fits the first is an error."""
    max_kl: PositiveFloat | None = None
    """KL to the SFT model in nats a response, beyond which the run ends; null: no bound."""
    max_logprob_gap: PositiveFloat | None = None
    """Mean absolute difference of trainer and sampler on an update's rollouts, in nats a token, beyond which the run
    ends; null: no bound. What ``probe`` bounds is their difference on stored sequences, behind a publish."""
    min_ess_fraction: Share = 0.01
    """Importance weights whose effective sample size is a smaller share of their pairs are reported, and used."""
    max_accuracy_drop: Share = 0.3
    """A refit whose accuracy on held-out pairs is lower than the first reward model's by more is not promoted. Refits
    with weights of full exponent rightly lose up to 0.25: the pairs are not from the policy's distribution. Without
    effect with ``reward.ready``, whose accuracy is not known."""


class Evaluation(Section):
    """On fixed held-out prompts, sampled as in training."""

    every: PositiveInt = 10
    """Policy updates between evaluations; also before the first and after the last."""
    num_prompts: PositiveInt = 1024
    num_pair_prompts: NonNegativeInt = 256
    """Of these prompts so many get two samples: the on-policy pairs of the RM's accuracy."""
    num_samples_saved: NonNegativeInt = 16
    """Samples written to samples.jsonl at each evaluation."""


class Checkpoint(Section):
    """What is saved while the run goes on."""

    every: PositiveInt = 50
    """Policy updates between checkpoints; the last policy is always saved."""
    num_kept: PositiveInt = 2
    """The newest so many checkpoints stay."""


class Faults(Section):
    """What a run survives. Every wait has its deadline in ``deadlines``."""

    max_replacements: NonNegativeInt = 3
    """How often an actor whose process died gets another, which takes over its work; each engine, scorer, reward
    server, refitter and the evaluator counts for itself."""
    max_restarts: NonNegativeInt = 3
    """How often the run goes back to its newest checkpoint over new processes, after a rank of the trainer died, an
    actor could not be replaced, or one hung; then it ends."""


class RunConfig(Section):
    """One run: SFT -> pairs -> labels -> RM -> RL with corrections -> evaluation -> report."""

    name: RunName
    """The run folder is ``output_dir/name``."""
    output_dir: Path = Path("runs")
    stages_dir: Path | None = None
    """Where the stages before RL leave their results; null: in the run folder. Arms of a study share one."""
    seed: Seed = 0
    deterministic: bool = False
    """The same seed on the same kind of processor gives the same run bit for bit, however often it is cut off and
    resumed: work is done in fixed parts and order, which takes longer. Float32 on CPU, one sequence at a time."""
    world: PraiseWorld | None = None
    """The embedded world, in place of ``data.prompts``, models and gold."""
    share_prompts: bool = True
    """Responses to one prompt go through a network in one row, behind a single copy of it: the same numbers in less
    time. False for architectures whose attention takes no mask of its own."""
    trust_remote_code: bool = False
    """Let model and data repositories run their own code on this machine."""
    data: Data = Data()
    sft: Sft = Sft()
    pairs: Pairs = Pairs()
    gold: Gold | None = None
    """The true reward, for labels and evaluation; null only with ready pairs (or ``world``)."""
    reward: Reward = Reward()
    rollout: Rollout = Rollout()
    policy: Policy = Policy()
    correction: Correction = Correction()
    probe: Probe = Probe()
    guards: Guards = Guards()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    faults: Faults = Faults()
    pools: Pools = Pools()
    publish: Publish = Publish()
    deadlines: Deadlines = Deadlines()
    lease: Lease = Lease()
    rehearsal: Rehearsal | None = None
    """Only for ``rehearse`` and ``check``; null: from an earlier run of the folder, else from arithmetic."""
    assumed: Assumed = Assumed()

    @property
    def secrets(self) -> tuple[str, ...]:
        """Names of the environment variables whose values gold needs and no file or log may show."""
        gold = self.gold
        return (gold.api_key_env,) if isinstance(gold, JudgeGold) and gold.api_key_env else ()

    @property
    def refit_zero_stage(self) -> int:
        """DeepSpeed ZeRO stage at which reward models are trained."""
        own = self.pools.reward.refit_zero_stage
        return self.policy.zero_stage if own is None else own

    @property
    def by_nccl(self) -> bool:
        """Whether engines get weights by NCCL, which needs whole GPUs."""
        whole_gpus = min(self.pools.policy.gpus_per_actor, self.pools.generation.gpus_per_actor) >= 1
        return self.publish.transport == "nccl" or (self.publish.transport == "auto" and whole_gpus)

    @property
    def run_dir(self) -> Path:
        """``output_dir/name``."""
        return self.output_dir / self.name

    @property
    def stage_root(self) -> Path:
        """Where stage results are: ``stages_dir``, or ``stages/`` in the run folder."""
        return self.stages_dir if self.stages_dir is not None else self.run_dir / "stages"


class StudyConfig(Section):
    """Arms x seeds over shared stages: each arm is the base run with some keys changed."""

    name: RunName
    output_dir: Path = Path("runs")
    base: dict[str, object]
    """A run configuration without ``name``, ``output_dir``, ``stages_dir`` and ``seed``."""
    arms: dict[RunName, dict[str, object]]
    """Arm name -> dotted keys and their values, applied to ``base``."""
    seeds: tuple[Seed, ...] = (1,)
    """A seed redraws every stage, not only RL."""
    arm_seeds: dict[RunName, tuple[Seed, ...]] = Field(default_factory=dict)
    """Arm name -> its seeds, in place of ``seeds``."""
    own_stages: tuple[RunName, ...] = ()
    """Arms that make SFT model, pairs and first reward model for themselves: their settings before RL may differ."""
    control: RunName | None = None
    """The arm that the others are compared with, seed by seed."""
    early_stopping: RunName | None = None
    """The arm that the report also shows stopped at its gold peak: the row ``early_stopping``, from no run of its own.
    Half of the evaluation prompts chooses the evaluation, the other half gives its gold; both ways, averaged."""

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """Of ``arm_seeds``, else ``seeds``."""
        return self.arm_seeds.get(arm, self.seeds)
