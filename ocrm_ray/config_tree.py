"""YAML files and ``key=value`` overrides as one plain tree of text, numbers, lists and mappings.

An override sets one dotted key; its value is read as YAML. A mapping is merged into the mapping that it meets, unless
the two name another ``kind``; anything else replaces what was there.
"""

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from ocrm_ray.config_problems import dotted, plain_tree, shown
from ocrm_ray.errors import Problem, UserError

Tree: TypeAlias = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``1e-4`` is a number, a date is text, and tags and repeated keys are mistakes."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, "tags (!) are not used here", event.start_mark)  # type: ignore[arg-type]
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def read_tree(path: Path, overrides: Sequence[str]) -> tuple[Tree, list[Problem]]:
    """The file's tree with the overrides merged in, and the mistakes found so far. UserError where there is no tree."""
    problems: list[Problem] = []
    changes: list[Tree] = []
    for text in overrides:
        change = _override(text)
        if isinstance(change, Problem):
            problems.append(change)
        else:
            changes.append(change)
    try:
        tree = _parsed(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        file_problem = Problem(str(path), (error.strerror or str(error)).lower(), "a YAML file", "check the path")
    except UnicodeDecodeError:
        file_problem = Problem(str(path), "a file that is no UTF-8 text", "a YAML file", "check the path")
    except yaml.YAMLError as error:
        file_problem = Problem(str(path), f"invalid YAML {_where(error)}", "a YAML mapping", "correct that line")
    else:
        if isinstance(tree, dict):
            for change in changes:
                tree = merged(tree, change)
            tree, wrong = plain_tree(tree)
            return tree, [*problems, *wrong]
        got = "an empty file" if tree is None else shown(tree)
        file_problem = Problem(str(path), got, "a YAML mapping", "write key: value lines")
    raise UserError([file_problem, *problems])


def _override(text: str) -> Tree | Problem:
    key, equals, value = text.partition("=")
    if not equals:
        return Problem(dotted([text]), "no = sign", "key=value", f"write {dotted([text])}=VALUE")
    if not all(key.split(".")):
        return Problem(dotted([text]), f"the key {shown(key)}", "dotted.key=value", "write the key in full")
    try:
        return nested({key: _parsed(value)})
    except yaml.YAMLError as error:
        return Problem(dotted([key]), f"invalid YAML {_where(error)}", "a YAML value", "put the value in quotes")


def _parsed(text: str) -> Any:
    """YAML of one document; raises yaml.YAMLError only."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except ValueError as error:
        raise yaml.YAMLError(f"a number that cannot be read, {error}") from None


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return (f"at line {mark.line + 1} " if mark is not None else "") + f"({' '.join(what.split())})"


def nested(changes: Mapping[str, Any]) -> Tree:
    """``{"a.b": c}`` -> ``{"a": {"b": c}}``."""
    tree: Tree = {}
    for key, value in changes.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = merged(tree, value)
    return tree


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> Tree:
    """``tree`` with ``changes`` laid over it."""
    result = dict(tree)
    for key, change in changes.items():
        present = result.get(key)
        if isinstance(present, Mapping) and isinstance(change, Mapping) and _same_kind(present, change):
            result[key] = merged(present, change)
        else:
            result[key] = change
    return result


def _same_kind(present: Mapping[str, Any], change: Mapping[str, Any]) -> bool:
    return bool(change.get("kind", present.get("kind")) == present.get("kind"))
