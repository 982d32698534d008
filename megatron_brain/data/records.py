"""Makes tokenised groups, preference pairs and prompts of records.

A :class:`RecordReader` knows what one stage makes of one record, in two steps. It drafts the record (checks its fields
and renders its chats), and, once the draft is tokenised, fits it into the length limits. Stages and the tools that
prepare or check data all use these two steps, so all of them find the same errors. The formats are TRL's.
"""

from __future__ import annotations

import json
import logging
import struct
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import numpy

from megatron_brain.data.contents import Contents, contents_of, hash_item
from megatron_brain.data.conversations import UnusableDialogueError
from megatron_brain.data.drafts import Draft, draft_demonstration, draft_preference, draft_prompt
from megatron_brain.data.groups import Group
from megatron_brain.data.json_values import require_json
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
from megatron_brain.data.tokenizer.base import Before
from megatron_brain.data.tokenizer.fingerprint import tokenizer_fingerprint
from megatron_brain.errors import ConfigError, RecordError, UserError

log = logging.getLogger(__name__)

_BATCH = 1000
_MOST_NAMED = 5
"""Records that are left out and that the log names."""

Item = TypeVar("Item")
ItemKind = Literal["group", "pair", "prompt"]


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """A group whose two responses are (chosen, rejected), and the margin by which chosen should win."""

    group: Group
    margin: float


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt to sample responses for: its ids, its text (before any truncation) and the reference, if known.

    `record_id` is the record's own ``id`` field, or else the record's place.
    """

    tokens: tuple[int, ...]
    text: str
    reference: str | None
    record_id: str
    chat: bool = False
    """Whether a chat template rendered the prompt. If so, a response to it ends a turn."""
    fields: Mapping[str, Any] | None = None
    """The other fields of the record, as JSON values; None where nothing in the run reads them."""

    @property
    def record(self) -> dict[str, Any]:
        """What a reward function or server gets as the record: `id`, the other fields, and as `completion` the text of
        the reference, if there is one. Empty where the fields are not kept."""
        if self.fields is None:
            return {}
        completion = {} if self.reference is None else {"completion": self.reference}
        return {"id": self.record_id, **self.fields, **completion}


class Tokenised(NamedTuple):
    """A draft with the ids of its prompt and responses, before any is cut."""

    draft: Draft
    prompt: Ids
    responses: list[Ids]


class RecordReader(ABC, Generic[Item]):
    """What a stage makes of one record.

    Args:
        tokenizer: the model's tokenizer.
        limits: length limits and the rule for overlong records.

    Raises:
        ConfigError: the limits leave no room for a prompt and a response.
    """

    stage: ClassVar[str]
    """The stage whose records these are."""
    item_kind: ClassVar[ItemKind]
    """The kind of the items: `Group`, `PreferencePair` or `Prompt`."""
    num_responses: ClassVar[int]
    """Number of responses of an item."""
    keeps_fields: bool = False
    """Whether items hold the fields of their records that the stage itself does not read."""

    def __init__(self, tokenizer: Tokenizer, limits: LengthLimits) -> None:
        if limits.seq_length < 2:
            raise ConfigError(f"--seq-length {limits.seq_length}: a prompt and a response need at least 2")
        self.tokenizer, self.limits = tokenizer, limits

    @abstractmethod
    def draft(self, where: str, record: Mapping[str, Any]) -> Draft:
        """Check the fields of a record and render its chats.

        Raises:
            RecordError: the record cannot be used; names the place and the cure.
        """

    @abstractmethod
    def fit(self, tokenised: Tokenised, counts: Counter[str]) -> Item | None:
        """The item within the length limits, or None where it is dropped; `counts` are those of a `ReadReport`.

        Raises:
            RecordError: the record is overlong and the rule is "error", or nothing is left of a text.
        """

    @abstractmethod
    def ids(self, item: Item) -> tuple[Ids, ...]:
        """Ids of the prompt and the responses of an item. Items with equal ids are duplicates."""

    @abstractmethod
    def hash(self, item: Item) -> int:
        """64-bit hash of everything that an item gives to the stage."""

    def settings(self) -> dict[str, Any]:
        """The settings, by flag name, that the items depend on besides records and tokenizer."""
        names = ("seq_length", "max_prompt_length", "max_response_length", "overlong")
        return {**{name: getattr(self.limits, name) for name in names}, **self._date()}

    def contents(self, hashes: Sequence[int] | numpy.ndarray) -> Contents:
        """The fingerprint of items from their hashes, in order."""
        date = self._date().get("template_date", "")
        return contents_of(hashes, tokenizer=tokenizer_fingerprint(self.tokenizer), template_date=date)

    def _date(self) -> dict[str, str]:
        """The date that the chat template takes for today's, if it writes one."""
        tokenizer = self.tokenizer
        return {"template_date": tokenizer.template_time.isoformat()} if tokenizer.uses_clock else {}

    def tokenise(
        self, records: Iterable[Record], on_error: Callable[[str, UserError], None] | None = None
    ) -> Iterator[Tokenised]:
        """Drafts of the records, tokenised in batches, in order.

        Args:
            records: any number of records, read on demand.
            on_error: gets the place and the error of a record that cannot be drafted, which is then left out. Without
                `on_error` the error is raised.
        """
        for kind, run in groupby(self._drafts(records, on_error), key=lambda draft: draft.kind):
            while batch := list(islice(run, _BATCH)):
                prompts = [draft.prompt for draft in batch]
                responses = [response for draft in batch for response in draft.responses]
                if kind != "ids":
                    prompts = self.tokenizer.encode_prompts(prompts, chat=kind == "chat")
                    before = [
                        Before(draft.prompt, ids[-1] if ids else None)
                        for draft, ids in zip(batch, prompts, strict=True)
                        for _ in draft.responses
                    ]
                    responses = self.tokenizer.encode_responses(responses, before, chat=kind == "chat")
                of_record = iter(responses)
                for draft, prompt in zip(batch, prompts, strict=True):
                    ids = [tuple(response) for response in islice(of_record, len(draft.responses))]
                    yield Tokenised(draft, tuple(prompt), ids)

    def _drafts(self, records: Iterable[Record], on_error: Callable[[str, UserError], None] | None) -> Iterator[Draft]:
        for where, record in records:
            try:
                draft = self.draft(where, record)
            except UnusableDialogueError as error:
                draft = Draft(where=where, prompt="", left_out=error.message)
            except UserError as error:
                if on_error is None:
                    raise
                on_error(where, error)
                continue
            yield draft

    def _fit_group(self, tokenised: Tokenised, counts: Counter[str]) -> Group | None:
        draft, prompt, responses = tokenised
        where, mask = draft.where, draft.loss_mask
        counts["read"] += 1
        if draft.left_out is not None:
            counts["dropped_dialogues"] += 1
            return None
        _require_tokens(draft, prompt)
        if any(response == (self.tokenizer.eos_id,) for response in responses):
            raise RecordError(
                where, "empty response", "a response has no tokens but EOS: its text normalises to nothing"
            )
        cut: Counter[str] = Counter()
        fitted = fit_group(prompt, responses, bos_id=self.tokenizer.bos_id, limits=self.limits, where=where, counts=cut)
        if fitted is not None and mask is not None and not any(mask[: len(fitted[1][0])]):
            counts["dropped_unlearned"] += 1
            return None
        counts.update(cut)
        if fitted is None:
            return None
        prompt, kept = fitted
        masks = None if mask is None else (tuple(mask[: len(kept[0])]),)
        return Group(prompt=prompt, responses=kept, loss_masks=masks, record_id=where)


