"""Records made into tokenised groups, preference pairs and prompts.

:func:`sft_groups`, :func:`preference_groups` and :func:`prompt_groups` take what ``sources.load_records`` read, under
the one rule of ``lengths`` for overlong records. Formats are TRL's. Every error starts with the place of the record.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Literal

from megatron_brain.data import chat
from megatron_brain.data.groups import Group
from megatron_brain.data.lengths import LengthLimits, ReadReport, cut_prompt, fit_group, keep_overlong, make_report
from megatron_brain.data.sources import Record
from megatron_brain.data.tokenizer import Tokenizer

_BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """A group whose two responses are (chosen, rejected), and by how much chosen should win."""

    group: Group
    margin: float


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt to sample from: its ids, its text (before any truncation) and the response people wrote, if known.

    `record_id` is the record's own ``id`` field, or else its place.
    """

    tokens: tuple[int, ...]
    text: str
    reference: str | None
    record_id: str
    chat: bool = False
    """Whether a chat template rendered the prompt: a response to it then ends a turn."""


@dataclass(kw_only=True)
class _Draft:
    """A record before its lengths are looked at. `prompt` and `responses` are ids where `kind` is "ids"."""

    where: str
    prompt: Any
    responses: Sequence[Any] = ()
    kind: Literal["text", "chat", "ids"] = "text"
    loss_mask: list[bool] | None = None
    margin: float = 0.0
    reference: str | None = None
    record_id: str = ""


def sft_groups(
    records: Iterable[Record], tokenizer: Tokenizer, limits: LengthLimits, *, multi_turn_loss: bool = False
) -> tuple[list[Group], ReadReport]:
    """Groups of one response to learn.

    Records: ``{"prompt": text, "completion": text}``, the same with lists of messages, or ``{"messages": [...]}``
    (the response is the last assistant turn; with `multi_turn_loss` the loss counts every assistant turn).

    Raises:
        ValueError: a bad or overlong record, or none left, naming its place and the cure.
    """

    def draft(where: str, record: dict) -> _Draft:
        if "messages" not in record:
            prompt, (response,), kind = _prompt_and_answers(tokenizer, record, ["completion"], where)
            return _Draft(where=where, prompt=prompt, responses=[response], kind=kind)
        messages, tools = chat.check_messages(record["messages"], "messages", where), record.get("tools")
        if multi_turn_loss:
            prompt, response, mask = chat.encode_all_turns(tokenizer, messages, where, tools)
            return _Draft(where=where, prompt=prompt, responses=[response], kind="ids", loss_mask=mask)
        prompt, response = chat.render_last_turn(tokenizer, messages, where, tools)
        return _Draft(where=where, prompt=prompt, responses=[response], kind="chat")

    counts: Counter[str] = Counter()
    drafts = (draft(where, record) for where, record in records)
    groups = [group for _, group in _fitted_groups(drafts, tokenizer, limits, counts)]
    return groups, make_report(counts, len(groups), limits)


def preference_groups(
    records: Iterable[Record], tokenizer: Tokenizer, limits: LengthLimits
) -> tuple[list[PreferencePair], ReadReport]:
    """Pairs of responses of which the first is preferred.

    Records: ``{"prompt", "chosen", "rejected"}``, each a text or a list of messages, and optionally a number
    ``margin``. Without ``prompt``, chosen and rejected are whole conversations and the prompt is what they share.

    Raises:
        ValueError: a bad or overlong record, or none left, naming its place and the cure.
    """

    def draft(where: str, record: dict) -> _Draft:
        prompt, responses, kind = _prompt_and_answers(tokenizer, record, ["chosen", "rejected"], where)
        return _Draft(where=where, prompt=prompt, responses=responses, kind=kind, margin=_margin(record, where))

    counts: Counter[str] = Counter()
    drafts = (draft(where, record) for where, record in records)
    pairs = [
        PreferencePair(group=group, margin=made_of.margin)
        for made_of, group in _fitted_groups(drafts, tokenizer, limits, counts)
    ]
    counts["identical_pairs"] = sum(pair.group.responses[0] == pair.group.responses[1] for pair in pairs)
    return pairs, make_report(counts, len(pairs), limits)


def prompt_groups(
    records: Iterable[Record], tokenizer: Tokenizer, limits: LengthLimits, *, room: int = 1
) -> tuple[list[Prompt], ReadReport]:
    """Prompts to sample responses for.

    Records: any of the formats above; the reference is ``completion``, ``chosen`` or the last assistant message,
    where there is one. A prompt may have `max_prompt_length` tokens and must leave `room` tokens of `seq_length` for a
    response.

    Raises:
        ValueError: a bad or overlong record, or none left, naming its place and the cure.
    """
    left = limits.seq_length - room
    longest = min(left, limits.max_prompt_length or left)
    if longest < 1:
        raise ValueError(f"--seq-length {limits.seq_length} leaves no room for a prompt and a response")
    counts: Counter[str] = Counter()
    seen: set[tuple[int, ...]] = set()
    prompts = []
    drafts = (_prompt_draft(tokenizer, record, where) for where, record in records)
    for draft, ids, _ in _tokenised(drafts, tokenizer):
        counts["read"] += 1
        if len(ids) > longest:
            what = f"prompt of {len(ids)} tokens where {longest} leave room for a response"
            if not keep_overlong(what, limits=limits, where=draft.where, counts=counts):
                continue
            counts["truncated_prompt"] += 1
        tokens = cut_prompt(ids, longest, tokenizer.bos_id)
        counts["duplicates"] += tokens in seen
        seen.add(tokens)
        prompts.append(
            Prompt(
                tokens=tokens,
                text=draft.prompt,
                reference=draft.reference,
                record_id=draft.record_id,
                chat=draft.kind == "chat",
            )
        )
    return prompts, make_report(counts, len(prompts), limits)


