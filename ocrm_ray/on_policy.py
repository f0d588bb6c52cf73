"""What the latest rollouts give a refit: groups of responses, synthetic pairs, or pairs with fresh gold labels."""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from ocrm_ray.config import RunConfig
from ocrm_ray.gold import label_pairs
from ocrm_ray.pools import Evaluator
from ocrm_ray.records import Material, OnPolicyState, Responses, Rollout, SequencePair
from ocrm_ray.strategies import Strategy
from ocrm_ray.synthetic_pairs import synthetic_pair


@dataclass(eq=False)
class OnPolicyResponses:
    """Keeps the rollouts last trained on, as many as are asked for; ``emit`` receives what was made of them."""

    config: RunConfig
    evaluator: Evaluator
    strategy: Strategy
    emit: Callable[..., None]

    def __post_init__(self) -> None:
        self.restore(OnPolicyState())

    @property
    def state(self) -> OnPolicyState:
        return OnPolicyState(tuple(self._latest), tuple(self._labelled), self._taken, self._taking)

    def restore(self, state: OnPolicyState) -> None:
        """Go on from ``state``."""
        self._latest = deque(state.latest, maxlen=self.config.correction.rollout_prompts)
        self._labelled = list(state.labelled)
        self._taken, self._taking = state.taken, state.taking

    def add(self, rollouts: Seq[Rollout]) -> None:
        """These were just trained on."""
        if self.strategy.rollouts is not None:
            self._latest.extend(
                Responses(each.prompt, each.sequences, tuple(score.reward for score in each.scores or ()))
                for each in rollouts
            )

    async def material(self, snapshot_version: int) -> Material:
        """(extra pairs, groups) of a refit for the policy of ``snapshot_version``; asked again, the same ones."""
        if self._taken is None or self._taken[0] != snapshot_version:
            if self._taking is None or self._taking[0] != snapshot_version:
                self._taking = snapshot_version, tuple(self._latest)
            self._taken = snapshot_version, *(await self._take(*self._taking))
            self._taking = None
        return self._taken[1:]

    async def _take(self, snapshot_version: int, latest: Seq[Responses]) -> Material:
        rng = np.random.default_rng([self.config.seed, snapshot_version, 2])
        match self.strategy.rollouts:
            case None:
                return (), ()
            case "groups":
                return (), tuple(rollout.sequences for rollout in latest)
            case "synthetic":
                pairs = await self._synthetic(latest, rng)
            case "gold":
                fresh, used = await self._fresh(latest, rng), set(latest)
                self._labelled += fresh
                self._latest = deque((each for each in self._latest if each not in used), self._latest.maxlen)
                pairs = self._labelled
        self.emit("pairs_added", snapshot_version=snapshot_version, num_prompts=len(latest), num_pairs=len(pairs))
        return tuple(pairs), ()

    async def _synthetic(self, rollouts: Seq[Responses], rng: np.random.Generator) -> list[SequencePair]:
        """The best of each prompt's largest cluster, by the reward model that scored it, and one outside."""
        clusters = await self.evaluator.clusters([rollout.sequences for rollout in rollouts])
        pairs = []
        for rollout, cluster_of in zip(rollouts, clusters, strict=True):
            rewards = np.array(rollout.rewards)
            chosen = synthetic_pair(np.array(cluster_of), rewards, self.config.correction.rlp_spg.confidence, rng)
            if chosen is not None:
                pairs.append((rollout.sequences[chosen[0]], rollout.sequences[chosen[1]]))
        return pairs

    async def _fresh(self, rollouts: Seq[Responses], rng: np.random.Generator) -> list[SequencePair]:
        """Two responses of each prompt since the last refit, ordered by gold as the first pairs were."""
        different = [rollout for rollout in rollouts if rollout.sequences[0] != rollout.sequences[1]]
        pairs = [(rollout.sequences[0], rollout.sequences[1]) for rollout in different]
        prompts = [rollout.prompt for rollout in different for _ in range(2)]
        gold = np.array(await self.evaluator.gold_of(prompts, [sequence for pair in pairs for sequence in pair]))
        first_wins = label_pairs(gold[::2], gold[1::2], self.config.pairs.labels, rng)
        return [(one, two) if wins else (two, one) for (one, two), wins in zip(pairs, first_wins, strict=True)]
