"""Makes drafts of records: it checks fields and renders chats. It tokenises only for a loss on every assistant turn.

Each kind of item has a function: a demonstration to learn, a preference, a prompt to sample for. The formats are TRL's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_brain.data import conversations
from megatron_brain.data.chat import Chat
from megatron_brain.data.conversations import Messages
from megatron_brain.data.json_values import is_blank
from megatron_brain.data.last_turn import render_last_turn, render_prompt
from megatron_brain.data.tokenizer import Tokenizer
from megatron_brain.data.tools import check_tools
from megatron_brain.data.turns import encode_all_turns
from megatron_brain.errors import RecordError

_LARGEST = sys.float_info.max

_WEIGHTS = ("weight", "weights", "sample_weight", "loss_weight")
_DISLIKED = ("false", "0", "0.0", "no")
"""Spellings of a `label` of unpaired preferences that says that the completion is a bad one."""
_PROMPT_FIELDS = ("id", "prompt", "messages", "completion", "chosen", "rejected")
_TOKEN_MASKS = ("loss_mask", "completion_mask", "assistant_mask", "assistant_masks")


@dataclass(kw_only=True)
class Draft:
    """A record before its lengths are checked. `prompt` and `responses` are ids where `kind` is "ids", else texts."""

    where: str
    prompt: Any
    responses: Sequence[Any] = ()
    kind: Literal["text", "chat", "ids"] = "text"
    loss_mask: list[bool] | None = None
    margin: float = 0.0
    reference: str | None = None
    record_id: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of a prompt: the fields of the record that make neither the prompt nor the reference."""
    left_out: str | None = None
    """Why the record is left out, in words; None: it is not. It then has no texts."""


def draft_demonstration(tokenizer: Tokenizer, record: Mapping[str, Any], where: str, *, multi_turn_loss: bool) -> Draft:
    """Draft of a response to learn. With `multi_turn_loss` it holds ids and a mask that counts every assistant turn.

    Of a preference the chosen answer is learned.

    Raises:
        RecordError: the record cannot be used; names the place and the cure.
    """
    _refuse_unsupported(record, where)
    if str(record.get("label", True)).strip().lower() in _DISLIKED:
        raise RecordError(
            where,
            "unsupported field",
            f"field 'label' is {json.dumps(record['label'])}: the completion is one not to learn (unpaired "
            "preferences); remove the record, or the field if it says something else",
        )
    if "messages" not in record:
        prompt, (response, *_), kind = _prompt_and_answers(tokenizer, record, _learned_fields(record), where)
        return Draft(where=where, prompt=prompt, responses=[response], kind=kind)
    chat = _chat(tokenizer, record, conversations.check_messages(record["messages"], "messages", where), where)
    if multi_turn_loss:
        prompt_ids, ids, mask = encode_all_turns(chat)
        return Draft(where=where, prompt=prompt_ids, responses=[ids], kind="ids", loss_mask=mask)
    prompt, response = render_last_turn(chat)
    _require_weight(chat.messages[-1], "messages", where)
    return Draft(where=where, prompt=prompt, responses=[response], kind="chat")


def _learned_fields(record: Mapping[str, Any]) -> list[str]:
    """The field of the answer to learn, first: `completion`, or of a preference `chosen`. A rejected answer is read as
    for a reward model, so that both stages take the same records and the same prompts."""
    if record.get("completion") is not None or record.get("chosen") is None:
        return ["completion"]
    return ["chosen"] if record.get("rejected") is None else ["chosen", "rejected"]


def draft_preference(tokenizer: Tokenizer, record: Mapping[str, Any], where: str) -> Draft:
    """Draft of the responses (chosen, rejected) to a prompt, with the margin between them.

    Raises:
        RecordError: the record cannot be used; names the place and the cure.
    """
    _refuse_unsupported(record, where)
    prompt, responses, kind = _prompt_and_answers(tokenizer, record, ["chosen", "rejected"], where)
    return Draft(where=where, prompt=prompt, responses=responses, kind=kind, margin=_margin(record, where))


