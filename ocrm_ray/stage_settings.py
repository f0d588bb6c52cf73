"""Which settings decide what the stages before RL make, so that their results may be used again."""

from collections.abc import Mapping
from typing import Any

from ocrm_ray.config import RunConfig

_SECTIONS = ("seed", "world", "data", "sft", "pairs", "gold", "reward")
_WITHOUT_EFFECT = ("pairs.allow_unknown_behaviour", "reward.scale", "gold.batch_size")
_BESIDE = ("rollout.max_new_tokens",)


def stage_differences(config: RunConfig, other: RunConfig) -> list[tuple[str, object, object]]:
    """(dotted key, value here, value there) of each setting that would make other stage results."""
    ours, theirs = stage_settings(config), stage_settings(other)
    keys = dict.fromkeys([*ours, *theirs])
    return [(key, ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)]


def stage_settings(config: RunConfig) -> dict[str, object]:
    """Dotted key -> value."""
    flat = _flat(config.model_dump(mode="json"), "")
    return {
        key: value
        for key, value in flat.items()
        if (key.split(".")[0] in _SECTIONS and key not in _WITHOUT_EFFECT) or key in _BESIDE
    }


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
