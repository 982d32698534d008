"""Records made into drafts: fields checked, chats rendered, nothing tokenised but what a template marks.

One function a format: a demonstration to learn, a preference, a prompt to sample for. Formats are TRL's.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_brain.data import chat
from megatron_brain.data.errors import RecordError
from megatron_brain.data.tokenizer import Tokenizer

_LARGEST = sys.float_info.max


@dataclass(kw_only=True)
class Draft:
    """A record before its lengths are looked at. `prompt` and `responses` are ids where `kind` is "ids"."""

    where: str
    prompt: Any
    responses: Sequence[Any] = ()
    kind: Literal["text", "chat", "ids"] = "text"
    loss_mask: list[bool] | None = None
    margin: float = 0.0
    reference: str | None = None
    record_id: str = ""


def draft_demonstration(tokenizer: Tokenizer, record: Mapping[str, Any], where: str, *, multi_turn_loss: bool) -> Draft:
    """Draft of a response to learn; with `multi_turn_loss` in ids, and with a mask that counts every assistant turn.

    Raises:
        ValueError: naming the place and the cure.
    """
    if "messages" not in record:
        prompt, (response,), kind = _prompt_and_answers(tokenizer, record, ["completion"], where)
        return Draft(where=where, prompt=prompt, responses=[response], kind=kind)
    messages, tools = chat.check_messages(record["messages"], "messages", where), record.get("tools")
    if multi_turn_loss:
        prompt, response, mask = chat.encode_all_turns(tokenizer, messages, where, tools)
        return Draft(where=where, prompt=prompt, responses=[response], kind="ids", loss_mask=mask)
    prompt, response = chat.render_last_turn(tokenizer, messages, where, tools)
    return Draft(where=where, prompt=prompt, responses=[response], kind="chat")


def draft_preference(tokenizer: Tokenizer, record: Mapping[str, Any], where: str) -> Draft:
    """Draft of the responses (chosen, rejected) to a prompt, and of the margin between them.

    Raises:
        ValueError: naming the place and the cure.
    """
    prompt, responses, kind = _prompt_and_answers(tokenizer, record, ["chosen", "rejected"], where)
    return Draft(where=where, prompt=prompt, responses=responses, kind=kind, margin=_margin(record, where))


def draft_prompt(tokenizer: Tokenizer, record: Mapping[str, Any], where: str) -> Draft:
    """Draft of a prompt alone, with the text of the response people wrote where the record holds one.

    Raises:
        ValueError: naming the place and the cure.
    """
    record_id = where if record.get("id") is None else str(record["id"])
    key = "completion" if record.get("completion") is not None else "chosen"
    answer = record.get(key)
    if record.get("messages") is not None:
        prompt = chat.check_messages(record["messages"], "messages", where)
        if prompt[-1]["role"] == "assistant":
            prompt, answer = prompt[:-1], prompt[-1:]
    elif record.get("prompt") is None and record.get("rejected") is not None:
        pair = [_field(record, key, where) for key in ("chosen", "rejected")]
        if chat.is_messages(pair[0]):
            chosen, rejected = (chat.check_messages(value, "chosen", where) for value in pair)
            prompt, answer, _ = chat.split_shared_messages(chosen, rejected, where)
        else:
            prompt, answer, _ = _split_dialogues(*pair, where)
    else:
        prompt = _field(record, "prompt", where)
    kind: Literal["text", "chat"] = "text"
    if chat.is_messages(prompt):
        messages = chat.check_messages(prompt, "prompt", where)
        prompt, kind = chat.render_prompt(tokenizer, messages, where, record.get("tools")), "chat"
    if chat.is_messages(answer):
        answer = chat.answer_text(chat.check_messages(answer, key, where))
    if answer is not None:
        _check_text(answer, key, where)
    text = _check_text(prompt, "prompt", where)
    return Draft(where=where, prompt=text, kind=kind, reference=answer, record_id=record_id)


def _prompt_and_answers(
    tokenizer: Tokenizer, record: Mapping[str, Any], keys: list[str], where: str
) -> tuple[str, list[str], Literal["text", "chat"]]:
    """Prompt and the answers under `keys`, as texts; rendered ones where the fields are lists of messages."""
    answers = [_field(record, key, where) for key in keys]
    implicit = keys == ["chosen", "rejected"] and record.get("prompt") is None
    prompt = "" if implicit else _field(record, "prompt", where)
    kinds = {chat.is_messages(value) for value in ([] if implicit else [prompt]) + answers}
    if len(kinds) > 1:
        raise RecordError(
            where,
            "wrong type",
            f"'prompt' and {' and '.join(map(repr, keys))} must be all texts or all lists of messages; "
            "where 'chosen' and 'rejected' are whole conversations, leave 'prompt' out",
        )
    if kinds == {False}:
        if implicit:
            prompt, *answers = _split_dialogues(*answers, where)
        for key, text in zip(keys, answers, strict=True):
            _check_text(text, key, where)
        return _check_text(prompt, "prompt", where), answers, "text"
    conversations = [chat.check_messages(value, key, where) for key, value in zip(keys, answers, strict=True)]
    if implicit:
        messages, *conversations = chat.split_shared_messages(*conversations, where)
    else:
        messages = chat.check_messages(prompt, "prompt", where)
    for key, answer in zip(keys, conversations, strict=True):
        if len(answer) != 1:
            raise RecordError(
                where,
                "bad messages",
                f"{key!r} must be the one assistant message that answers the prompt, not {len(answer)} "
                "messages; give longer conversations as 'messages'",
            )
    tools = record.get("tools")
    turns = [chat.render_last_turn(tokenizer, messages + answer, where, tools) for answer in conversations]
    return turns[0][0], [response for _, response in turns], "chat"


def _split_dialogues(chosen: Any, rejected: Any, where: str) -> tuple[str, str, str]:
    return chat.split_shared_dialogue(
        _check_text(chosen, "chosen", where), _check_text(rejected, "rejected", where), where
    )


def _field(record: Mapping[str, Any], key: str, where: str) -> Any:
    if record.get(key) is None:
        state = "is null" if key in record else "is missing"
        raise RecordError(
            where, "missing field", f"field {key!r} {state}; the record has {', '.join(record) or 'no fields'}"
        )
    return record[key]


def _check_text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(
            where, "wrong type", f"field {key!r} must be a text or a list of messages, not {type(value).__name__}"
        )
    if not value.strip():
        raise RecordError(where, "empty field", f"field {key!r} is empty")
    return value


def _margin(record: Mapping[str, Any], where: str) -> float:
    margin = record.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not abs(margin) <= _LARGEST:
        raise RecordError(where, "wrong type", f"field 'margin' must be a finite number, not {margin!r}")
    return float(margin)