def draft_prompt(tokenizer: Tokenizer, record: Mapping[str, Any], where: str) -> Draft:
    """Draft of a prompt alone, with the text of the reference where the record holds one.

    Raises:
        RecordError: the record cannot be used; names the place and the cure.
    """
    _refuse_unsupported(record, where)
    record_id = where if record.get("id") is None else str(record["id"])
    fields = {name: value for name, value in record.items() if name not in _PROMPT_FIELDS}
    prompt, answer, key = _prompt_and_reference(record, where)
    if not conversations.is_messages(prompt):
        if conversations.is_messages(answer):
            answer = conversations.answer_text(conversations.check_messages(answer, key, where))
        if answer is not None:
            _check_text(answer, key, where)
        text = _check_text(prompt, "prompt", where)
        return Draft(where=where, prompt=text, reference=answer, record_id=record_id, fields=fields)
    messages = conversations.check_messages(prompt, "prompt", where)
    chat = _chat(tokenizer, record, messages, where)
    if conversations.is_messages(answer):
        answer = _reference_text(tokenizer, record, messages, conversations.check_messages(answer, key, where), where)
    if answer is not None:
        _check_text(answer, key, where)
    prompt = render_prompt(chat)
    return Draft(where=where, prompt=prompt, kind="chat", reference=answer, record_id=record_id, fields=fields)


def _prompt_and_reference(record: Mapping[str, Any], where: str) -> tuple[Any, Any, str]:
    """Prompt, reference (or None) and the field that holds the reference. Both are a text or messages."""
    key = "completion" if record.get("completion") is not None else "chosen"
    if record.get("messages") is not None:
        messages = conversations.check_messages(record["messages"], "messages", where)
        if messages[-1]["role"] == "assistant":
            return messages[:-1], messages[-1:], "messages"
        return messages, record.get(key), key
    if record.get("prompt") is None and record.get("rejected") is not None:
        chosen, rejected = (_field(record, name, where) for name in ("chosen", "rejected"))
        if conversations.is_messages(chosen):
            chosen, rejected = (conversations.check_messages(value, "chosen", where) for value in (chosen, rejected))
            return *conversations.split_shared_messages(chosen, rejected, where)[:2], key
        return *_split_dialogues(chosen, rejected, where)[:2], key
    return _field(record, "prompt", where), record.get(key), key


def _reference_text(
    tokenizer: Tokenizer, record: Mapping[str, Any], prompt: Messages, answer: Messages, where: str
) -> str | None:
    """The reference as a text, with the calls and thoughts that a template writes, as in a sampled response.

    None where the template does not take the message: a prompt to sample for does not need a reference.
    """
    if answer[-1].keys() <= {"role", "content", "weight"}:
        return conversations.answer_text(answer)
    try:
        _, response = render_last_turn(_chat(tokenizer, record, [*prompt, *answer], where))
    except RecordError:
        return None
    return tokenizer.decode_response(tokenizer.encode_response(response, chat=True)).strip() or None


def _chat(tokenizer: Tokenizer, record: Mapping[str, Any], messages: Messages, where: str) -> Chat:
    tools = check_tools(record, where)
    if record.get("documents") and any("documents" in text for text in tokenizer.chat_templates.values()):
        raise RecordError(
            where,
            "unsupported field",
            "field 'documents' would be written by the chat template, and is not given to it: put it into the record's "
            "'chat_template_kwargs', or remove it",
        )
    return Chat(tokenizer, messages, where, tools, conversations.check_template_kwargs(record, where))


