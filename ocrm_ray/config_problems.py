"""The user's mistakes in a configuration, in plain words: pydantic's errors translated with the tree's JSON schema.

A location of pydantic's also names branches of unions; here it is brought back to the dotted path that the user
typed, and what was needed is said from the schema of that place.
"""

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

from pydantic import BaseModel, ValidationError

from ocrm_ray.errors import Problem

Schema: TypeAlias = dict[str, Any]

MAX_DEPTH = 32
MAX_VALUES = 100_000
MAX_INTEGER = 2**53
MAX_SHOWN = 60
_ABSENT = object()


def shown(value: object) -> str:
    """A value as it is quoted in a message: JSON, cut after a few words."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text if text.isprintable() else json.dumps(value, default=str)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def either(choices: Sequence[object]) -> str:
    """``a, b or c``."""
    *others, last = (str(choice) for choice in choices)
    return f"{', '.join(others)} or {last}" if others else last


def dotted(parts: Sequence[object]) -> str:
    """``("policy", "gamma")`` -> ``policy.gamma``; keys that would break the line are quoted."""
    return ".".join(text if (text := str(part)).isprintable() and text else json.dumps(text) for part in parts)


def plain_tree(tree: Mapping[Any, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The tree without what no configuration may hold, and one problem for each thing left out.

    That is: keys that are not text, infinities, enormous integers, endless nesting, values of other kinds.
    """
    problems: list[Problem] = []
    remaining = [MAX_VALUES]
    endless: dict[object, None] = {}

    def plain(value: object, parts: tuple[object, ...]) -> Any:
        remaining[0] -= 1
        if len(parts) > MAX_DEPTH or remaining[0] < 0:
            endless[parts[0]] = None
            return None
        if isinstance(value, Mapping):
            wrong = [key for key in value if not (isinstance(key, str) and _encodable(key))]
            problems.extend(_key_problem((*parts, key), key) for key in wrong)
            return {key: plain(item, (*parts, key)) for key, item in value.items() if key not in wrong}
        if isinstance(value, list):
            return [plain(item, (*parts, index)) for index, item in enumerate(value)]
        if problem := _scalar_problem(parts, value):
            problems.append(problem)
            return None
        return value

    result = {key: value for key, value in plain(tree, ()).items() if key not in endless}
    problems += [
        Problem(dotted([key]), "endless nesting", "an ordinary tree of keys", "remove the repetition")
        for key in endless
    ]
    return result, problems


def _key_problem(parts: Sequence[object], key: object) -> Problem:
    return Problem(dotted(parts), f"the key {shown(key)}", "a key that is text", "write it in quotes")


def _scalar_problem(parts: Sequence[object], value: object) -> Problem | None:
    path = dotted(parts)
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        if abs(value) <= MAX_INTEGER:
            return None
        return Problem(path, "an enormous integer", f"one of at most {MAX_INTEGER}", "change it")
    if isinstance(value, float):
        return None if math.isfinite(value) else Problem(path, str(value), "a finite number", "change it")
    if isinstance(value, str) and _encodable(value):
        return None
    got = "text that is no Unicode" if isinstance(value, str) else f"a value of kind {type(value).__name__}"
    return Problem(path, got, "text, a number, a list or a mapping", "change it")


def _encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


@cache
def _schema_of(model: type[BaseModel]) -> Schema:
    return model.model_json_schema()


def validation_problems(error: ValidationError, model: type[BaseModel], tree: object) -> list[Problem]:
    """One problem a mistake; branches of a union that the user did not mean are left out."""
    schema = _schema_of(model)
    found: dict[tuple[object, ...], Problem] = {}
    mappings: set[tuple[object, ...]] = set()
    for entry in error.errors(include_url=False):
        parts, node = _locate(schema, entry["loc"])
        if entry["type"].startswith("union_tag"):
            parts, node = (*parts, "kind"), _tag_schema(schema, node)
        elif entry["type"] not in {"missing", "extra_forbidden"} and isinstance(_value(tree, parts), Mapping):
            mappings.add(parts)
        if entry["type"] == "extra_forbidden":
            found[parts] = _unknown_key(schema, parts, entry["loc"])
        elif entry["loc"][-1:] == ("[key]",):
            found[parts] = Problem(dotted(parts), shown(entry["input"]), need_of(schema, node), "rename it")
        else:
            found.setdefault(parts, _mismatch(schema, parts, node, tree))
    blamed_elsewhere = {parts for parts in mappings if any(_is_below(other, parts) for other in found)}
    return [problem for parts, problem in found.items() if parts not in blamed_elsewhere]


def _is_below(parts: tuple[object, ...], ancestor: tuple[object, ...]) -> bool:
    return len(parts) > len(ancestor) and parts[: len(ancestor)] == ancestor


def _mismatch(schema: Schema, parts: tuple[object, ...], node: Schema, tree: object) -> Problem:
    need = need_of(schema, node)
    value = _value(tree, parts)
    if value is _ABSENT:
        return Problem(dotted(parts), "nothing", need, "add it")
    wants_text = any(branch.get("type") == "string" and "enum" not in branch for branch in _branches(schema, node))
    quotes = wants_text and isinstance(value, int | float)
    return Problem(dotted(parts), shown(value), need, "write it in quotes" if quotes else "change it")


