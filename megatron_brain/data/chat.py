"""Conversations: chat messages, and dialogues written as plain text, as prompt and response.

Messages are a list of ``{"role": ..., "content": ...}``, rendered by the tokenizer's chat template. `where` in
every function is the place of the record, for error messages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, cycle, pairwise
from typing import Any

import jinja2

from megatron_brain.data.errors import RecordError
from megatron_brain.data.tokenizer import Tokenizer

Messages = list[dict[str, Any]]

DIALOGUE_CUE = "\n\nAssistant:"
"""What precedes each answer in plain-text dialogues such as Anthropic/hh-rlhf."""

_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that templates know for what was thought before the answer."""

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK_CURE = (
    "wrap what the assistant writes, its end-of-turn token included, in {% generation %} ... {% endgeneration %} "
    "in the tokenizer's chat template, or train on the last turn only (without --multi-turn-loss)"
)


def is_messages(value: Any) -> bool:
    """Whether a field holds a chat (a list) and not a text."""
    return isinstance(value, list)


def check_messages(messages: Any, key: str, where: str) -> Messages:
    """The messages without fields that are None (columns of a table have those), contents as one text each.

    Contents may be lists of parts, which are joined: a template that writes texts would write the list as Python does.

    Raises:
        ValueError: not a list of one or more objects with a text role and a text, naming `where` and `key`.
    """
    if not is_messages(messages) or not messages:
        raise RecordError(
            where, "bad messages", f"{key!r} must be a list of one or more messages {{'role', 'content'}}"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RecordError(
                where, "bad messages", f"{key}[{index}] must be an object with a text 'role', not {_short(message)}"
            )
        if message.get("content") is None and not message.get("tool_calls"):
            raise RecordError(where, "bad messages", f"{key}[{index}] ({message['role']}) has no 'content'")
        if not _is_content(message.get("content")):
            raise RecordError(
                where,
                "bad messages",
                f"{key}[{index}] ({message['role']}): 'content' must be a text, or a list of "
                f"{{'type': 'text', 'text': ...}}, not {_short(message['content'])}",
            )
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise RecordError(
                where,
                "bad messages",
                f"{key}[{index}] ({message['role']}): 'tool_calls' must be a list of objects, not {_short(calls)}",
            )
    return [_plain(message) for message in messages]


def _is_content(content: Any) -> bool:
    """Whether a message's content is a text, a list of parts that are texts, or absent beside tool calls."""
    if isinstance(content, list):
        return all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content)
    return content is None or isinstance(content, str)


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in message.items() if value is not None}
    if isinstance(plain.get("content"), list):
        plain["content"] = "".join(part["text"] for part in plain["content"])
    return plain


def render_prompt(tokenizer: Tokenizer, messages: Messages, where: str, tools: list | None = None) -> str:
    """The messages and the template's opening of an assistant turn.

    Raises:
        ValueError: the last message is the assistant's already, or the template refuses the messages.
    """
    if not messages or messages[-1]["role"] == "assistant":
        raise RecordError(
            where,
            "bad messages",
            "a prompt must have a message before the assistant's turn and must not end with the assistant's",
        )
    return _render(tokenizer, messages, where, tools, add_generation_prompt=True)


def render_last_turn(
    tokenizer: Tokenizer, messages: Messages, where: str, tools: list | None = None
) -> tuple[str, str]:
    """Rendered prompt (all before the last assistant turn) and rendered response (that turn with its end).

    Raises:
        ValueError: the last message is not an assistant's, or is empty; or the template renders the earlier
            messages differently once the answer is there, so that no response can be cut out.
    """
    last = messages[-1]
    if last["role"] != "assistant":
        raise RecordError(
            where, "bad messages", f"the last message must be the assistant's, not the {last['role']}'s; remove it"
        )
    if not last.get("tool_calls") and not answer_text(messages).strip():
        raise RecordError(where, "empty field", "the last assistant message is empty")
    prompt = render_prompt(tokenizer, messages[:-1], where, tools)
    full = _render(tokenizer, messages, where, tools, add_generation_prompt=False)
    if not full.startswith(prompt):
        same = len(os.path.commonprefix([prompt, full]))
        raise RecordError(
            where,
            "chat template",
            f"the chat template renders the prompt as ...{prompt[same:][:60]!r} where the whole conversation "
            f"has ...{full[same:][:60]!r}, so the response cannot be cut out; use a chat template whose text for "
            "[messages so far + generation prompt] begins the text of the whole conversation, or give "
            "{'prompt', 'completion'} texts",
        )
    if not full[len(prompt) :].strip():
        raise RecordError(where, "chat template", "the chat template renders nothing of the last assistant message")
    # The generation prompt may have opened the answer, as with "<think>".
    begin = len(prompt) - max(len(answer_text(messages).strip()) - 1, 0)
    _require_whole_answers(messages[-1:], full[max(begin, 0) :], where)
    return prompt, full[len(prompt) :]


