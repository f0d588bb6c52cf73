"""Which settings a result depends on, before RL stage by stage, and where two configurations differ in them."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from ocrm_ray.config import JudgeGold, RunConfig

Differences: TypeAlias = list[tuple[str, object, object]]
"""Dotted key, value here, value there."""
_KEYS: Mapping[str, tuple[str, ...]] = {
    "world": ("seed", "world"),
    "data": ("seed", "data"),
    "sft": ("sft", "rollout.max_new_tokens", "policy.max_grad_norm", "pools.policy.dtype"),
    "pairs": ("pairs", "gold", "rollout.max_new_tokens", "pools.generation.dtype"),
    "reward": ("reward.base", "reward.lora", "reward.training", "pools.reward.dtype"),
    "logprobs": ("pairs.behaviour", "pairs.temperature", "pools.scoring.dtype"),
}
"""Dotted keys, each with all that is below it."""
_OF_RL_TOO = ("reward",)
"""Of what RL begins with, beyond the stages."""
_WITHOUT_EFFECT = (
    "pairs.allow_unknown_behaviour",
    "reward.scale",
    "reward.ensemble",
    "gold.batch_size",
    *(f"gold.{name}" for name, field in JudgeGold.model_fields.items() if not field.repr),
)
"""On what an arm finds in the shared folder; an ensemble is in one of its own."""
_OF_RL = (
    *("deterministic", "reward", "rollout", "policy", "correction", "guards", "evaluation"),
    *(f"pools.{pool}.dtype" for pool in ("generation", "policy", "scoring", "reward")),
)
_OF_SPEED = (
    *(f"policy.{key}" for key in ("micro_batch_size", "micro_batch_tokens", "gradient_checkpointing")),
    *(f"policy.{key}" for key in ("zero_stage", "offload")),
    *(f"correction.training.{key}" for key in ("micro_batch_size", "micro_batch_tokens")),
    "evaluation.num_samples_saved",
)
"""What a run's figures depend on behind the stages; and of that, how fast and in what memory they are computed."""


def stage_settings(config: RunConfig, stage: str) -> dict[str, object]:
    """By dotted key the settings that a stage's own work depends on, those of the stages before it left out."""
    return _chosen(config, _keys_of(config, stage), _WITHOUT_EFFECT)


def stage_differences(config: RunConfig, other: RunConfig) -> Differences:
    """Each setting that would make other results before RL."""
    ours, theirs = (_all_settings(each) for each in (config, other))
    return _differences(ours, theirs)


def rl_differences(config: RunConfig, other: RunConfig) -> Differences:
    """Each setting that would make other results of RL from the same stages."""
    stages = {key for key, _, _ in stage_differences(config, other)}
    ours, theirs = (_chosen(each, _OF_RL, _OF_SPEED) for each in (config, other))
    return [difference for difference in _differences(ours, theirs) if difference[0] not in stages]


def _keys_of(config: RunConfig, stage: str) -> tuple[str, ...]:
    return ("sft",) if stage == "sft" and config.sft.ready is not None else _KEYS[stage]


def _all_settings(config: RunConfig) -> dict[str, object]:
    keys = _OF_RL_TOO + tuple(key for stage in _KEYS for key in _keys_of(config, stage))
    return _chosen(config, keys, _WITHOUT_EFFECT)


def _chosen(config: RunConfig, keys: tuple[str, ...], without: tuple[str, ...]) -> dict[str, object]:
    leaves = _flat(config.model_dump(mode="json"))
    return {key: value for key, value in leaves.items() if _is_below(key, keys) and not _is_below(key, without)}


def _differences(ours: Mapping[str, object], theirs: Mapping[str, object]) -> Differences:
    keys = dict.fromkeys([*ours, *theirs])
    return [(key, ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)]


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, object]:
    """A tree's leaves by dotted key."""
    leaves: dict[str, object] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {above + key: value}
    return leaves


def _is_below(key: str, above: tuple[str, ...]) -> bool:
    """Whether the key is one of these, or below one."""
    return key in above or key.startswith(tuple(f"{each}." for each in above))