def _prompt_and_answers(
    tokenizer: Tokenizer, record: Mapping[str, Any], keys: list[str], where: str
) -> tuple[str, list[str], Literal["text", "chat"]]:
    """Prompt and the answers under `keys`, as texts; rendered ones where the fields are lists of messages."""
    answers = [_field(record, key, where) for key in keys]
    implicit = keys == ["chosen", "rejected"] and record.get("prompt") is None
    prompt = "" if implicit else _field(record, "prompt", where)
    kinds = {chat.is_messages(value) for value in ([] if implicit else [prompt]) + answers}
    if len(kinds) > 1:
        raise ValueError(
            f"{where}: 'prompt' and {' and '.join(map(repr, keys))} must be all texts or all lists of messages; "
            "where 'chosen' and 'rejected' are whole conversations, leave 'prompt' out"
        )
    if kinds == {False}:
        if implicit:
            prompt, *answers = chat.split_shared_dialogue(*answers, where)
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
            raise ValueError(
                f"{where}: {key!r} must be the one assistant message that answers the prompt, not {len(answer)} "
                "messages; give longer conversations as 'messages'"
            )
    tools = record.get("tools")
    turns = [chat.render_last_turn(tokenizer, messages + answer, where, tools) for answer in conversations]
    return turns[0][0], [response for _, response in turns], "chat"


def _prompt_draft(tokenizer: Tokenizer, record: Mapping[str, Any], where: str) -> _Draft:
    """Draft of a prompt alone, with the text of the response people wrote where the record holds one."""
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
            prompt, answer, _ = chat.split_shared_dialogue(*pair, where)
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
    return _Draft(where=where, prompt=text, kind=kind, reference=answer, record_id=record_id)


def _field(record: Mapping[str, Any], key: str, where: str) -> Any:
    if record.get(key) is None:
        state = "is null" if key in record else "is missing"
        raise ValueError(f"{where}: field {key!r} {state}; the record has {', '.join(record) or 'no fields'}")
    return record[key]


def _check_text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {key!r} must be a text or a list of messages, not {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{where}: field {key!r} is empty")
    return value


def _margin(record: Mapping[str, Any], where: str) -> float:
    margin = record.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
        raise ValueError(f"{where}: field 'margin' must be a finite number, not {margin!r}")
    return float(margin)


def _tokenised(drafts: Iterable[_Draft], tokenizer: Tokenizer) -> Iterator[tuple[_Draft, tuple, list[tuple]]]:
    """Drafts with prompt ids and response ids, in order, tokenised in batches."""
    for kind, run in groupby(drafts, key=lambda draft: draft.kind):
        while batch := list(islice(run, _BATCH)):
            prompts = [draft.prompt for draft in batch]
            responses = [response for draft in batch for response in draft.responses]
            if kind != "ids":
                prompts = tokenizer.encode_prompts(prompts, chat=kind == "chat")
                responses = tokenizer.encode_responses(responses, chat=kind == "chat")
            of_record = iter(responses)
            for draft, prompt in zip(batch, prompts, strict=True):
                if not prompt:
                    raise ValueError(f"{draft.where}: the prompt has no tokens: its text normalises to nothing")
                yield draft, tuple(prompt), [tuple(ids) for ids in islice(of_record, len(draft.responses))]


def _fitted_groups(
    drafts: Iterable[_Draft], tokenizer: Tokenizer, limits: LengthLimits, counts: Counter[str]
) -> Iterator[tuple[_Draft, Group]]:
    """Groups within the length limits, each with its draft; what happened to the records goes into `counts`."""
    if limits.seq_length < 2:
        raise ValueError(f"--seq-length {limits.seq_length}: a prompt and a response need at least 2")
    seen = set()
    for draft, prompt, responses in _tokenised(drafts, tokenizer):
        counts["read"] += 1
        where, mask = draft.where, draft.loss_mask
        if any(response == (tokenizer.eos_id,) for response in responses):
            raise ValueError(f"{where}: a response has no tokens but EOS: its text normalises to nothing")
        fitted = fit_group(prompt, responses, bos_id=tokenizer.bos_id, limits=limits, where=where, counts=counts)
        if fitted is None:
            continue
        prompt, responses = fitted
        masks = None if mask is None else (tuple(mask[: len(responses[0])]),)
        counts["duplicates"] += fitted in seen
        seen.add(fitted)
        yield draft, Group(prompt=prompt, responses=responses, loss_masks=masks, record_id=where)