def encode_all_turns(
    tokenizer: Tokenizer, messages: Messages, where: str, tools: list | None = None
) -> tuple[list[int], list[int], list[bool]]:
    """A conversation as ids for a loss on every assistant turn.

    Returns:
        prompt ids (up to the first assistant token), response ids (the rest, ending with EOS), and for each
        response token whether the assistant wrote it (as the template's ``{% generation %}`` blocks say).

    Raises:
        ValueError: the template does not mark the assistant's tokens, or not all of them.
    """
    if messages[-1]["role"] != "assistant":
        raise RecordError(
            where, "bad messages", f"the last message must be the assistant's, not the {messages[-1]['role']}'s"
        )
    if tokenizer.chat_template is not None and not _GENERATION_BLOCK.search(tokenizer.chat_template):
        raise RecordError(
            where, "unmarked assistant turns", f"the chat template does not mark the assistant's tokens; {_MARK_CURE}"
        )
    with _errors_at(where):
        text, blocks = tokenizer.render_chat_marked(messages, tools=tools)
    _require_whole_answers(messages, text, where)
    spans = _merge_adjoining(blocks)
    turns = sum(message["role"] == "assistant" for message in messages)
    if len(spans) != turns:
        raise RecordError(
            where,
            "unmarked assistant turns",
            f"the chat template marks {len(spans)} of {turns} assistant turns; {_MARK_CURE}",
        )
    _require_marks_begin_turns(tokenizer, messages, text, [start for start, _ in spans], where, tools)
    # Each piece apart, as sampling has them: no token reaches across the beginning of a turn.
    cuts = [0, *chain.from_iterable(spans), len(text)]
    prompt, *pieces = tokenizer.encode_batch([text[a:b] for a, b in pairwise(cuts)], parse_special=True)
    if any(rest[:1] == [tokenizer.eos_id] for rest in pieces[1::2]) or _ends_unmarked(tokenizer, pieces[-1]):
        raise RecordError(
            where, "unmarked assistant turns", f"the chat template leaves the end-of-turn token unmarked; {_MARK_CURE}"
        )
    response = tokenizer.close_turn(list(chain.from_iterable(pieces[:-1])))
    mask: list[bool] = []
    for piece, is_turn in zip(pieces, cycle([True, False])):
        learned = tokenizer.turn_length(piece) if is_turn else 0
        mask += [True] * learned + [False] * (len(piece) - learned)
    return prompt, response, [*mask[: len(response) - 1], True]


