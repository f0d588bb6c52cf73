"""Preference pairs: ready ones from a data set, their tokens, their split, and the files of the pair stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from ocrm_ray.config import Data, DataFile
from ocrm_ray.conversations import (
    TURN_TO_ANSWER,
    Message,
    PromptContent,
    answer_text,
    encode_prompt,
    encode_response,
    parse_message,
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
from ocrm_ray.records import Sequence as TokenSequence

PairTexts: TypeAlias = tuple[PromptContent, str, str]
_Dropped: TypeAlias = Literal["too long", "empty", "identical"]

_WHERE = "pairs.ready"
_NEED_COLUMNS = "columns chosen and rejected, with prompt, messages or a shared beginning"
_NEED_ROWS = "rows with a prompt, a chosen and a rejected response"
_HISTORY_COLUMNS = ("prompt", "conversations", "messages")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to one prompt, the preferred one first; gold scores where they are known."""

    prompt_text: str
    chosen: TokenSequence
    rejected: TokenSequence
    gold_chosen: float | None = None
    gold_rejected: float | None = None
    chosen_text: str = ""
    rejected_text: str = ""


@dataclass(frozen=True, slots=True)
class PairReport:
    """What became of the rows. ``num_truncated`` counts responses cut before their EOS; the rest count rows."""

    num_rows: int
    num_kept: int
    num_too_long: int
    num_empty: int
    num_identical: int
    num_truncated: int


def load_pairs(
    data: Data, rows: Sequence[Row], tokenizer: Any, max_response_tokens: int
) -> tuple[list[Pair], PairReport]:
    """Pairs of ``rows`` (from ``read_rows``); responses end with EOS or are cut at ``max_response_tokens``.

    Rows with a prompt over ``data.max_prompt_tokens``, an empty prompt, or responses that are the same after
    cutting are dropped and counted. Raises UserError: columns missing, rows of a wrong form, no EOS token, no
    pair left.
    """
    all_texts, problems = _pair_texts(rows, _WHERE)
    if problems:
        raise UserError(problems)
    pairs: list[Pair] = []
    dropped: dict[_Dropped, int] = {"too long": 0, "empty": 0, "identical": 0}
    for texts in all_texts:
        pair = _encode(data, texts, tokenizer, max_response_tokens)
        if isinstance(pair, Pair):
            pairs.append(pair)
        else:
            dropped[pair] += 1
    if not pairs:
        got = f"no usable pair in {len(rows)} rows ({', '.join(f'{n} {why}' for why, n in dropped.items())})"
        do = "raise data.max_prompt_tokens, or use other pairs"
        raise UserError([Problem(f"{_WHERE}.path", got, "at least one pair", do)])
    num_truncated = sum(not sequence.has_eos for pair in pairs for sequence in (pair.chosen, pair.rejected))
    return pairs, PairReport(
        len(rows), len(pairs), dropped["too long"], dropped["empty"], dropped["identical"], num_truncated
    )


def _encode(data: Data, texts: PairTexts, tokenizer: Any, max_response_tokens: int) -> Pair | _Dropped:
    """The pair of one row, or why it is dropped."""
    content, *responses = texts
    prompt_ids = encode_prompt(tokenizer, content, data.chat_template) if prompt_text(content).strip() else ()
    if not prompt_ids or len(prompt_ids) > data.max_prompt_tokens:
        return "too long" if prompt_ids else "empty"
    chosen, rejected = (answer_text(tokenizer, content, text, data.chat_template) for text in responses)
    pair = Pair(
        prompt_text(content),
        encode_response(tokenizer, prompt_ids, chosen, max_response_tokens),
        encode_response(tokenizer, prompt_ids, rejected, max_response_tokens),
        chosen_text=chosen,
        rejected_text=rejected,
    )
    return "identical" if pair.chosen == pair.rejected else pair