class SFTReader(RecordReader[Group]):
    """Groups of one response to learn.

    Records: ``{"prompt": text, "completion": text}``, the same with lists of messages, or ``{"messages": [...]}``
    (the response is the last assistant turn; with `multi_turn_loss` the loss counts every assistant turn). Of a
    preference, as the reward stage takes it, the chosen answer is learned.
    """

    stage, item_kind, num_responses = "sft", "group", 1

    def __init__(self, tokenizer: Tokenizer, limits: LengthLimits, *, multi_turn_loss: bool = False) -> None:
        super().__init__(tokenizer, limits)
        self.multi_turn_loss = multi_turn_loss

    def draft(self, where: str, record: Mapping[str, Any]) -> Draft:
        return draft_demonstration(self.tokenizer, record, where, multi_turn_loss=self.multi_turn_loss)

    def fit(self, tokenised: Tokenised, counts: Counter[str]) -> Group | None:
        return self._fit_group(tokenised, counts)

    def ids(self, item: Group) -> tuple[Ids, ...]:
        return item.prompt, *item.responses

    def hash(self, item: Group) -> int:
        return hash_item(self.ids(item), bytes(item.loss_masks[0]) if item.loss_masks else b"")

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "multi_turn_loss": self.multi_turn_loss}


class PreferenceReader(RecordReader[PreferencePair]):
    """Pairs of responses; the first is preferred.

    Records: ``{"prompt", "chosen", "rejected"}``, each a text or a list of messages, and optionally a number
    ``margin``. Without ``prompt``, chosen and rejected are whole conversations and the beginning they share is the
    prompt.
    """

    stage, item_kind, num_responses = "reward", "pair", 2

    def draft(self, where: str, record: Mapping[str, Any]) -> Draft:
        return draft_preference(self.tokenizer, record, where)

    def fit(self, tokenised: Tokenised, counts: Counter[str]) -> PreferencePair | None:
        group = self._fit_group(tokenised, counts)
        if group is None:
            return None
        counts["identical_pairs"] += group.responses[0] == group.responses[1]
        return PreferencePair(group=group, margin=tokenised.draft.margin)

    def ids(self, item: PreferencePair) -> tuple[Ids, ...]:
        return item.group.prompt, *item.group.responses

    def hash(self, item: PreferencePair) -> int:
        return hash_item(self.ids(item), struct.pack("<d", item.margin))