def _unknown_key(schema: Schema, parts: tuple[object, ...], location: Sequence[object]) -> Problem:
    _, parent = _locate(schema, location[:-1])
    siblings = [key for branch in _branches(schema, parent) for key in branch.get("properties", {})]
    key, path, paths = str(parts[-1]), dotted(parts), list(known_paths(schema))
    if "." in key and path in paths:
        return Problem(path, "a dotted key", "one key a level", "write nested mappings (dots are for overrides)")
    near = [dotted((*parts[:-1], name)) for name in _nearest(key, siblings)]
    if not near:
        leaves = {known.rsplit(".", 1)[-1]: known for known in reversed(paths)}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(key, list(leaves), 1, 0.8)]
    if near:
        return Problem(path, "an unknown key", near[0], "correct the key")
    return Problem(path, "an unknown key", either(siblings), "remove it or choose one of these")


def _nearest(key: str, names: Sequence[str]) -> list[str]:
    """At most one of ``names``: of similar spelling, or abbreviated by its initials (``lr``)."""
    initials = [name for name in names if key == "".join(word[0] for word in name.split("_"))]
    return difflib.get_close_matches(key, names, 1) or initials[:1]


def known_paths(schema: Schema, node: Schema | None = None, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Every dotted path of a schema, parents before children."""
    for branch in _branches(schema, schema if node is None else node):
        for key, child in branch.get("properties", {}).items():
            yield dotted((*above, key))
            yield from known_paths(schema, child, (*above, key))


def _branches(schema: Schema, node: Schema) -> list[Schema]:
    """The alternatives of a schema node, references followed and unions flattened."""
    if "$ref" in node:
        return _branches(schema, schema["$defs"][node["$ref"].rsplit("/", 1)[-1]])
    if alternatives := node.get("anyOf") or node.get("oneOf"):
        return [branch for alternative in alternatives for branch in _branches(schema, alternative)]
    return [node]


def _locate(schema: Schema, location: Sequence[object]) -> tuple[tuple[object, ...], Schema]:
    """The typed path of pydantic's location, and the schema there; names of union branches only narrow the schema."""
    node: Schema = schema
    parts: tuple[object, ...] = ()
    for index, part in enumerate(location):
        branches = _branches(schema, node)
        child = next((found for branch in branches if (found := _child(branch, part)) is not None), None)
        label = [branch for branch in branches if _label_names(branch, part)]
        if child is None and label:
            node = {**node, "anyOf": label} if len(label) < len(branches) else node
        elif child is not None:
            parts, node = (*parts, part), child
        elif index == len(location) - 1 and part != "[key]" and not str(part).startswith("literal["):
            parts = (*parts, part)
        if part == "[key]":
            node = {"type": "string", "pattern": "of a key"}
    return parts, node


def _child(branch: Schema, part: object) -> Schema | None:
    found: Schema | None = branch.get("properties", {}).get(part)
    if found is None and isinstance(part, int):
        found = branch.get("items")
    if found is None and isinstance(part, str) and "patternProperties" in branch:
        found = next(iter(branch["patternProperties"].values()))
    return found


def _label_names(branch: Schema, part: object) -> bool:
    kind = branch.get("properties", {}).get("kind", {}).get("const")
    return part is not None and part in (kind, branch.get("title"))


def _tag_schema(schema: Schema, node: Schema) -> Schema:
    kinds = [branch["properties"]["kind"]["const"] for branch in _branches(schema, node) if "properties" in branch]
    return {"enum": kinds}


def _value(tree: Any, parts: Sequence[Any]) -> Any:
    """What stands at a path of the tree; ``_ABSENT`` where nothing does."""
    for part in parts:
        present = part in tree if isinstance(tree, Mapping) else isinstance(tree, list) and part in range(len(tree))
        if not present:
            return _ABSENT
        tree = tree[part]
    return tree


def need_of(schema: Schema, node: Schema) -> str:
    """What a place in the tree accepts: ``an integer >= 1 or null``."""
    needs = list(dict.fromkeys(_branch_need(schema, branch) for branch in _branches(schema, node)))
    if len(needs) > 2 and "null" in needs:
        needs = ["a mapping with kind " + either(_tag_schema(schema, node)["enum"]), "null"]
    return either(needs)


def _branch_need(schema: Schema, branch: Schema) -> str:
    if "enum" in branch:
        return either(branch["enum"])
    if "const" in branch:
        return str(branch["const"])
    if "pattern" in branch:
        return "letters, digits, dots, dashes and underscores, a letter or digit first"
    kind = branch.get("type")
    if kind == "array":
        return "a list, each item " + need_of(schema, branch["items"])
    if kind == "object":
        required = branch.get("required", [])
        return "a mapping" + (f" with {', '.join(required)}" if required else "")
    if kind in {"integer", "number"}:
        return ("an integer" if kind == "integer" else "a number") + _bounds(branch)
    if kind == "string":
        return "a path" if branch.get("format") == "path" else "text"
    return "true or false" if kind == "boolean" else "null"


def _bounds(branch: Schema) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {branch[name]:g}" for name, sign in signs.items() if name in branch]
    return " " + " and ".join(bounds) if bounds else ""