def split_pairs(pairs: Sequence[Pair], heldout_share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs in their original order; a prompt is on one side only.

    Prompts are drawn with ``seed`` until they hold ``heldout_share`` of the pairs (at least one). With a single
    prompt the pairs themselves are drawn. Raises UserError: fewer than two pairs.
    """
    if len(pairs) < 2:
        got = f"{len(pairs)} pair"
        raise UserError([Problem("pairs.heldout_share", got, "at least 2 pairs, to hold some out", "add pairs")])
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(pair.chosen.prompt_ids, []).append(index)
    units = list(groups.values()) if len(groups) > 1 else [[index] for index in range(len(pairs))]
    held: set[int] = set()
    for unit in np.random.default_rng(seed).permutation(len(units))[1:]:
        if held and len(held) >= round(heldout_share * len(pairs)):
            break
        held.update(units[unit])
    training = [pair for index, pair in enumerate(pairs) if index not in held]
    return training, [pairs[index] for index in sorted(held)]


def inspect_pairs(data_file: DataFile, path_in_config: str = _WHERE) -> list[Problem]:
    """The problems of a pair file as far as its first rows show them."""
    return first_rows_problems(data_file, path_in_config, lambda rows: _pair_texts(rows, path_in_config)[1])


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs as JSONL, a pair a line, with texts to read and token ids to use."""
    write_jsonl(
        path,
        (
            {
                "prompt": pair.prompt_text,
                "prompt_ids": list(pair.chosen.prompt_ids),
                "chosen": _response_row(pair.chosen, pair.chosen_text, pair.gold_chosen),
                "rejected": _response_row(pair.rejected, pair.rejected_text, pair.gold_rejected),
            }
            for pair in pairs
        ),
    )


def read_pairs(path: Path) -> list[Pair]:
    """Read a file of ``write_pairs``. Raises RunError if it is missing or broken."""
    return [
        Pair(
            row["prompt"],
            _sequence(row, "chosen"),
            _sequence(row, "rejected"),
            row["chosen"]["gold"],
            row["rejected"]["gold"],
            row["chosen"]["text"],
            row["rejected"]["text"],
        )
        for row in read_jsonl(path)
    ]


def _sequence(row: Mapping[str, Any], side: str) -> TokenSequence:
    return TokenSequence(tuple(row["prompt_ids"]), tuple(row[side]["ids"]), row[side]["has_eos"])


def _response_row(sequence: TokenSequence, text: str, gold: float | None) -> dict[str, object]:
    return {"text": text, "gold": gold, "has_eos": sequence.has_eos, "ids": list(sequence.response_ids)}


def _pair_texts(rows: Sequence[Row], path_in_config: str) -> tuple[list[PairTexts], list[Problem]]:
    if not {"chosen", "rejected"} <= {name for row in rows for name in row}:
        return [], [columns_problem(path_in_config, rows, _NEED_COLUMNS)]
    texts: list[PairTexts] = []
    faults: dict[int, str] = {}
    for index, row in enumerate(rows):
        try:
            texts.append(_texts(row))
        except ValueError as error:
            faults[index] = str(error)
    return texts, [rows_problem(path_in_config, faults, _NEED_ROWS)] if faults else []


def _texts(row: Row) -> PairTexts:
    """Prompt, chosen and rejected text of one row, whatever its form. Raises ValueError."""
    history = next((row[name] for name in _HISTORY_COLUMNS if row.get(name) is not None), None)
    if history is not None and not isinstance(history, str | list):
        raise ValueError(f"the prompt is {type(history).__name__}, not a string or messages")
    content = parse_messages(history) if isinstance(history, list) else history
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split_transcripts(chosen, rejected) if content is None else (content, chosen, rejected)
    if isinstance(chosen, Mapping) and isinstance(rejected, Mapping) and content is not None:
        return content, parse_message(chosen)["content"], parse_message(rejected)["content"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _split_conversations(content, parse_messages(chosen), parse_messages(rejected))
    kinds = f"chosen is {_kind(chosen)} and rejected is {_kind(rejected)}"
    raise ValueError(kinds if content is not None else f"{kinds}, and there is no prompt")


def _split_transcripts(chosen: str, rejected: str) -> PairTexts:
    differing = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    num_shared = next(differing, min(len(chosen), len(rejected)))
    cut = chosen[:num_shared].rfind(TURN_TO_ANSWER)
    if cut < 0:
        raise ValueError("there is no prompt, and chosen and rejected share no beginning up to 'Assistant:'")
    cut += len(TURN_TO_ANSWER)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _split_conversations(content: PromptContent | None, chosen: list[Message], rejected: list[Message]) -> PairTexts:
    """Both sides end with one assistant turn; what comes before it is shared and, if there, taken as the prompt."""
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise ValueError("chosen or rejected does not end with an assistant's message")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected differ before their last message")
    shared: PromptContent | None = chosen[:-1] or content
    if shared is None:
        raise ValueError("there is no prompt before the last message")
    if isinstance(shared, list) and shared[-1]["role"] == "assistant":
        raise ValueError("the prompt ends with an assistant's message")
    return shared, chosen[-1]["content"], rejected[-1]["content"]


def _kind(value: object) -> str:
    return "missing" if value is None else type(value).__name__
