"""Records made into tokenised groups, preference pairs and prompts.

A :class:`RecordReader` knows what one stage makes of one record, in two steps: it drafts the record (fields checked,
chats rendered), and, once that is tokenised, fits it into the length limits. Whoever reads a data set, for a stage,
to prepare it or to check it, goes through these two and so finds the same errors. Formats are TRL's.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

from megatron_brain.data import chat
from megatron_brain.data.errors import RecordError
from megatron_brain.data.groups import Group
from megatron_brain.data.lengths import (
    Ids,
    LengthLimits,
    ReadReport,
    cut_prompt,
    fit_group,
    keep_overlong,
    make_report,
)
from megatron_brain.data.sources import Record
from megatron_brain.data.tokenizer import Tokenizer

_BATCH = 1000
_LARGEST = sys.float_info.max

Item = TypeVar("Item")


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


class Tokenised(NamedTuple):
    """A draft with the ids of its prompt and responses, before any is cut."""

    draft: Draft
    prompt: Ids
    responses: list[Ids]


class RecordReader(ABC, Generic[Item]):
    """What a stage makes of one record.

    Args:
        tokenizer: of the model.
        limits: length limits and the rule for overlong records.

    Raises:
        ValueError: the limits leave no room for a prompt and a response.
    """

    stage: ClassVar[str]
    """The stage whose records these are."""
    num_responses: ClassVar[int]
    """Responses of an item."""

    def __init__(self, tokenizer: Tokenizer, limits: LengthLimits) -> None:
        if limits.seq_length < 2:
            raise ValueError(f"--seq-length {limits.seq_length}: a prompt and a response need at least 2")
        self.tokenizer, self.limits = tokenizer, limits

    @abstractmethod
    def draft(self, where: str, record: Mapping[str, Any]) -> Draft:
        """Check the fields of a record and render its chats.

        Raises:
            ValueError: naming the place and the cure.
        """

    @abstractmethod
    def fit(self, tokenised: Tokenised, counts: Counter[str]) -> Item | None:
        """The item within the length limits, or None where it is dropped; `counts` are those of a `ReadReport`.

        Raises:
            RecordError: overlong under "error", or nothing left of a text.
        """

    @abstractmethod
    def ids(self, item: Item) -> tuple[Ids, ...]:
        """Prompt and responses of an item; duplicates are items whose ids are equal."""

    def settings(self) -> dict[str, Any]:
        """What the items depend on besides records and tokenizer, by the name of the flag."""
        names = ("seq_length", "max_prompt_length", "max_response_length", "overlong")
        return {name: getattr(self.limits, name) for name in names}

    def tokenise(
        self, records: Iterable[Record], on_error: Callable[[str, ValueError], None] | None = None
    ) -> Iterator[Tokenised]:
        """Drafts of the records, tokenised in batches, in order.

        Args:
            records: any number, read on demand.
            on_error: gets place and error of a record that cannot be drafted, which is then left out; without, the
                error is raised.
        """
        for kind, run in groupby(self._drafts(records, on_error), key=lambda draft: draft.kind):
            while batch := list(islice(run, _BATCH)):
                prompts = [draft.prompt for draft in batch]
                responses = [response for draft in batch for response in draft.responses]
                if kind != "ids":
                    prompts = self.tokenizer.encode_prompts(prompts, chat=kind == "chat")
                    responses = self.tokenizer.encode_responses(responses, chat=kind == "chat")
                of_record = iter(responses)
                for draft, prompt in zip(batch, prompts, strict=True):
                    ids = [tuple(response) for response in islice(of_record, len(draft.responses))]
                    yield Tokenised(draft, tuple(prompt), ids)

    def _drafts(self, records: Iterable[Record], on_error: Callable[[str, ValueError], None] | None) -> Iterator[Draft]:
        for where, record in records:
            try:
                draft = self.draft(where, record)
            except ValueError as error:
                if on_error is None:
                    raise
                on_error(where, error)
                continue
            yield draft

    def _fit_group(self, tokenised: Tokenised, counts: Counter[str]) -> Group | None:
        draft, prompt, responses = tokenised
        where, mask = draft.where, draft.loss_mask
        counts["read"] += 1
        _require_tokens(draft, prompt)
        if any(response == (self.tokenizer.eos_id,) for response in responses):
            raise RecordError(
                where, "empty response", "a response has no tokens but EOS: its text normalises to nothing"
            )
        fitted = fit_group(
            prompt, responses, bos_id=self.tokenizer.bos_id, limits=self.limits, where=where, counts=counts
        )
        if fitted is None:
            return None
        prompt, responses = fitted
        masks = None if mask is None else (tuple(mask[: len(responses[0])]),)
        return Group(prompt=prompt, responses=responses, loss_masks=masks, record_id=where)


class SFTReader(RecordReader[Group]):
    """Groups of one response to learn.

    Records: ``{"prompt": text, "completion": text}``, the same with lists of messages, or ``{"messages": [...]}``
    (the response is the last assistant turn; with `multi_turn_loss` the loss counts every assistant turn).
    """

    stage, num_responses = "sft", 1

    def __init__(self, tokenizer: Tokenizer, limits: LengthLimits, *, multi_turn_loss: bool = False) -> None:
        super().__init__(tokenizer, limits)
        self.multi_turn_loss = multi_turn_loss

    def draft(self, where: str, record: Mapping[str, Any]) -> Draft:
        if "messages" not in record:
            prompt, (response,), kind = _prompt_and_answers(self.tokenizer, record, ["completion"], where)
            return Draft(where=where, prompt=prompt, responses=[response], kind=kind)
        messages, tools = chat.check_messages(record["messages"], "messages", where), record.get("tools")
        if self.multi_turn_loss:
            prompt, response, mask = chat.encode_all_turns(self.tokenizer, messages, where, tools)
            return Draft(where=where, prompt=prompt, responses=[response], kind="ids", loss_mask=mask)
        prompt, response = chat.render_last_turn(self.tokenizer, messages, where, tools)
        return Draft(where=where, prompt=prompt, responses=[response], kind="chat")

    def fit(self, tokenised: Tokenised, counts: Counter[str]) -> Group | None:
        return self._fit_group(tokenised, counts)

    def ids(self, item: Group) -> tuple[Ids, ...]:
        return item.prompt, *item.responses

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "multi_turn_loss": self.multi_turn_loss}


class PreferenceReader(RecordReader[PreferencePair]):
    """Pairs of responses of which the first is preferred.

    Records: ``{"prompt", "chosen", "rejected"}``, each a text or a list of messages, and optionally a number
    ``margin``. Without ``prompt``, chosen and rejected are whole conversations and the prompt is what they share.
    """

    stage, num_responses = "reward", 2

    def draft(self, where: str, record: Mapping[str, Any]) -> Draft:
        prompt, responses, kind = _prompt_and_answers(self.tokenizer, record, ["chosen", "rejected"], where)
        return Draft(where=where, prompt=prompt, responses=responses, kind=kind, margin=_margin(record, where))

    def fit(self, tokenised: Tokenised, counts: Counter[str]) -> PreferencePair | None:
        group = self._fit_group(tokenised, counts)
        if group is None:
            return None
        counts["identical_pairs"] += group.responses[0] == group.responses[1]
        return PreferencePair(group=group, margin=tokenised.draft.margin)

    def ids(self, item: PreferencePair) -> tuple[Ids, ...]:
        return item.group.prompt, *item.group.responses


class PromptReader(RecordReader[Prompt]):
    """Prompts to sample responses for.

    Records: any of the formats above; the reference is ``completion``, ``chosen`` or the last assistant message,
    where there is one. A prompt may have `max_prompt_length` tokens and must leave `room` tokens of `seq_length` for a
    response.
    """

    stage, num_responses = "brain", 0

    def __init__(self, tokenizer: Tokenizer, limits: LengthLimits, *, room: int = 1) -> None:
        super().__init__(tokenizer, limits)
        self.room = room
        left = limits.seq_length - room
        self.longest = min(left, limits.max_prompt_length or left)
        if self.longest < 1:
            raise ValueError(f"--seq-length {limits.seq_length} leaves no room for a prompt and a response")

    def draft(self, where: str, record: Mapping[str, Any]) -> Draft:
        return _prompt_draft(self.tokenizer, record, where)

    def fit(self, tokenised: Tokenised, counts: Counter[str]) -> Prompt | None:
        draft, prompt, _ = tokenised
        counts["read"] += 1
        _require_tokens(draft, prompt)
        if len(prompt) > self.longest:
            what = f"prompt of {len(prompt)} tokens where {self.longest} leave room for a response"
            if not keep_overlong(what, limits=self.limits, where=draft.where, counts=counts):
                return None
            counts["truncated_prompt"] += 1
        return Prompt(
            tokens=cut_prompt(prompt, self.longest, self.tokenizer.bos_id),
            text=draft.prompt,
            reference=draft.reference,
            record_id=draft.record_id,
            chat=draft.kind == "chat",
        )

    def ids(self, item: Prompt) -> tuple[Ids, ...]:
        return (item.tokens,)

    def settings(self) -> dict[str, Any]:
        names = ("seq_length", "max_prompt_length", "overlong")
        return {**{name: getattr(self.limits, name) for name in names}, "max_new_tokens": self.room}


def read_records(reader: RecordReader[Item], records: Iterable[Record]) -> tuple[list[Item], ReadReport]:
    """The items a stage makes of records, and what became of the records.

    Raises:
        ValueError: a bad or overlong record, or none left, naming its place and the cure.
    """
    counts: Counter[str] = Counter()
    items, seen = [], set()
    for tokenised in reader.tokenise(records):
        item = reader.fit(tokenised, counts)
        if item is not None:
            items.append(item)
            ids = reader.ids(item)
            counts["duplicates"] += ids in seen
            seen.add(ids)
    return items, make_report(counts, len(items), reader.limits)


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


def _prompt_draft(tokenizer: Tokenizer, record: Mapping[str, Any], where: str) -> Draft:
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


def _require_tokens(draft: Draft, prompt: Ids) -> None:
    if not prompt:
        raise RecordError(draft.where, "empty prompt", "the prompt has no tokens: its text normalises to nothing")
