"""Checks the conversations of records and brings them into one form, whatever spelling they came in.

Messages are a list of ``{"role": ..., "content": ...}``. OpenAI's format, tables and data sets spell the same thing in
several ways: contents in parts, objects as JSON text, empty lists for nothing. In every function, `where` is the place
of the record, for error messages.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from megatron_brain.data.json_values import from_json, is_blank, require_json, without_nulls
from megatron_brain.data.tools import check_call
from megatron_brain.errors import RecordError, short

Messages = list[dict[str, Any]]

DIALOGUE_CUE = "\n\nAssistant:"
"""The text before each answer in plain-text dialogues such as Anthropic/hh-rlhf."""

NEXT_TURN = "\n\nHuman:"
"""The text before each turn of the user in such dialogues."""

THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thinking_content", "thought", "thoughts")
"""Fields of a message that hold thoughts before the answer. A record whose thoughts no template writes is refused."""

_TEXT_PARTS = (None, "text", "input_text", "output_text")
"""Types of the parts of a content that hold only text."""

_THOUGHT_PARTS = ("thinking", "reasoning", "reasoning_text")

_MASKS = ("train", "trainable", "training", "train_detail", "loss", "loss_mask", "mask", "masked", "weights")
"""Fields that say in other formats which messages are learned."""

_TOOLS = ("tools", "functions")
"""Fields that belong in the record. Some records have them in the system message."""

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Fields of a record or a message that hold something other than text."""

_OWN_VARIABLES = (
    *("messages", "tools", "add_generation_prompt", "chat_template", "conversations"),
    *("continue_final_message", "return_assistant_tokens_mask"),
)
"""Variables of a template, and settings of the function that renders it, that a record must not set."""


_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "human", "gpt")
_ROLE_IN_TEXT = re.compile(rf"""["'](?:role|from)["']\s*:\s*["'](?:{"|".join(_ROLES)})["']""")
"""Every text that writes out messages contains a match of this."""

_LIST_OF_OBJECTS = re.compile(r"\[\s*\{")


def is_messages(value: Any) -> bool:
    """Whether a field holds a chat (a list) and not a text."""
    return isinstance(value, list)


def check_messages(messages: Any, key: str, where: str) -> Messages:
    """The messages in one form: each content is one text, objects are objects, and nothing is null or empty.

    Contents may be lists of parts, which are joined: a template that expects a text would write the list as Python
    prints it. The list of messages, `tool_calls` and the arguments of calls may be JSON text. `weight` is 0 or 1.

    Raises:
        RecordError: the value is not a list of one or more objects with a text role and a text, or a field says in an
            unsupported way which messages are learned. Names `where` and `key`.
    """
    messages = from_json(messages, list, repr(key), where)
    if not is_messages(messages) or not messages:
        raise RecordError(
            where, "bad messages", f"{key!r} must be a list of one or more messages {{'role', 'content'}}"
        )
    return [_check_message(message, f"{key}[{index}]", where) for index, message in enumerate(messages)]


