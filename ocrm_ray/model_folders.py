"""What a Hugging Face model folder says of itself, read without torch: sizes, context, vocabulary, and what is wrong.

Only local folders are read. A name of the form ``org/name`` is taken for the Hub's and not looked up.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ocrm_ray.config_problems import shown
from ocrm_ray.errors import Problem

Role: TypeAlias = Literal["policy", "reward", "backbone", "classifier", "encoder"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ARCHITECTURES: Mapping[Role, tuple[str, ...]] = {
    "policy": ("ForCausalLM",),
    "reward": ("ForSequenceClassification",),
    "backbone": ("ForCausalLM", "ForSequenceClassification"),
    "classifier": ("ForSequenceClassification",),
    "encoder": (),
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
_BACKBONE_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class ModelFacts:
    """A readable model folder: its config.json, and its number of parameters as the weight files list them."""

    folder: Path
    settings: Mapping[str, Any]
    num_parameters: int

    @property
    def context(self) -> int | None:
        """Longest sequence in tokens."""
        return next((size for key in _CONTEXT_KEYS if isinstance(size := self.settings.get(key), int)), None)

    @property
    def vocab_size(self) -> int | None:
        size = self.settings.get("vocab_size")
        return size if isinstance(size, int) else None


def is_hub_name(name: str) -> bool:
    """Whether a name that is no local path can only mean the Hub: ``org/name``, and ``org`` is no folder here."""
    return not os.path.exists(name) and bool(_HUB_NAME.fullmatch(name)) and not os.path.isdir(name.split("/")[0])


def read_model(where: str, name: str, role: Role) -> tuple[ModelFacts | None, list[Problem]]:
    """Facts of the folder ``name`` (None: a Hub name, or unreadable) and its problems, told of the key ``where``."""
    folder = Path(name)
    if is_hub_name(name):
        return None, []
    if not os.path.isdir(name):
        got = f"{shown(name)}, {'a file' if os.path.exists(name) else 'which does not exist'}"
        return None, [Problem(where, got, "a model folder or a Hub name org/name", "correct the path")]
    problems: list[Problem] = []

    def blame(got: str, need: str, do: str) -> None:
        problems.append(Problem(where, f"{shown(name)} {got}", need, do))

    settings = _read_json(folder / "config.json")
    if settings is None:
        blame("without a readable config.json", "a Hugging Face model folder", "save the model there again")
    elif fault := _role_fault(settings, role):
        blame(*fault)
    if role not in ("reward", "backbone") and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        blame("without a tokenizer", "tokenizer files beside the weights", "save the tokenizer there")
    num_parameters, weight_fault = _count_parameters(folder)
    if weight_fault:
        blame(*weight_fault)
    facts = None if settings is None else ModelFacts(folder, settings, num_parameters)
    return facts, problems


def _role_fault(settings: Mapping[str, Any], role: Role) -> tuple[str, str, str] | None:
    listed, labels = settings.get("architectures"), settings.get("id2label")
    names = [str(name) for name in listed] if isinstance(listed, list) else []
    wanted = _ARCHITECTURES[role]
    if names and wanted and not any(name.endswith(wanted) for name in names):
        kinds = {"ForCausalLM": "a causal language model", "ForSequenceClassification": "a sequence classifier"}
        return f"with a {names[0]}", " or ".join(kinds[kind] for kind in wanted), "choose another model"
    num_labels = len(labels) if isinstance(labels, Mapping) else settings.get("num_labels", 2)
    if role in ("reward", "classifier") and num_labels != 1:
        return f"with {num_labels} labels", "one label (one score a response)", "choose a model with num_labels 1"
    return None


def _count_parameters(folder: Path) -> tuple[int, tuple[str, str, str] | None]:
    """Parameters of the safetensors files, and what is wrong with them."""
    index = folder / "model.safetensors.index.json"
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if index.is_file():
        listed = _read_json(index)
        if listed is None or not isinstance(listed.get("weight_map"), Mapping):
            return 0, ("with a broken model.safetensors.index.json", "an index of the weights", "copy the folder again")
        names = sorted({str(name) for name in listed["weight_map"].values()})
    if not names:
        if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
            do = "convert them (load, then save_pretrained)"
            return 0, ("with pickle weights only", "safetensors weights (pickles can run code)", do)
        return 0, ("without weights", "*.safetensors beside config.json", "save the model there again")
    total = 0
    for name in names:
        count = _count_in_file(folder / name)
        if count is None:
            return 0, (f"with {name} missing or incomplete", "whole safetensors files", "copy the folder again")
        total += count
    return total, None


def _count_in_file(path: Path) -> int | None:
    """Numbers in a safetensors file, from its header; None where the file is shorter than the header says."""
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > num_bytes - 8:
                return None
            header = json.loads(file.read(header_bytes))
        tensors = [entry for key, entry in header.items() if key != "__metadata__"]
        end = max((entry["data_offsets"][1] for entry in tensors), default=0)
        return sum(math.prod(entry["shape"]) for entry in tensors) if num_bytes == 8 + header_bytes + end else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _read_json(path: Path) -> Mapping[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, Mapping) else None


def backbone_difference(one: ModelFacts, other: ModelFacts) -> str | None:
    """The first size in which two backbones differ, ``hidden_size 576 and 64``; None where weights can be shared."""
    for key in _BACKBONE_KEYS:
        first, second = one.settings.get(key), other.settings.get(key)
        if first is not None and second is not None and first != second:
            return f"{key} {first} and {second}"
    return None


def vocabulary_difference(one: ModelFacts, other: ModelFacts) -> str | None:
    """How two models' token ids differ, from tokenizer.json where both have it; else None (not known)."""
    texts = []
    for facts in (one, other):
        content = _read_json(facts.folder / "tokenizer.json")
        if content is None:
            return None
        texts.append(_tokens(content))
    first, second = texts
    if first == second:
        return None
    if len(first) != len(second):
        return f"{len(first)} and {len(second)} tokens"
    differing = sum(first.get(token_id) != second.get(token_id) for token_id in first)
    return f"{differing} of {len(first)} token ids mean different tokens"


def _tokens(content: Mapping[str, Any]) -> dict[object, object]:
    """id -> token of a tokenizer.json, added tokens included."""
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    tokens: dict[object, object] = {}
    if isinstance(vocabulary, Mapping):
        tokens = {token_id: token for token, token_id in vocabulary.items()}
    elif isinstance(vocabulary, list):
        tokens = {token_id: entry[0] for token_id, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    for entry in added if isinstance(added, list) else []:
        tokens[entry.get("id")] = entry.get("content")
    return tokens
