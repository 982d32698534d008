"""Cuts the prompt and the response of a chat's last turn out of the text that the chat template writes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_brain.data.chat import Chat, Span
from megatron_brain.data.conversations import is_said
from megatron_brain.data.omissions import require_written
from megatron_brain.data.tokenizer import Tokenizer
from megatron_brain.data.tokenizer.base import Before
from megatron_brain.errors import RecordError


def render_prompt(chat: Chat) -> str:
    """Text of all messages and of the template's opening of an assistant turn.

    Raises:
        RecordError: the last message is already the assistant's, or the template refuses or leaves out something.
    """
    text = _open_last(chat, len(chat.messages))
    require_written(chat, text, {}, count=len(chat.messages), add_generation_prompt=True)
    return text


def render_last_turn(chat: Chat) -> tuple[str, str]:
    """Rendered prompt (everything before the last assistant turn) and rendered response (that turn with its end).

    Raises:
        RecordError: the last message is not the assistant's, or is empty; the template renders the earlier messages
            differently once the answer follows, so that no response can be cut out; or the template leaves out
            something.
    """
    require_answer(chat)
    last = len(chat.messages) - 1
    prompt, whole = _open_last(chat, last), chat.closed(last + 1)
    require_closed(chat)
    require_begins(chat, prompt, whole)
    require_written(chat, whole, {last: Span(len(prompt), len(whole))}, count=last + 1)
    return prompt, whole[len(prompt) :]


def encode_answer(tokenizer: Tokenizer, text: str, *, chat: bool, before: Before, where: str) -> list[int]:
    """Ids of a known answer to a prompt, the same ids that SFT and the reward model see.

    Args:
        text: what the assistant says, without markup.
        chat: whether a chat template rendered the prompt. If so, it renders the answer too.
        before: what precedes the answer: the prompt.
        where: place of the record.

    Raises:
        RecordError: the template cannot render the answer separately from a prompt.
    """
    if not chat:
        return tokenizer.encode_response(text, before=before)
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": text}]
    response = render_last_turn(Chat(tokenizer, messages, where))[1]
    return tokenizer.encode_response(response, chat=True, before=before)


def require_answer(chat: Chat) -> None:
    """Raise RecordError where a conversation does not end with an answer of the assistant."""
    last = chat.messages[-1]
    if last["role"] != "assistant":
        raise RecordError(
            chat.where, "bad messages", f"the last message must be the assistant's, not the {last['role']}'s; remove it"
        )
    if not is_said(last):
        raise RecordError(chat.where, "empty field", "the last assistant message is empty; remove the record")


def require_closed(chat: Chat) -> None:
    """Raise RecordError where the template opens another turn after every conversation: the opening would be learned.

    The first template of Llama 3 does so. Prompts to sample for are not affected.
    """
    if behind := chat.tokenizer.opens_behind(chat.tools):
        raise RecordError(
            chat.where,
            "chat template",
            f"the chat template writes {behind!r} behind every conversation, which would be learned as part of the "
            "answer; give one that opens a turn only where add_generation_prompt is set (--chat-template FILE)",
        )


def require_begins(chat: Chat, prompt: str, whole: str, turn: str = "the response") -> None:
    """Raise RecordError where the text of a prompt does not begin the text of the whole conversation."""
    if whole.startswith(prompt):
        return
    same = len(os.path.commonprefix([prompt, whole]))
    raise RecordError(
        chat.where,
        "chat template",
        f"the chat template renders the prompt as ...{prompt[same:][:60]!r} where the whole conversation "
        f"has ...{whole[same:][:60]!r}, so {turn} cannot be cut out; use a chat template whose text for "
        "[messages so far + generation prompt] begins the text of the whole conversation (--chat-template FILE), set a "
        "switch of the template ('chat_template_kwargs': {'enable_thinking': false} in the record, where it has that "
        "one), or give {'prompt', 'completion'} texts",
    )


def _open_last(chat: Chat, count: int) -> str:
    """The prompt for the turn after the first `count` messages, the last of which must not be the assistant's."""
    before: Sequence[Mapping[str, Any]] = chat.messages[:count]
    if not before or before[-1]["role"] == "assistant":
        raise RecordError(
            chat.where,
            "bad messages",
            "a prompt must have a message before the assistant's turn and must not end with the assistant's",
        )
    return chat.opened(count)
