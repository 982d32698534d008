"""Finds what a chat template leaves out of a conversation.

A template may silently drop a thought, a call of a tool, an answer, a system message or a tool. It proves nothing to
find the words of a message somewhere in the text: the same words may stand elsewhere. So the conversation is rendered
once more with every word replaced by a unique one, and each of these must be in the result. What a template writes
depends on the shape of a conversation (roles, fields, the template's own tags in the texts) and hardly on its words.
So only the first conversation of each shape is rendered once more. In later ones, only the learned turns are searched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from megatron_brain.data.chat import Chat, Span
from megatron_brain.data.conversations import THOUGHTS, Messages, thoughts_of
from megatron_brain.data.tokenizer import Tokenizer
from megatron_brain.data.tools import called_functions, change_function
from megatron_brain.errors import RecordError, short

_CURE = "use a template that keeps it (--chat-template FILE), or remove it from the record"
_SPOKEN = ("content", *THOUGHTS, "refusal")
"""Fields of a message that hold what was said."""
_NAMED_BY_CALL = ("tool", "function", "ipython")
"""Roles whose `name` is the name of a function, which the call before already contains."""
# Tags and switches, which divide a text into parts for templates, and words.
_TAG = r"<[^<>\s][^<>\n]{0,60}>|\[/?[A-Z_]+\]|(?<![\w/])/\w+"
_TAG_OR_WORD = re.compile(rf"({_TAG})|\w+")
_TAGS, _WORD = re.compile(_TAG), re.compile(r"\w")
_STAND_IN = re.compile(r"zq\d+x|73\d{8}")
_COMPLETE: WeakKeyDictionary[Tokenizer, set[tuple[Any, ...]]] = WeakKeyDictionary()
"""Shapes of conversations for which a check showed that the tokenizer's templates leave nothing out."""


def require_written(
    chat: Chat, text: str, learned: Mapping[int, Span], *, count: int, add_generation_prompt: bool = False
) -> None:
    """Raise where a template leaves out what somebody said. Only earlier answers that are not learned may lose text.

    Args:
        chat: the conversation.
        text: the first `count` messages as the template writes them.
        learned: spans in the text of the assistant's messages that are learned, by their place in the chat.
        count: number of messages in the text.
        add_generation_prompt: whether the text ends in the generation prompt.

    Raises:
        RecordError: the template leaves something out; names it.
    """
    messages = chat.messages[:count]
    for index, span in learned.items():
        if (part := _missing_part(messages[index], text, span)) is not None:
            raise _left_out(chat, index, part)
    wanted = [index for index, message in enumerate(messages) if message["role"] != "assistant" or index in learned]
    shape = (shape_of(chat, count), tuple(wanted), add_generation_prompt)
    known = _COMPLETE.setdefault(chat.tokenizer, set())
    if shape in known:
        return
    _require_words(chat, messages, wanted, add_generation_prompt=add_generation_prompt)
    for index in learned:
        _require_arguments_without_words(chat, messages, index, text)
    known.add(shape)


def _require_words(chat: Chat, messages: Messages, wanted: Sequence[int], *, add_generation_prompt: bool) -> None:
    """Raise where a template leaves out a word of the messages at the places `wanted`."""
    for with_calls in (True, False):
        probe = _Probe(with_calls)
        replaced = [probe.replace(message, index) for index, message in enumerate(messages)]
        try:
            written = chat.render(replaced, add_generation_prompt=add_generation_prompt)
        except RecordError:
            continue  # The template reads inside the calls. The search in each turn has shown that it writes them.
        there = set(_STAND_IN.findall(written))
        for word in probe.words:
            if word.index in wanted and word.stand_in not in there:
                raise _left_out(chat, word.index, word.part)
        return


def _require_arguments_without_words(chat: Chat, messages: Messages, index: int, text: str) -> None:
    """Arguments such as true have no words to replace. So they are removed, and the template's text must change."""
    calls = messages[index].get("tool_calls", [])
    for place, function in enumerate(called_functions(calls)):
        arguments = function.get("arguments")
        if not arguments or _has_words(arguments):
            continue
        emptied = [
            change_function(call, lambda function: {**function, "arguments": {}}) if i == place else call
            for i, call in enumerate(calls)
        ]
        others = [*messages[:index], {**messages[index], "tool_calls": emptied}, *messages[index + 1 :]]
        if chat.render(others, add_generation_prompt=False) == text:
            raise _left_out(chat, index, f"{function['name']}({arguments})")


def _left_out(chat: Chat, index: int, part: str) -> RecordError:
    role = chat.messages[index]["role"]
    if role != "assistant":
        message = f"the chat template leaves out some of the {role}'s message, {short(part)}: {_CURE}"
    else:
        message = (
            f"the chat template leaves out some of what the assistant wrote, {short(part)}: {_CURE}; earlier turns may "
            "lose text without --multi-turn-loss"
        )
    return RecordError(chat.where, "chat template", message)