def check_template_kwargs(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Variables that a record gives to the chat template (TRL's ``chat_template_kwargs``); {} where there are none.

    Raises:
        RecordError: the field is not an object, holds a value that is not JSON, or sets what other fields set.
    """
    name = "chat_template_kwargs"
    kwargs = from_json(record.get(name), dict, f"field {name!r}", where, blank=dict)
    if kwargs is None:
        return {}
    if not isinstance(kwargs, dict):
        raise RecordError(where, "wrong type", f"field {name!r} must be an object, not {short(kwargs)}")
    if taken := [key for key in _OWN_VARIABLES if key in kwargs]:
        raise RecordError(
            where, "unsupported field", f"field {name!r} sets {taken[0]!r}, which is no setting; remove it"
        )
    return require_json(kwargs, name, where)


def answer_text(messages: Messages) -> str:
    """Text of the last message."""
    text: str = messages[-1].get("content", "")
    return text


def is_said(message: Mapping[str, Any]) -> bool:
    """Whether an assistant's message holds a text or a call of a tool."""
    return bool(message.get("tool_calls") or message.get("content", "").strip())


def weight_of(message: Mapping[str, Any]) -> bool:
    """Whether an assistant's message is to be learned: its `weight` is 1, or not given."""
    return bool(message.get("weight", 1))


def thoughts_of(message: Mapping[str, Any]) -> list[str]:
    """The thoughts before the answer that stand in separate fields."""
    return [message[key] for key in THOUGHTS if isinstance(message.get(key), str) and message[key].strip()]


def split_shared_messages(chosen: Messages, rejected: Messages, where: str) -> tuple[Messages, Messages, Messages]:
    """Prompt, chosen and rejected completion of two conversations that share their beginning.

    Raises:
        RecordError: they do not differ in exactly their last message.
    """
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise RecordError(
            where,
            "no shared prompt",
            "without a 'prompt', 'chosen' and 'rejected' must be conversations that share every message "
            "but the last; give the shared messages as 'prompt'",
        )
    return chosen[:-1], chosen[-1:], rejected[-1:]


class UnusableDialogueError(RecordError):
    """A row of plain-text dialogues that holds no two answers to one prompt. Readers leave it out and count it, because
    published data sets have such rows."""


def split_shared_dialogue(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """Prompt, chosen and rejected answer of two plain-text dialogues (the format of Anthropic/hh-rlhf).

    The prompt ends with the last ``"\\n\\nAssistant:"`` that both share.

    Raises:
        UnusableDialogueError: they are dialogues, and they part before their last turn or one ends without an answer.
        RecordError: they are no dialogues.
    """
    shared = os.path.commonprefix([chosen, rejected])
    end = shared.rfind(DIALOGUE_CUE) + len(DIALOGUE_CUE)
    are_dialogues = all(DIALOGUE_CUE in text or NEXT_TURN in text for text in (chosen, rejected))
    if end < len(DIALOGUE_CUE) and not are_dialogues:
        raise RecordError(
            where,
            "no shared prompt",
            f"no 'prompt', and 'chosen' and 'rejected' do not share a beginning that ends with "
            f"{DIALOGUE_CUE!r}; give the prompt as its own field",
        )
    answers = chosen[end:], rejected[end:]
    if end < len(DIALOGUE_CUE) or any(cue in text for cue in (DIALOGUE_CUE, NEXT_TURN) for text in answers):
        raise UnusableDialogueError(where, "dialogue left out", "the two dialogues do not part in their last answer")
    if not all(map(str.strip, answers)):
        raise UnusableDialogueError(where, "dialogue left out", "a dialogue ends without an answer")
    return chosen[:end], *answers


def refuse_text_of_messages(value: Any, key: str, where: str) -> None:
    """Raise RecordError where a text is a list of messages in JSON or Python: the model would learn the quotes too."""
    if isinstance(value, str) and _writes_messages(value.strip()):
        raise RecordError(
            where, "JSON as text", f"field {key!r} is the text of messages: give the list itself, not its text"
        )


def _writes_messages(text: str) -> bool:
    if not text.startswith(("[", "{", '"')) or not text.endswith(("]", "}", '"')):
        return False
    if not _ROLE_IN_TEXT.search(text.replace("\\", "")):
        return False
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return bool(_LIST_OF_OBJECTS.match(text))  # NumPy writes no commas between the objects.
    return _writes_messages(found.strip()) if isinstance(found, str) else _holds_messages(found)


def _holds_messages(value: Any) -> bool:
    """Whether a value is a message, a list of them, or an object with such a list."""
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(member, dict) and _has_role(member) for member in value)
    if not isinstance(value, dict):
        return False
    return _has_role(value) or any(
        isinstance(value.get(name), list) and _holds_messages(value[name]) for name in ("messages", "conversations")
    )


def _has_role(message: Mapping[str, Any]) -> bool:
    return message.get("role") in _ROLES or (message.get("from") in _ROLES and "value" in message)


def _check_message(message: Any, place: str, where: str) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or not role.strip():
        raise RecordError(where, "bad messages", f"{place} must be an object with a text 'role', not {short(message)}")
    place = f"{place} ({role})"
    _check_fields(message, place, where)
    plain: dict[str, Any] = without_nulls(message)
    calls = from_json(plain.pop("tool_calls", None), list, f"{place}: 'tool_calls'", where, blank=list)
    if calls:
        if not isinstance(calls, list):
            raise RecordError(
                where, "bad messages", f"{place}: 'tool_calls' must be a list of objects, not {short(calls)}"
            )
        plain["tool_calls"] = [
            check_call(call, f"{place}: tool_calls[{index}]", where) for index, call in enumerate(calls)
        ]
    content = plain.get("content")
    if content == "" and calls:  # Some templates write calls only where there is no content.
        content = plain.pop("content")
    if content is None and not calls:
        raise RecordError(where, "bad messages", f"{place} has no 'content'")
    if isinstance(content, list):
        plain["content"] = "".join(_text_of(part, f"{place}: content[{i}]", where) for i, part in enumerate(content))
    elif not isinstance(content, str | None):
        raise RecordError(
            where,
            "bad messages",
            f"{place}: 'content' must be a text, or a list of {{'type': 'text', 'text': ...}}, not {short(content)}",
        )
    return plain


def _text_of(part: Any, place: str, where: str) -> str:
    """The text of one part of a content."""
    if not isinstance(part, dict):
        raise RecordError(where, "bad messages", f"{place} must be {{'type': 'text', 'text': ...}}, not {short(part)}")
    kind = part.get("type")
    if kind not in _TEXT_PARTS:
        cure = "give it as 'reasoning_content' of the message" if kind in _THOUGHT_PARTS else "only texts are read"
        raise RecordError(where, "unsupported field", f"{place} is of type {kind!r}, which is not supported: {cure}")
    text = part.get("text")
    if not isinstance(text, str):
        raise RecordError(where, "bad messages", f"{place} must be {{'type': 'text', 'text': ...}}, not {short(part)}")
    return text


def _check_fields(message: Mapping[str, Any], place: str, where: str) -> None:
    """Refuse fields that say in another way what is learned, and fields whose type no template expects."""
    cure = "give 'weight': 0 or 1 on assistant messages"
    if masks := [name for name in _MASKS if message.get(name) is not None]:
        raise RecordError(where, "unsupported field", f"{place} has {masks[0]!r}, which is not supported: {cure}")
    elsewhere = {
        "function_call": "give it in 'tool_calls'",
        **dict.fromkeys(_TOOLS, "give it as the record's 'tools'"),
        **dict.fromkeys(MEDIA, "only texts are read; remove it"),
    }
    for name, advice in elsewhere.items():
        if not is_blank(message.get(name)):
            raise RecordError(where, "unsupported field", f"{place} has {name!r}, which is not supported: {advice}")
    if message.get("reasoning_details") and not thoughts_of(message):
        raise RecordError(
            where,
            "unsupported field",
            f"{place} has 'reasoning_details', which is not supported: give the text as 'reasoning_content'",
        )
    weight = message.get("weight")
    if weight is not None and weight not in (0, 1):
        raise RecordError(
            where, "unsupported field", f"{place} has weight {short(weight)}; only 0 and 1 are supported: {cure}"
        )
    if weight and message["role"] != "assistant":
        raise RecordError(
            where, "unsupported field", f"{place} has weight 1, and only what the assistant says is learned: {cure}"
        )
    for name in (*THOUGHTS, "name", "refusal"):
        if not isinstance(message.get(name), str | None):
            raise RecordError(where, "bad messages", f"{place}: {name!r} must be a text, not {short(message[name])}")
