"""The sections of the reward model: how it is trained at first, and how it is corrected.

``ocrm_ray.config`` puts them into the tree and names them again: import from there.
"""

from typing import Annotated, Literal

from pydantic import Field

from ocrm_ray.cluster_config import Lora, NonNegativeFloat, PositiveFloat, PositiveInt, Section, Share


class RewardTraining(Section):
    """How a reward model is fitted to pairs."""

    num_epochs: PositiveInt = 1
    batch_size: PositiveInt = 256
    """Pairs an optimiser step."""
    micro_batch_size: PositiveInt = 256
    """Most pairs a forward pass."""
    micro_batch_tokens: PositiveInt = 16384
    """Most tokens of pairs a forward pass; one longer pair goes alone."""
    learning_rate: PositiveFloat = 1e-3
    """Peak of a cosine decay to 0."""
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0


class Ensemble(Section):
    """Several reward models that differ by seed alone stand for one (arXiv 2310.02743)."""

    num_members: PositiveInt = 1
    aggregate: Literal["mean", "worst", "mean_minus_variance"] = "mean"
    """Of the members' scores, each first brought to the calibration set's mean and common spread."""
    variance_coefficient: NonNegativeFloat = 0.1


class Reward(Section):
    """The first reward model."""

    ready: str | None = None
    """A ready reward model (sequence classification, one label): nothing is trained at first."""
    base: str | None = None
    """Backbone to start from; null: the SFT model (with ``world``: the world's own small one)."""
    training: RewardTraining = RewardTraining()
    lora: Lora | None = None
    """Train adapters and the head alone, at first and in every refit; null: all weights."""
    num_calibration: PositiveInt = 1024
    """SFT responses on which every reward model is re-centred to mean 0."""
    scale: Literal["none", "calibration_std"] = "none"
    """Whether the score is also divided by its spread on the calibration set."""
    ensemble: Ensemble = Ensemble()


class Weights(Section):
    """Importance weights of preference pairs, w = exp(m * (ell(chosen) + ell(rejected))); ``wpo_bt``, whose weights are
    no ratios, obeys ``normalise`` alone."""

    formula: Literal["exact", "as_released"] = "exact"
    """``exact`` in log space; ``as_released`` reproduces the published code's float32 formula."""
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the relative density ratio; 0: the plain ratio."""
    m: Share = 1.0
    """Exponent; 1: the full weight, 0: none."""
    target_ess: Annotated[float, Field(gt=0, le=1)] | None = None
    """Lower m at each refit until the weights' effective sample size is this share of its pairs; null: m stays."""
    clip: PositiveFloat | None = None
    """Largest weight, before normalisation; null: no clip."""
    normalise: bool = True
    """Divide by the mean weight over the pairs of the refit."""


class MetaStep(Section):
    """MetaRM (arXiv 2405.00438): every gradient of the pair loss is taken at weights that were first moved towards a
    wider spread of the rewards of on-policy responses."""

    eta: NonNegativeFloat = 1e-2
    """Length of the move; 0: none."""
    step: Literal["sgd", "normalised", "preconditioned"] = "normalised"
    """eta times the gradient; that over its norm; that over the square root of the optimiser's second moments."""
    num_prompts: PositiveInt = 16
    """Prompts, all their responses, that a move is made for."""


class SyntheticPairs(Section):
    """RLP's synthetic preferences (arXiv 2403.19279): the best of a prompt's largest cluster against one outside."""

    clusterer: Literal["exact", "encoder", "nli"] = "exact"
    """Responses mean the same if they are equal, their sentence embeddings close, or a model of inference says so."""
    model: str | None = None
    """Of ``encoder`` or ``nli``: a Hub name or a folder; null with ``encoder``: the SFT model."""
    merge_rule: Literal["entail_both", "no_contradiction"] = "entail_both"
    """``nli``: each response follows from the other, or neither contradicts it."""
    similarity: Annotated[float, Field(gt=0, le=1)] = 0.9
    """``encoder``: least cosine."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Least share of the largest cluster; prompts below it give no pair."""


class RepresentationLoss(Section):
    """RLP's representation loss (arXiv 2403.19279): two responses to one prompt are views of one thing."""

    coefficient: NonNegativeFloat = 0.5
    latent_size: PositiveInt = 32
    num_prompts: Annotated[int, Field(ge=2)] = 64
    """Prompts, two of their responses each, of every optimiser batch; all in one forward pass."""
    learning_rate: PositiveFloat = 1e-3
    """Of the networks that are dropped afterwards."""


class Correction(Section):
    """The refit of the reward model for the policy's present distribution."""

    strategy: Literal["none", "refit", "ocrm", "shuffled", "wpo_bt", "metarm", "rlp_spg", "rlp_uml", "relabel"] = "ocrm"
    """``none`` keeps the RM; ``refit`` trains it again without weights, the others with: ``ocrm`` importance weights,
    ``shuffled`` the same ones permuted (the placebo), ``wpo_bt`` WPO's weights, ``metarm`` moves, ``rlp_spg`` synthetic
    pairs beside the old ones, ``rlp_uml`` a representation loss, ``relabel`` fresh gold labels (the upper bound)."""
    rollout_prompts: PositiveInt = 512
    """The latest prompts trained on: their responses are what metarm, rlp_spg, rlp_uml and relabel learn from."""
    metarm: MetaStep = MetaStep()
    rlp_spg: SyntheticPairs = SyntheticPairs()
    rlp_uml: RepresentationLoss = RepresentationLoss()
    every: PositiveInt = 10
    """k: a correction falls due every so many policy updates."""
    schedule: Literal["overlapped", "blocking"] = "overlapped"
    """Refit beside rollouts and training, or stop, refit, promote, go on."""
    promote_after: PositiveInt | None = None
    """Promote exactly so many updates after the snapshot, whatever the machine's speed."""
    max_lag: PositiveInt | None = None
    """Promote at most so many updates after the snapshot."""
    num_pairs: PositiveInt | None = None
    """Training pairs that a refit uses, drawn anew for each; null: all."""
    weights: Weights = Weights()
    training: RewardTraining = RewardTraining()
    rm_init: Literal["sft", "previous", "base"] = "base"
    """Refit from the SFT backbone with a new head, the live RM, or the RM's own initial weights."""
    kl_reference: Literal["moving", "sft"] = "sft"
    """At promotion the KL anchor becomes the policy that the RM is right for, or stays the SFT model."""
    critic_on_promote: Literal["reinit", "keep"] = "keep"
    """PPO only: start the critic again from the promoted RM, or keep it."""
    reset_optimizer: bool = False
    """Fresh policy optimiser and learning-rate schedule at promotion."""
    on_failure: Literal["keep_old", "stop"] = "keep_old"
    """Where a correction fails twice: train on under the live RM until the next one is due, or end the run. By default
    a fault costs one correction, which the events and the report show, and not a night's training; a comparison that
    needs every correction sets ``stop``. Mistakes in the configuration or the program end the run at once."""

    @property
    def scores_pairs(self) -> bool:
        """Whether every correction scores the pairs under the policy's snapshot."""
        return self.strategy in ("ocrm", "shuffled", "wpo_bt")
