"""Model folders as the checks see them, written without torch: config.json, tokenizer.json, one safetensors file."""

import json
from collections.abc import Sequence
from pathlib import Path

NUM_PARAMETERS = 16


def write_model(
    folder: Path, architecture: str = "LlamaForCausalLM", tokens: Sequence[str] = ("a", "b"), **settings: object
) -> Path:
    folder.mkdir()
    known = {"vocab_size": len(tokens), "hidden_size": 64, "max_position_embeddings": 1024}
    content = {"architectures": [architecture], **known, **settings}
    (folder / "config.json").write_text(json.dumps(content))
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    write_weights(folder / "model.safetensors")
    return folder


def write_reward_model(folder: Path, **settings: object) -> Path:
    return write_model(folder, "LlamaForSequenceClassification", **{"num_labels": 1, **settings})


def write_weights(path: Path, missing_bytes: int = 0) -> None:
    num_bytes = 4 * NUM_PARAMETERS
    entry = {"dtype": "F32", "shape": [4, NUM_PARAMETERS // 4], "data_offsets": [0, num_bytes]}
    header = json.dumps({"weight": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(num_bytes - missing_bytes))
