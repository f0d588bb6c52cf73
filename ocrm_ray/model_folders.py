"""What a Hugging Face model folder says of itself, read without torch: sizes, context, vocabulary, and what is wrong.

Only local folders are read. A name of the form ``org/name`` is taken for the Hub's and not looked up.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ocrm_ray.config_problems import shown
from ocrm_ray.errors import Problem

Role: TypeAlias = Literal["policy", "reward", "backbone", "classifier", "encoder"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CAUSAL, _CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
_ARCHITECTURES: Mapping[Role, tuple[str, ...]] = {
    "policy": (_CAUSAL,),
    "reward": (_CLASSIFIER,),
    "backbone": (_CAUSAL, _CLASSIFIER),
    "classifier": (_CLASSIFIER,),
    "encoder": ("",),
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
        return next((int(self.settings[key]) for key in _CONTEXT_KEYS if self.settings.get(key)), None)

    @property
    def vocab_size(self) -> int:
        return int(self.settings.get("vocab_size") or 0)


def is_hub_name(name: str) -> bool:
    """Whether a name can only mean the Hub: ``org/name``, and ``org`` is no folder here."""
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name).parent.is_dir()


def read_model(where: str, name: str, role: Role) -> tuple[ModelFacts | None, list[Problem]]:
    """Facts of the folder ``name`` (None: a Hub name, or unreadable) and its problems, told of the key ``where``."""
    if is_hub_name(name):
        return None, []
    try:
        return _read_folder(where, name, role)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):  # of JSON of any other form
        got, need = f"{shown(name)} with a broken config.json, tokenizer.json or index", "whole files of transformers"
        return None, [Problem(where, got, need, "download or save it again")]


def _read_folder(where: str, name: str, role: Role) -> tuple[ModelFacts | None, list[Problem]]:
    folder = Path(name)
    settings = _read_json(folder / "config.json")
    if not settings:
        got, need = f"{shown(name)}, no folder with a config.json", "a model folder or a Hub name org/name"
        return None, [Problem(where, got, need, "correct the path")]
    num_parameters, broken = _count_parameters(folder)
    facts = ModelFacts(folder, settings, num_parameters)
    _ = facts.context, facts.vocab_size, _token_ids(_read_json(folder / "tokenizer.json"))
    names = [str(each) for each in settings.get("architectures") or [""]]
    num_labels = len(settings["id2label"]) if "id2label" in settings else settings.get("num_labels", 2)
    is_kind = not names[0] or any(each.endswith(_ARCHITECTURES[role]) for each in names)
    is_scored = role in ("reward", "classifier") and names[0].endswith(_CLASSIFIER)
    needs_tokenizer = role not in ("reward", "backbone")
    has_tokenizer = any((folder / file).is_file() for file in _TOKENIZER_FILES)
    faults = [
        (not is_kind, f"a {names[0]}", " or ".join(_ARCHITECTURES[role]), "choose another model"),
        (is_scored and num_labels != 1, f"{num_labels} labels", "one label (a score)", "choose one with num_labels 1"),
        (needs_tokenizer and not has_tokenizer, "no tokenizer", "its files beside the weights", "save it there"),
        (bool(broken), broken, "whole safetensors files (pickles can run code)", "save it again (save_pretrained)"),
    ]
    problems = [Problem(where, f"{shown(name)} with {got}", need, do) for is_wrong, got, need, do in faults if is_wrong]
    return facts, problems


def read_shape(where: str, folder: Path, role: Role) -> tuple[ModelFacts | None, list[Problem]]:
    """As ``read_model`` of a folder that may hold a ``config.json`` alone: parameters are counted without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForCausalLM if role == "policy" else AutoModelForSequenceClassification
    try:
        settings = _read_json(folder / "config.json")
        with torch.device("meta"):
            network = kind.from_config(AutoConfig.from_pretrained(folder, num_labels=1, local_files_only=True))
        num_parameters = sum(parameter.numel() for parameter in network.parameters())
        return ModelFacts(folder, settings, num_parameters), []
    except (OSError, AttributeError, LookupError, TypeError, ValueError) as error:
        got = f"{shown(str(folder))} ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
        return None, [Problem(where, got, "a folder with the config.json of such a model", "correct it")]


def _count_parameters(folder: Path) -> tuple[int, str]:
    """Parameters of the safetensors files (their headers are read), and what is wrong with them in words."""
    from safetensors import SafetensorError, safe_open

    index = _read_json(folder / "model.safetensors.index.json")
    listed = set(index.get("weight_map", {}).values()) or {path.name for path in folder.glob("*.safetensors")}
    total = 0
    for name in sorted(listed):
        try:
            with safe_open(folder / name, framework="numpy") as file:
                total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError):
            return 0, f"{name} missing or incomplete"
    return total, "" if listed else "no safetensors weights"


def _read_json(path: Path) -> Mapping[str, Any]:
    """Empty where there is no readable file. ValueError: it holds no mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return {}
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no mapping")
    return content


def backbone_difference(one: ModelFacts, other: ModelFacts) -> str | None:
    """The first size in which two backbones differ, ``hidden_size 576 and 64``; None where weights can be shared."""
    sizes = ((key, one.settings.get(key), other.settings.get(key)) for key in _BACKBONE_KEYS)
    return next((f"{key} {a} and {b}" for key, a, b in sizes if None not in (a, b) and a != b), None)


def shares_vocabulary(policy: ModelFacts, other: ModelFacts) -> bool:
    """Whether the policy's token ids mean the same to the other; by size alone where one has no tokenizer.json."""
    first, second = (_read_json(facts.folder / "tokenizer.json") for facts in (policy, other))
    if first and second:
        return _token_ids(first) == _token_ids(second)
    return not other.vocab_size or other.vocab_size >= policy.vocab_size


def _token_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """token -> id of a tokenizer.json, added tokens included; a Unigram model lists its tokens in order."""
    vocab = tokenizer.get("model", {}).get("vocab", {})
    known = vocab if isinstance(vocab, Mapping) else {entry[0]: index for index, entry in enumerate(vocab)}
    return {**known, **{entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", [])}}