def _merge_adjoining(blocks: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Starts and ends of what is marked; a turn may be written by several blocks, one behind the other."""
    spans: list[tuple[int, int]] = []
    for start, end in blocks:
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end)
        elif start < end:
            spans.append((start, end))
    return spans


def _require_marks_begin_turns(
    tokenizer: Tokenizer, messages: Messages, text: str, starts: Sequence[int], where: str, tools: list | None
) -> None:
    """Raise where the marks of a turn do not begin right behind the generation prompt, as its sampling does."""
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if first == 0 or starts[0] == 0:
        raise RecordError(where, "bad messages", "the conversation has nothing before the assistant's first turn")
    prompt = _render(tokenizer, messages[:first], where, tools, add_generation_prompt=True)
    without = _render(tokenizer, messages[:first], where, tools, add_generation_prompt=False)
    opening = prompt[len(os.path.commonprefix([prompt, without])) :]
    if text.startswith(prompt) and starts[0] < len(prompt):
        state = f"marks what precedes the assistant's first turn as the assistant's, {_short(text[starts[0] :])}"
    elif text.startswith(prompt) and starts[0] > len(prompt):
        state = f"leaves the beginning of the assistant's first turn unmarked, {_short(text[len(prompt) : starts[0]])}"
    elif not all(text.endswith(opening, 0, start) for start in starts):
        state = f"does not mark every turn from the end of its generation prompt on, {_short(opening)}"
    else:
        return
    raise RecordError(where, "unmarked assistant turns", f"the chat template {state}; {_MARK_CURE}")


def encode_answer(tokenizer: Tokenizer, text: str, *, chat: bool, where: str) -> list[int]:
    """Ids of a known answer to a prompt, as SFT and reward model have them.

    Args:
        text: what the assistant says, without markup.
        chat: whether a chat template rendered the prompt; then it renders the answer too.
        where: place of the record.

    Raises:
        ValueError: the template cannot render the answer apart from a prompt.
    """
    if not chat:
        return tokenizer.encode_response(text)
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": text}]
    return tokenizer.encode_response(render_last_turn(tokenizer, messages, where)[1], chat=True)


def answer_text(messages: Messages) -> str:
    """Text of the last message."""
    return messages[-1].get("content", "")


def split_shared_messages(chosen: Messages, rejected: Messages, where: str) -> tuple[Messages, Messages, Messages]:
    """Prompt, chosen and rejected completion of two conversations that share their beginning.

    Raises:
        ValueError: they do not differ in exactly their last message.
    """
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise RecordError(
            where,
            "no shared prompt",
            "without a 'prompt', 'chosen' and 'rejected' must be conversations that share every message "
            "but the last; give the shared messages as 'prompt'",
        )
    return chosen[:-1], chosen[-1:], rejected[-1:]


def split_shared_dialogue(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """Prompt, chosen and rejected answer of two plain-text dialogues (the format of Anthropic/hh-rlhf).

    The prompt ends with the last ``"\\n\\nAssistant:"`` that both share.

    Raises:
        ValueError: they share none.
    """
    shared = os.path.commonprefix([chosen, rejected])
    end = shared.rfind(DIALOGUE_CUE) + len(DIALOGUE_CUE)
    if end < len(DIALOGUE_CUE):
        raise RecordError(
            where,
            "no shared prompt",
            f"no 'prompt', and 'chosen' and 'rejected' do not share a beginning that ends with "
            f"{DIALOGUE_CUE!r}; give the prompt as its own field",
        )
    return chosen[:end], chosen[end:], rejected[end:]


def _require_whole_answers(messages: Sequence[dict[str, Any]], rendered: str, where: str) -> None:
    """Raise where a template leaves out what an assistant wrote: thinking, often, or calls of tools."""
    position = 0
    for message in messages:
        if message["role"] != "assistant":
            continue
        text = message.get("content", "")
        thoughts = [message[key] for key in _REASONING_KEYS if isinstance(message.get(key), str)]
        for part in (*thoughts, *_tool_names(message.get("tool_calls")), text):
            found = rendered.find(part.strip(), position)
            if found < 0:
                raise RecordError(
                    where,
                    "chat template",
                    f"the chat template leaves out some of what the assistant wrote, {_short(part)}: use one that "
                    "keeps it, or remove it from the record; earlier turns may lose text without --multi-turn-loss",
                )
        position = found


def _tool_names(tools: Any) -> list[str]:
    """Names of tools or of calls of tools, with or without the wrapper ``{"type": "function", "function": ...}``."""
    described = [tool.get("function", tool) for tool in tools or () if isinstance(tool, dict)]
    names = [function.get("name") for function in described if isinstance(function, dict)]
    return [name for name in names if isinstance(name, str)]


def _ends_unmarked(tokenizer: Tokenizer, tail: Sequence[int]) -> bool:
    """Whether anything but white space, and EOS at the very end, follows what the template marks."""
    if tail[-1:] == [tokenizer.eos_id]:
        tail = tail[:-1]
    return not all(map(tokenizer.is_space, tail))


def _render(
    tokenizer: Tokenizer, messages: Sequence[dict], where: str, tools: list | None, *, add_generation_prompt: bool
) -> str:
    with _errors_at(where):
        text = tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt, tools=tools)
    if left_out := [name for name in _tool_names(tools) if name not in text]:
        raise RecordError(
            where,
            "chat template",
            f"the chat template leaves out the tool {left_out[0]!r}: use one that writes 'tools', or remove the field",
        )
    return text


@contextmanager
def _errors_at(where: str) -> Iterator[None]:
    """Errors of the chat template, or of its absence, with the place of the record."""
    try:
        yield
    except (jinja2.TemplateError, TypeError) as error:  # TypeError: tools or fields of another kind than expected
        raise RecordError(where, "chat template", f"the chat template refuses these messages: {error}") from error
    except ValueError as error:
        raise RecordError(where, "chat template", f"{error}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
