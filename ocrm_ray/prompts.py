"""Prompts: from the rows of a data set to text and token ids, their split, and the files of the data stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ocrm_ray.config import Data, DataFile
from ocrm_ray.conversations import (
    Message,
    PromptContent,
    answer_text,
    encode_prompt,
    parse_messages,
    prompt_text,
)
from ocrm_ray.data_files import (
    Row,
    columns_problem,
    first_rows_problems,
    read_jsonl,
    rows_problem,
    write_jsonl,
)
from ocrm_ray.errors import Problem, UserError
from ocrm_ray.records import Prompt

_WHERE = "data.prompts"
_NEED_COLUMNS = "a column prompt, instruction or messages"
_NEED_ROWS = "rows with a prompt, an instruction or messages"
_MESSAGE_COLUMNS = ("messages", "conversations")
_REFERENCE_COLUMNS = ("output", "reference", "response")


@dataclass(frozen=True, slots=True)
class PromptReport:
    """What became of the rows: kept, dropped as too long or empty, kept without a reference response."""

    num_rows: int
    num_kept: int
    num_too_long: int
    num_empty: int
    num_without_reference: int


def load_prompts(data: Data, rows: Sequence[Row], tokenizer: Any) -> tuple[list[Prompt], PromptReport]:
    """Prompts of ``rows`` (from ``read_rows``); ``prompt_id`` is the row's index.

    Prompts over ``data.max_prompt_tokens`` and empty ones are dropped and counted. A reference is stored as it
    continues its prompt. Raises UserError: columns missing, rows of a wrong type, no prompt left.
    """
    contents, problems = _contents(rows, _WHERE)
    if problems:
        raise UserError(problems)
    prompts: list[Prompt] = []
    num_too_long = num_empty = 0
    for index, (content, reference) in enumerate(contents):
        text = prompt_text(content)
        token_ids = encode_prompt(tokenizer, content, data.chat_template) if text.strip() else ()
        if not token_ids:
            num_empty += 1
        elif len(token_ids) > data.max_prompt_tokens:
            num_too_long += 1
        else:
            answer = None if reference is None else answer_text(tokenizer, content, reference, data.chat_template)
            prompts.append(Prompt(index, text, token_ids, answer))
    if not prompts:
        got = f"no prompt of at most {data.max_prompt_tokens} tokens ({num_too_long} longer, {num_empty} empty)"
        raise UserError([Problem("data.max_prompt_tokens", got, "at least one", "raise it, or use other prompts")])
    num_without_reference = sum(prompt.reference is None for prompt in prompts)
    return prompts, PromptReport(len(rows), len(prompts), num_too_long, num_empty, num_without_reference)


def split_prompts(prompts: Sequence[Prompt], num_heldout: int, seed: int | None) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held-out) prompts, both in their original order; no token sequence is on both sides.

    ``num_heldout`` different prompts are drawn with ``seed`` (None: the last ones are taken). Repeats of a held-out
    prompt go to neither side. Raises UserError: too few different prompts.
    """
    first_index = {prompt.token_ids: index for index, prompt in reversed(list(enumerate(prompts)))}
    distinct = sorted(first_index.values())
    if num_heldout >= len(distinct):
        got = f"{num_heldout} with {len(distinct)} different prompts"
        raise UserError([Problem("data.num_heldout", got, "fewer than there are prompts", "lower it, or add prompts")])
    order = range(len(distinct)) if seed is None else np.random.default_rng(seed).permutation(len(distinct))
    held = {distinct[i] for i in list(order)[len(distinct) - num_heldout :]}
    held_tokens = {prompts[index].token_ids for index in held}
    training = [prompt for prompt in prompts if prompt.token_ids not in held_tokens]
    return training, [prompts[index] for index in sorted(held)]


def inspect_prompts(data_file: DataFile, path_in_config: str = _WHERE) -> list[Problem]:
    """The problems of a prompt file as far as its first rows show them."""
    return first_rows_problems(data_file, path_in_config, lambda rows: _contents(rows, path_in_config)[1])


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write prompts as JSONL: ``prompt_id, text, token_ids, reference``."""
    write_jsonl(
        path,
        (
            {"prompt_id": p.prompt_id, "text": p.text, "token_ids": list(p.token_ids), "reference": p.reference}
            for p in prompts
        ),
    )


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of ``write_prompts``. Raises RunError if it is missing or broken."""
    return [
        Prompt(row["prompt_id"], row["text"], tuple(row["token_ids"]), row["reference"]) for row in read_jsonl(path)
    ]


def _contents(rows: Sequence[Row], path_in_config: str) -> tuple[list[tuple[PromptContent, str | None]], list[Problem]]:
    columns = {name for row in rows for name in row}
    if not columns & {"prompt", "instruction", *_MESSAGE_COLUMNS}:
        return [], [columns_problem(path_in_config, rows, _NEED_COLUMNS)]
    contents: list[tuple[PromptContent, str | None]] = []
    faults: dict[int, str] = {}
    for index, row in enumerate(rows):
        try:
            contents.append(_content(row))
        except ValueError as error:
            faults[index] = str(error)
    return contents, [rows_problem(path_in_config, faults, _NEED_ROWS)] if faults else []


def _content(row: Row) -> tuple[PromptContent, str | None]:
    """Prompt and reference of one row. Raises ValueError."""
    for name in _MESSAGE_COLUMNS:
        if row.get(name) is not None:
            return _split_answer(parse_messages(row[name]), _reference(row))
    if isinstance(row.get("prompt"), list):
        return _split_answer(parse_messages(row["prompt"]), _reference(row))
    if row.get("prompt") is not None:
        return _text(row, "prompt"), _reference(row)
    instruction = _text(row, "instruction")
    added = _text(row, "input") if row.get("input") is not None else ""
    content = f"{instruction}\n\n{added}" if added.strip() else instruction
    return [{"role": "user", "content": content}], _reference(row)


def _split_answer(messages: list[Message], reference: str | None) -> tuple[PromptContent, str | None]:
    if messages[-1]["role"] != "assistant":
        return messages, reference
    if len(messages) == 1:
        raise ValueError("messages hold an answer and no prompt")
    return messages[:-1], messages[-1]["content"]


def _reference(row: Row) -> str | None:
    name = next((name for name in _REFERENCE_COLUMNS if row.get(name) is not None), None)
    return None if name is None else _text(row, name)


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {'missing' if value is None else type(value).__name__ + ', not a string'}")
    return value
