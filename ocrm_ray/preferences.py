"""Preference pairs: ready ones from a data set, their tokens, their split, and the files of the pair stage."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from ocrm_ray.config import Data
from ocrm_ray.conversations import (
    TURN_TO_ANSWER,
    Message,
    PromptContent,
    answer_text,
    encode_prompt,
    encode_response,
    first_value,
    parse_message,
    parse_messages,
    prompt_text,
)
from ocrm_ray.data_files import Row, RowForm, read_jsonl, write_jsonl
from ocrm_ray.errors import mistake
from ocrm_ray.records import Sequence as TokenSequence

PairTexts: TypeAlias = tuple[PromptContent, str, str]
_Dropped: TypeAlias = Literal["too long", "empty", "identical"]

_SIDES = ("chosen", "rejected")


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


def load_pairs(
    data: Data, rows: Sequence[Row], tokenizer: Any, max_response_tokens: int, bad: list[str] | None = None
) -> tuple[list[Pair], dict[str, int]]:
    """Pairs of ``rows`` (from ``read_rows``), and what became of the rows.

    Responses end with EOS or are cut at ``max_response_tokens`` (``num_truncated`` counts responses). Rows with a
    prompt over ``data.max_prompt_tokens``, an empty prompt or response, or responses that are the same after cutting
    are dropped and counted; with ``bad`` so are faulty rows.
    Raises UserError: columns missing, rows of a wrong form, no pair left.
    """
    encoded = [_encode(data, texts, tokenizer, max_response_tokens) for texts in PAIR_ROWS.parsed(rows, bad)]
    pairs = [pair for pair in encoded if isinstance(pair, Pair)]
    dropped = Counter(reason for reason in encoded if isinstance(reason, str))
    if not pairs:
        told = ", ".join(f"{dropped[reason]} {reason}" for reason in get_args(_Dropped))
        do = "raise data.max_prompt_tokens, or use other pairs"
        raise mistake("pairs.ready.path", f"no usable pair in {len(rows)} rows ({told})", "at least one pair", do)
    return pairs, {
        "num_rows": len(rows),
        "num_bad": len(bad or ()),
        "num_kept": len(pairs),
        **{f"num_{reason.replace(' ', '_')}": dropped[reason] for reason in get_args(_Dropped)},
        "num_truncated": sum(not response.has_eos for pair in pairs for response in (pair.chosen, pair.rejected)),
    }


def _encode(data: Data, texts: PairTexts, tokenizer: Any, max_response_tokens: int) -> Pair | _Dropped:
    """The pair of one row, or why it is dropped."""
    content, *responses = texts
    prompt_ids = encode_prompt(tokenizer, content, data.chat_template)
    if not prompt_ids or not all(text.strip() for text in responses):
        return "empty"
    if len(prompt_ids) > data.max_prompt_tokens:
        return "too long"
    chosen, rejected = (answer_text(tokenizer, content, text, data.chat_template) for text in responses)
    first, second = (encode_response(tokenizer, prompt_ids, text, max_response_tokens) for text in (chosen, rejected))
    pair = Pair(prompt_text(content), first, second, chosen_text=chosen, rejected_text=rejected)
    return "identical" if first == second else pair


def split_pairs(pairs: Sequence[Pair], heldout_share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs in their original order; a prompt is on one side only.

    Prompts are drawn with ``seed`` until they hold ``heldout_share`` of the pairs (at least one). With a single
    prompt the pairs themselves are drawn. Raises UserError: fewer than two pairs.
    """
    if len(pairs) < 2:
        got, need = f"{len(pairs)} pair", "at least 2 pairs, to hold some out"
        raise mistake("pairs.heldout_share", got, need, "add pairs")
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


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs as JSONL, a pair a line, with texts to read and token ids to use."""
    write_jsonl(path, map(_pair_row, pairs))


def read_pairs(path: Path) -> list[Pair]:
    """Read a file of ``write_pairs``. Raises RunError if it is missing or broken."""
    return read_jsonl(path, _pair)


def _pair(row: Mapping[str, Any]) -> Pair:
    sides = [row[side] for side in _SIDES]
    sequences = [TokenSequence(tuple(row["prompt_ids"]), tuple(side["ids"]), side["has_eos"]) for side in sides]
    fields: list[Any] = [*sequences, *(side["gold"] for side in sides), *(side["text"] for side in sides)]
    return Pair(row["prompt"], *fields)


def _pair_row(pair: Pair) -> dict[str, object]:
    row: dict[str, object] = {"prompt": pair.prompt_text, "prompt_ids": pair.chosen.prompt_ids}
    for side in _SIDES:
        sequence, text, gold = (getattr(pair, name) for name in (side, f"{side}_text", f"gold_{side}"))
        row[side] = {"text": text, "gold": gold, "has_eos": sequence.has_eos, "ids": sequence.response_ids}
    return row


def _texts(row: Row) -> PairTexts:
    """Prompt, chosen and rejected text of one row, whatever its form. Raises ValueError."""
    history = first_value(row, "prompt", "conversations", "messages")
    if history is not None and not isinstance(history, str | list):
        raise ValueError(f"the prompt is {type(history).__name__}, not a string or messages")
    content = parse_messages(history) if isinstance(history, list) else history
    chosen, rejected = row.get("chosen"), row.get("rejected")
    match chosen, rejected:
        case str(), str() if content is not None:
            return content, chosen, rejected
        case str(), str():
            cut = commonprefix([chosen, rejected]).rfind(TURN_TO_ANSWER) + len(TURN_TO_ANSWER)  # noqa: RUF071
            if cut < len(TURN_TO_ANSWER):
                raise ValueError("there is no prompt, and chosen and rejected share no beginning up to 'Assistant:'")
            return chosen[:cut], chosen[cut:], rejected[cut:]
        case Mapping(), Mapping() if content is not None:
            return content, parse_message(chosen)["content"], parse_message(rejected)["content"]
        case list(), list():
            return _split_conversations(content, parse_messages(chosen), parse_messages(rejected))
    kinds = ["missing" if side is None else type(side).__name__ for side in (chosen, rejected)]
    no_prompt = ", and there is no prompt" if content is None else ""
    raise ValueError(f"chosen is {kinds[0]} and rejected is {kinds[1]}{no_prompt}")


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


PAIR_ROWS = RowForm(
    setting="pairs.ready",
    columns=({*_SIDES},),
    need_columns="columns chosen and rejected, with prompt, messages or a shared beginning",
    need_rows="rows with a prompt, a chosen and a rejected response",
    parse=_texts,
)
