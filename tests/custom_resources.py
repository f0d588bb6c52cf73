"""A strict second reader of Kubernetes manifests: the CRDs' structural schemas, unknown fields refused."""

import copy
import os
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

Tree = dict[str, Any]
ROOT = Path(__file__).parent.parent
CRDS = Path(os.environ.get("OCRM_KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay"))
"""Folder of the CRDs of KubeRay v1.7.0."""


@cache
def schema(kind: str) -> Tree:
    """Of the stored version of a KubeRay kind."""
    text = (CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(encoding="utf-8")
    definition = yaml.load(text, yaml.CSafeLoader)["spec"]
    assert definition["names"]["kind"] == kind
    (version,) = (version for version in definition["versions"] if version["storage"])
    assert version["name"] == "v1"
    return closed(version["schema"]["openAPIV3Schema"])


def at(tree: Tree, *path: str) -> Tree:
    """The schema of a field, by the names of the fields above it; ``*`` is any element of a list."""
    for name in path:
        tree = tree["items"] if name == "*" else tree["properties"][name]
    return tree


def closed(tree: Any) -> Any:
    """The same schema in which fields that it does not name are errors; metadata, which Kubernetes checks, is open."""
    tree = copy.deepcopy(tree)
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, list):
            nodes += node
        elif isinstance(node, dict):
            if isinstance(node.get("properties"), dict) and not node.get("x-kubernetes-preserve-unknown-fields"):
                node.setdefault("additionalProperties", False)
            nodes += node.values()
    return tree


def mistakes(manifest: Any, tree: Tree) -> list[str]:
    """``path: what is wrong`` for each."""
    errors = Draft202012Validator(tree).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]
