"""Prompts: from the rows of a data set to text and token ids, their split, and the files of the data stage."""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ocrm_ray.config import Data
from ocrm_ray.conversations import PromptContent, answer_text, encode_prompt, first_value, parse_messages, prompt_text
from ocrm_ray.data_files import Row, RowForm, read_jsonl, write_jsonl
from ocrm_ray.errors import mistake
from ocrm_ray.records import IntArray, Prompt

_MESSAGE_COLUMNS = ("messages", "conversations")
_REFERENCE_COLUMNS = ("output", "reference", "response")


def load_prompts(
    data: Data, rows: Sequence[Row], tokenizer: Any, bad: list[str] | None = None
) -> tuple[list[Prompt], dict[str, int]]:
    """Prompts of ``rows`` (from ``read_rows``), and what became of the rows; ``prompt_id`` is the row's index.

    Prompts over ``data.max_prompt_tokens`` and empty ones are dropped and counted; with ``bad`` so are faulty rows,
    which have no index. A reference is stored as it continues its prompt; a blank one is none.
    Raises UserError: columns missing, rows of a wrong type, no prompt left.
    """
    prompts: list[Prompt] = []
    dropped: Counter[str] = Counter()
    for index, (content, reference) in enumerate(PROMPT_ROWS.parsed(rows, bad)):
        token_ids = encode_prompt(tokenizer, content, data.chat_template)
        if not token_ids or len(token_ids) > data.max_prompt_tokens:
            dropped["longer" if token_ids else "empty"] += 1
        else:
            is_blank = reference is None or not reference.strip()
            answer = None if is_blank else answer_text(tokenizer, content, str(reference), data.chat_template)
            prompts.append(Prompt(index, prompt_text(content), token_ids, answer))
    if not prompts:
        told = f"{dropped['longer']} longer, {dropped['empty']} empty"
        got = f"no prompt of at most {data.max_prompt_tokens} tokens ({told})"
        raise mistake("data.max_prompt_tokens", got, "at least one", "raise it, or use other prompts")
    return prompts, {
        "num_rows": len(rows),
        "num_bad": len(bad or ()),
        "num_kept": len(prompts),
        "num_too_long": dropped["longer"],
        "num_empty": dropped["empty"],
        "num_without_reference": sum(prompt.reference is None for prompt in prompts),
    }


def split_prompts(prompts: Sequence[Prompt], num_heldout: int, seed: int | None) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held-out) prompts, both in their original order; no token sequence is on both sides.

    ``num_heldout`` different prompts are drawn with ``seed`` (None: the last ones are taken). Repeats of a held-out
    prompt go to neither side. Raises UserError: too few different prompts.
    """
    distinct: dict[tuple[int, ...], Prompt] = {}
    for prompt in prompts:
        distinct.setdefault(prompt.token_ids, prompt)
    if num_heldout >= len(distinct):
        got = f"{num_heldout} with {len(distinct)} different prompts"
        raise mistake("data.num_heldout", got, "fewer than there are prompts", "lower it, or add prompts")
    order = range(len(distinct)) if seed is None else np.random.default_rng(seed).permutation(len(distinct))
    tokens = list(distinct)
    held = {tokens[index] for index in order[len(distinct) - num_heldout :]}
    training = [prompt for prompt in prompts if prompt.token_ids not in held]
    return training, [prompt for prompt in distinct.values() if prompt.token_ids in held]


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write prompts as JSONL: ``prompt_id, text, token_ids, reference``."""
    write_jsonl(path, map(asdict, prompts))


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of ``write_prompts``. Raises RunError if it is missing or broken."""
    return read_jsonl(path, lambda row: Prompt(**{**row, "token_ids": tuple(row["token_ids"])}))


def _content(row: Row) -> tuple[PromptContent, str | None]:
    """Prompt and reference of one row. Raises ValueError."""
    answers = [name for name in _REFERENCE_COLUMNS if row.get(name) is not None]
    reference = _text(row, answers[0]) if answers else None
    prompt = first_value(row, *_MESSAGE_COLUMNS, "prompt")
    if isinstance(prompt, list) or first_value(row, *_MESSAGE_COLUMNS) is not None:
        messages = parse_messages(prompt)
        if messages[-1]["role"] != "assistant":
            return messages, reference
        if len(messages) == 1:
            raise ValueError("messages hold an answer and no prompt")
        return messages[:-1], messages[-1]["content"]
    if prompt is not None:
        return _text(row, "prompt"), reference
    instruction = _text(row, "instruction")
    added = _text(row, "input") if row.get("input") is not None else ""
    content = f"{instruction}\n\n{added}" if added.strip() else instruction
    return [{"role": "user", "content": content}], reference


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {'missing' if value is None else type(value).__name__ + ', not a string'}")
    return value


PROMPT_ROWS = RowForm(
    setting="data.prompts",
    columns=({"prompt"}, {"instruction"}, *({name} for name in _MESSAGE_COLUMNS)),
    need_columns="a column prompt, instruction or messages",
    need_rows="rows with a prompt, an instruction or messages",
    parse=_content,
)


class ShuffledEpochs:
    """Every prompt once an epoch, in a new order each, for ever; ``epochs[number]`` is the number-th of all."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._prompts, self._seed = prompts, seed
        self._order = functools.lru_cache(maxsize=2)(self._draw)

    def __getitem__(self, number: int) -> Prompt:
        epoch, place = divmod(number, len(self._prompts))
        index: int = self._order(epoch)[place]
        return self._prompts[index]

    def _draw(self, epoch: int) -> IntArray:
        return np.random.default_rng([self._seed, 5, epoch]).permutation(len(self._prompts))