def shape_of(chat: Chat, count: int) -> tuple[Any, ...]:
    """Everything about the first `count` messages that a template's decisions can depend on."""
    source = "".join(chat.tokenizer.chat_templates.values())
    return (*(_shape_of_message(message, source) for message in chat.messages[:count]), chat.settings)


def _shape_of_message(message: Mapping[str, Any], source: str) -> tuple[Any, ...]:
    """The shape of one message. It includes the tags of its texts that also stand in the template's source."""
    said = tuple(
        (name, tuple(tag for tag in _TAGS.findall(message[name]) if tag in source), bool(_WORD.search(message[name])))
        for name in (*_SPOKEN, "name")
        if message.get(name)
    )
    calls = tuple(
        _shape_of_value(function.get("arguments")) for function in called_functions(message.get("tool_calls"))
    )
    return message["role"], said, len(set(thoughts_of(message))), calls


def _shape_of_value(value: Any) -> Any:
    """The kinds of values that arguments have, at each depth."""
    if isinstance(value, dict | list):
        members = value.values() if isinstance(value, dict) else value
        return type(value), frozenset(map(_shape_of_value, members))
    return type(value), _has_words(value)


def _has_words(value: Any) -> bool:
    """Whether the arguments hold anything that can be replaced by another word."""
    if isinstance(value, dict | list):
        return any(map(_has_words, value.values() if isinstance(value, dict) else value))
    if isinstance(value, str):
        return bool(_WORD.search(value))
    return isinstance(value, int) and not isinstance(value, bool)


def _missing_part(message: Mapping[str, Any], text: str, span: Span) -> str | None:
    """What of a message is missing in its turn, or None. White space and tags between words do not matter."""
    written = text[span.start : span.end]
    if message.keys() <= {"role", "content", "weight"} and written.lstrip().startswith(message["content"].strip()):
        return None  # This is by far the most frequent case, and cheap to recognise.
    turn = "".join(written.split())
    for name in _SPOKEN:
        said: str = message.get(name, "")
        position = 0
        for piece in _between_tags(said):
            place = turn.find(piece, position)
            if place < 0:
                return said
            position = place + len(piece)
    names = (function["name"] for function in called_functions(message.get("tool_calls")))
    return next((name for name in names if name not in turn), None)


def _between_tags(text: str) -> Iterator[str]:
    """The pieces of a text between its tags, without white space."""
    pieces = ("".join(piece.split()) for piece in _TAGS.split(text))
    return (piece for piece in pieces if piece)


@dataclass(frozen=True)
class _Word:
    """A word that replaces another one."""

    stand_in: str
    index: int
    """Index of the message that holds the word."""
    part: str
    """The part of the message that holds it, for an error message."""


class _Probe:
    """Replaces the words of messages by unique ones; the words of calls too, if `with_calls`."""

    def __init__(self, with_calls: bool) -> None:
        self.words: list[_Word] = []
        self._with_calls = with_calls

    def replace(self, message: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The message with its words replaced."""
        spoken = [name for name in _SPOKEN if message.get(name)]
        if message.get("name") and message["role"] not in _NAMED_BY_CALL:
            spoken.append("name")
        # Some servers give the same thoughts under two names, and a template writes one of them.
        thoughts = {text: self._in_text(text, index) for text in {message[name] for name in spoken if name in THOUGHTS}}
        replaced = {
            **message,
            **{
                name: thoughts[message[name]] if name in THOUGHTS else self._in_text(message[name], index)
                for name in spoken
            },
        }
        if self._with_calls and message.get("tool_calls"):
            replaced["tool_calls"] = [
                change_function(call, lambda function: self._in_function(function, index))
                for call in message["tool_calls"]
            ]
        return replaced

    def _in_text(self, text: str, index: int) -> str:
        return _TAG_OR_WORD.sub(lambda match: match[1] or self._new(index, text), text)

    def _in_function(self, function: Mapping[str, Any], index: int) -> dict[str, Any]:
        replaced = {**function, "name": self._new(index, function["name"])}
        if "arguments" in function:
            replaced["arguments"] = self._in_value(function["arguments"], index)
        return replaced

    def _in_value(self, value: Any, index: int) -> Any:
        """An argument with its texts and numbers replaced. Names of parameters stay."""
        if isinstance(value, dict):
            return {name: self._in_value(member, index) for name, member in value.items()}
        if isinstance(value, list):
            return [self._in_value(member, index) for member in value]
        if isinstance(value, str):
            return self._in_text(value, index)
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        number = 7_310_000_000 + len(self.words)
        self.words.append(_Word(str(number), index, str(value)))
        return number

    def _new(self, index: int, part: str) -> str:
        self.words.append(_Word(f"zq{len(self.words):06d}x", index, part))
        return self.words[-1].stand_in