def _prompt_and_answers(
    tokenizer: Tokenizer, record: Mapping[str, Any], keys: list[str], where: str
) -> tuple[str, list[str], Literal["text", "chat"]]:
    """Prompt and the answers under `keys`, as texts. Fields that are lists of messages are rendered."""
    answers = [_field(record, key, where) for key in keys]
    implicit = keys == ["chosen", "rejected"] and record.get("prompt") is None
    prompt = "" if implicit else _field(record, "prompt", where)
    kinds = {conversations.is_messages(value) for value in ([] if implicit else [prompt]) + answers}
    if len(kinds) > 1:
        raise RecordError(
            where,
            "wrong type",
            f"'prompt' and {' and '.join(map(repr, keys))} must be all texts or all lists of messages; "
            "where 'chosen' and 'rejected' are whole conversations, leave 'prompt' out",
        )
    if kinds == {False}:
        if implicit:
            prompt, *answers = _split_dialogues(answers[0], answers[1], where)
        for key, text in zip(keys, answers, strict=True):
            _check_text(text, key, where)
        return _check_text(prompt, "prompt", where), answers, "text"
    checked = [conversations.check_messages(value, key, where) for key, value in zip(keys, answers, strict=True)]
    if implicit:
        messages, *checked = conversations.split_shared_messages(checked[0], checked[1], where)
    else:
        messages = conversations.check_messages(prompt, "prompt", where)
    for key, answer in zip(keys, checked, strict=True):
        if len(answer) != 1:
            raise RecordError(
                where,
                "bad messages",
                f"{key!r} must be the one assistant message that answers the prompt, not {len(answer)} "
                "messages; give longer conversations as 'messages'",
            )
    turns = [render_last_turn(_chat(tokenizer, record, messages + answer, where)) for answer in checked]
    for key, answer in zip(keys, checked, strict=True):
        _require_weight(answer[-1], key, where)
    return turns[0][0], [response for _, response in turns], "chat"


def _require_weight(message: Mapping[str, Any], key: str, where: str) -> None:
    """Raise RecordError where the answer to learn has weight 0."""
    if not conversations.weight_of(message):
        raise RecordError(
            where,
            "nothing to learn",
            f"the answer in {key!r} has weight 0: nothing is learned; remove the record, or train on all turns "
            "(--multi-turn-loss)",
        )


def _refuse_unsupported(record: Mapping[str, Any], where: str) -> None:
    """Raise RecordError where the record has an unsupported field that would change what is learned."""
    is_chat = bool(record.get("messages")) or any(
        isinstance(record.get(name), list) for name in ("prompt", "chosen", "completion")
    )
    cures = {
        **dict.fromkeys(conversations.MEDIA, "only texts are read; remove it"),
        **dict.fromkeys(_WEIGHTS, "all records count alike; remove it, or give 'weight': 0 or 1 on assistant messages"),
        **dict.fromkeys(_TOKEN_MASKS, "give messages with 'weight': 0 or 1 and --multi-turn-loss"),
        **(dict.fromkeys(("functions", "function_call"), "give the functions as 'tools'") if is_chat else {}),
        "system": f"{'' if is_chat else 'give messages, and '}give it as the first message, with the role system",
        **({} if is_chat else {"tools": "a text has no place for it; give messages"}),
    }
    for name, cure in cures.items():
        value = record.get(name)
        changes = value not in (None, 1) if name in _WEIGHTS else not is_blank(value)
        if changes:
            raise RecordError(where, "unsupported field", f"field {name!r} is not supported: {cure}")


def _split_dialogues(chosen: Any, rejected: Any, where: str) -> tuple[str, str, str]:
    return conversations.split_shared_dialogue(
        _check_text(chosen, "chosen", where), _check_text(rejected, "rejected", where), where
    )


def _field(record: Mapping[str, Any], key: str, where: str) -> Any:
    if record.get(key) is None:
        present = [name for name, value in record.items() if value is not None]
        raise RecordError(
            where,
            "missing field",
            f"field {key!r} is missing; the record has {', '.join(present) or 'no fields'}: rename the one that it is "
            "in, or remove the record",
        )
    conversations.refuse_text_of_messages(record[key], key, where)
    return record[key]


def _check_text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(
            where, "wrong type", f"field {key!r} must be a text or a list of messages, not {type(value).__name__}"
        )
    if not value.strip():
        raise RecordError(where, "empty field", f"field {key!r} is empty; remove the record")
    return value


def _margin(record: Mapping[str, Any], where: str) -> float:
    margin = record.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not abs(margin) <= _LARGEST:
        raise RecordError(where, "wrong type", f"field 'margin' must be a finite number, not {margin!r}")
    return float(margin)
