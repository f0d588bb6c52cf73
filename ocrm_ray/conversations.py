"""Chat messages, transcripts and the token ids they become: the one place where prompts turn into tokens.

A prompt is either a string, taken as it stands, or a list of messages. With a chat template both go through it
(a string as one user message, a transcript as its turns); without one, messages are written as a transcript.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from ocrm_ray.errors import mistake
from ocrm_ray.records import Sequence as TokenSequence

Message: TypeAlias = dict[str, str]
PromptContent: TypeAlias = str | list[Message]
TemplateMode: TypeAlias = Literal["auto", "always", "never"]

TURN_TO_ANSWER = "\n\nAssistant:"
"""How a transcript prompt ends."""

_HEADINGS = {"user": "Human", "assistant": "Assistant", "system": "System"}
_ROLES = {role: role for role in _HEADINGS} | {"human": "user", "prompter": "user", "gpt": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant|System):")


def first_value(row: Mapping[str, Any], *names: str) -> Any:
    """The first of these columns that holds something; None of none."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def parse_message(value: object) -> Message:
    """``{role, content}`` of ``{role, content}`` or ``{from, value}``. Raises ValueError."""
    if not isinstance(value, Mapping):
        raise ValueError(f"a message is {type(value).__name__}, not an object")
    role, content = first_value(value, "role", "from"), first_value(value, "content", "value")
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"a message has the role {role!r}")
    if not isinstance(content, str):
        raise ValueError(f"a message's content is {type(content).__name__}, not a string")
    return {"role": _ROLES[role], "content": content}


def parse_messages(value: object) -> list[Message]:
    """A list of messages with normalised roles. Raises ValueError."""
    if not isinstance(value, list):
        raise ValueError(f"messages are {type(value).__name__}, not a list")
    if not value:
        raise ValueError("the list of messages is empty")
    return [parse_message(message) for message in value]


def parse_transcript(text: str) -> list[Message] | None:
    """The turns of a transcript that ends with an open assistant turn; None if ``text`` is not one."""
    pieces = _TURN.split("\n\n" + text.lstrip("\n"))
    if pieces[0] != "" or len(pieces) < 5 or pieces[-2] != "Assistant" or pieces[-1].strip():
        return None
    roles = {heading: role for role, heading in _HEADINGS.items()}
    turns = zip(pieces[1:-2:2], pieces[2:-2:2], strict=True)
    return [{"role": roles[heading], "content": content.strip()} for heading, content in turns]


def render_transcript(messages: Sequence[Message]) -> str:
    """Messages as a transcript that ends with an open assistant turn."""
    turns = [f"\n\n{_HEADINGS[message['role']]}: {message['content']}" for message in messages]
    return "".join(turns) + TURN_TO_ANSWER


def prompt_text(prompt: PromptContent) -> str:
    """What people and gold scorers read: the string, a lone user message's content, else the transcript."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return render_transcript(prompt)


def uses_template(tokenizer: Any, mode: TemplateMode) -> bool:
    """Whether prompts go through the tokenizer's chat template. Raises UserError: ``always`` without a template."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if mode == "always" and not has_template:
        got = "'always' and a tokenizer without a chat template"
        raise mistake("data.chat_template", got, "a tokenizer with one", "use an instruct model or 'never'")
    return has_template and mode != "never"


def encode_prompt(tokenizer: Any, prompt: PromptContent, mode: TemplateMode) -> tuple[int, ...]:
    """Token ids of a prompt, special tokens and the opening of the answer included; none of a blank prompt."""
    if not prompt_text(prompt).strip():
        return ()
    if uses_template(tokenizer, mode):
        messages = prompt if isinstance(prompt, list) else parse_transcript(prompt)
        messages = messages or [{"role": "user", "content": str(prompt)}]
        return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    text = prompt if isinstance(prompt, str) else render_transcript(prompt)
    return tuple(tokenizer(text)["input_ids"])


def answer_text(tokenizer: Any, prompt: PromptContent, answer: str, mode: TemplateMode) -> str:
    """An answer as it continues its prompt: after a transcript's ``Assistant:`` a space comes first."""
    opens_turn = isinstance(prompt, list) or prompt.endswith(TURN_TO_ANSWER)
    if uses_template(tokenizer, mode):
        return answer.strip() if opens_turn else answer
    return " " + answer.lstrip() if opens_turn else answer


def encode_response(
    tokenizer: Any, prompt_ids: tuple[int, ...], response: str, max_response_tokens: int
) -> TokenSequence:
    """Tokens of a response after its prompt's, ending with EOS unless that falls beyond ``max_response_tokens``.

    The response is tokenised by itself, as a sampled one is: no token spans the boundary. An EOS inside the text
    ends it there.
    """
    eos_id = tokenizer.eos_token_id
    response_ids = [*tokenizer(response, add_special_tokens=False)["input_ids"], eos_id]
    response_ids = response_ids[: response_ids.index(eos_id) + 1][:max_response_tokens]
    return TokenSequence(prompt_ids, tuple(response_ids), response_ids[-1] == eos_id)
