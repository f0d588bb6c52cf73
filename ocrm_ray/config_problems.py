"""The user's mistakes in a configuration tree, in plain words, made from pydantic's errors."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ocrm_ray.errors import Problem

MAX_SHOWN = 60
_NEEDS = {
    "missing": "a value",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "string_type": "text",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_too_long": "128 letters at most",
    "string_pattern_mismatch": "letters, digits, dots, dashes and underscores, a letter or digit first",
}
"""By the kind of error, where pydantic's own words are those of Python."""


def shown(value: object) -> str:
    """A value as it is quoted in a message: JSON, cut after a few words."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def known_keys(annotation: object, above: str = "") -> Iterator[tuple[str, object]]:
    """(dotted path, type) of every key of a configuration class, parents before children."""
    for part in get_args(annotation):
        yield from known_keys(part, above)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for key, field in annotation.model_fields.items():
            yield above + key, field.annotation
            yield from known_keys(field.annotation, f"{above}{key}.")


def validation_problems(error: ValidationError, model: type[BaseModel], tree: Mapping[str, Any]) -> list[Problem]:
    """One problem a mistake; where a union refused a mapping, only what is wrong inside of it is told."""
    found: dict[str, list[Any]] = {}
    for entry in error.errors(include_url=False):
        found.setdefault(_path(entry, tree), []).append(entry)
    known = list(known_keys(model))
    return [
        _problem(path, entries, known)
        for path, entries in found.items()
        if not any(other.startswith(f"{path}.") for other in found)
    ]


def _path(entry: Any, tree: Any) -> str:
    """The dotted path that the user typed: pydantic's location also names branches of unions."""
    parts = []
    for part in entry["loc"]:
        inside = tree if isinstance(tree, Mapping) else dict(enumerate(tree)) if isinstance(tree, list) else {}
        if part in inside:
            parts.append(str(part))
            tree = inside[part]
    if entry["type"] == "missing":
        parts.append(str(entry["loc"][-1]))
    return ".".join([*parts, "kind"] if entry["type"].startswith("union_tag") else parts)


def _problem(path: str, entries: Sequence[Any], known: Sequence[tuple[str, object]]) -> Problem:
    kind, value = entries[0]["type"], entries[0]["input"]
    if kind == "json_invalid":  # it was made from the tree: nothing but depth is wrong with it
        return Problem("the configuration", "one nested too deep", "mappings as the keys are", "write it flatter")
    if kind == "extra_forbidden":
        return _unknown_key(path, [name for name, _ in known])
    if kind.startswith("union_tag"):
        need = " or ".join(str(choice) for name, choices in known if name == path for choice in get_args(choices))
        value = value.get("kind")
    else:
        need = " or ".join(dict.fromkeys(_need(entry) for entry in entries))
    if kind in ("missing", "union_tag_not_found"):
        return Problem(path, "nothing", need, "add it")
    wants_quotes = kind == "string_type" and isinstance(value, int | float)
    return Problem(path, shown(value), need, "write it in quotes" if wants_quotes else "change it")


def _need(entry: Any) -> str:
    bound = "a number " if entry["type"].startswith(("greater_than", "less_than")) else ""
    return _NEEDS.get(entry["type"]) or bound + entry["msg"].removeprefix("Input should be ")


def _unknown_key(path: str, known: Sequence[str]) -> Problem:
    above, _, key = path.rpartition(".")
    siblings = {leaf: name for name in known for parent, _, leaf in [name.rpartition(".")] if parent == above}
    by_initials = [name for name in siblings if key == "".join(word[0] for word in name.split("_"))]
    leaves = {name.rpartition(".")[2]: name for name in reversed(known)} | siblings
    if near := by_initials or difflib.get_close_matches(key, leaves, 1):
        return Problem(path, "an unknown key", leaves[near[0]], "correct the key")
    return Problem(path, "an unknown key", f"one of {', '.join(siblings)}", "remove it or choose one of these")