class PromptReader(RecordReader[Prompt]):
    """Prompts to sample responses for.

    Records: any of the formats above. The reference is ``completion``, ``chosen`` or the last assistant message, if
    any. A prompt may have `max_prompt_length` tokens and must leave `room` tokens of `seq_length` for a response.
    With `keeps_fields` it holds the other fields of its record, for rewards that read them.
    """

    stage, item_kind, num_responses = "brain", "prompt", 0

    def __init__(
        self, tokenizer: Tokenizer, limits: LengthLimits, *, room: int = 1, keeps_fields: bool = False
    ) -> None:
        super().__init__(tokenizer, limits)
        self.room, self.keeps_fields = room, keeps_fields
        left = limits.seq_length - room
        self.longest = min(left, limits.max_prompt_length or left)
        if self.longest < 1:
            raise ConfigError(
                f"--seq-length {limits.seq_length} leaves no room for a prompt beside --max-new-tokens {room}: raise "
                "the one or lower the other"
            )

    def draft(self, where: str, record: Mapping[str, Any]) -> Draft:
        draft = draft_prompt(self.tokenizer, record, where)
        if self.keeps_fields:
            for name, value in draft.fields.items():
                require_json(value, f"field {name!r}, which the reward reads,", where)
        return draft

    def fit(self, tokenised: Tokenised, counts: Counter[str]) -> Prompt | None:
        draft, prompt, _ = tokenised
        counts["read"] += 1
        if draft.left_out is not None:
            counts["dropped_dialogues"] += 1
            return None
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
            fields=draft.fields if self.keeps_fields else None,
        )

    def ids(self, item: Prompt) -> tuple[Ids, ...]:
        return (item.tokens,)

    def hash(self, item: Prompt) -> int:
        fields = json.dumps(item.fields, sort_keys=True) if self.keeps_fields else ""
        return hash_item(self.ids(item), ((item.reference or "") + fields).encode())

    def settings(self) -> dict[str, Any]:
        names = ("seq_length", "max_prompt_length", "overlong")
        limits = {name: getattr(self.limits, name) for name in names}
        return {**limits, "max_new_tokens": self.room, **self._date()}


def read_records(reader: RecordReader[Item], records: Iterable[Record]) -> tuple[list[Item], ReadReport]:
    """The items that a stage makes of records, and the counts of what was done with the records.

    Raises:
        RecordError: a record is bad or overlong; names its place and the cure.
        ConfigError: no record is left.
    """
    counts: Counter[str] = Counter()
    items, seen = [], set()
    for tokenised in reader.tokenise(records):
        item = reader.fit(tokenised, counts)
        if (reason := tokenised.draft.left_out) is not None and counts["dropped_dialogues"] <= _MOST_NAMED:
            log.warning("%s is left out: %s", tokenised.draft.where, reason)
        if item is not None:
            items.append(item)
            ids = reader.ids(item)
            counts["duplicates"] += ids in seen
            seen.add(ids)
    if counts["dropped_dialogues"] > _MOST_NAMED:
        log.warning("%d dialogues are left out; tools/check_data.py names all", counts["dropped_dialogues"])
    return items, make_report(counts, len(items), reader.limits)


def _require_tokens(draft: Draft, prompt: Ids) -> None:
    if not prompt:
        raise RecordError(draft.where, "empty prompt", "the prompt has no tokens: its text normalises to nothing")
