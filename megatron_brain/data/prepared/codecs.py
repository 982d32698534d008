"""Turns items into documents and back."""

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain, groupby, repeat
from typing import Any, Generic

from megatron_brain.data.groups import Group
from megatron_brain.data.json_values import require_json
from megatron_brain.data.prepared.documents import Document
from megatron_brain.data.records import Item, ItemKind, PreferencePair, Prompt
from megatron_brain.errors import RecordError


class Codec(ABC, Generic[Item]):
    """Turns items of one kind into documents and back."""

    @abstractmethod
    def encode(self, item: Item, row: int, others: Mapping[str, Any]) -> Document:
        """The document of an item, made from record `row` of its source, counted from 0, which has these other fields.

        Where JSON cannot write one of the other fields, the document has none of them.
        """

    @abstractmethod
    def decode(self, document: Document) -> Item: ...


class _GroupCodec(Codec[Group]):
    def encode(self, item: Group, row: int, others: Mapping[str, Any]) -> Document:
        fields: dict[str, Any] = {"record_id": item.record_id, "row": row}
        if item.loss_masks is not None:
            fields["loss_mask"] = _run_lengths(item.loss_masks[0])
        return Document([item.prompt, *item.responses], fields)

    def decode(self, document: Document) -> Group:
        prompt, *responses = map(tuple, document.sequences)
        runs = document.fields.get("loss_mask")
        return Group(
            prompt=prompt,
            responses=tuple(responses),
            loss_masks=None if runs is None else (_from_run_lengths(runs),),
            record_id=document.fields["record_id"],
        )


class _PairCodec(Codec[PreferencePair]):
    def encode(self, item: PreferencePair, row: int, others: Mapping[str, Any]) -> Document:
        fields = {"record_id": item.group.record_id, "row": row, "margin": item.margin}
        return Document([item.group.prompt, *item.group.responses], fields)

    def decode(self, document: Document) -> PreferencePair:
        return PreferencePair(group=CODECS["group"].decode(document), margin=document.fields["margin"])


class _PromptCodec(Codec[Prompt]):
    def encode(self, item: Prompt, row: int, others: Mapping[str, Any]) -> Document:
        fields = {"record_id": item.record_id, "row": row, "text": item.text, "chat": item.chat}
        if item.reference is not None:
            fields["reference"] = item.reference
        with contextlib.suppress(RecordError):
            fields["others"] = json.dumps(require_json(dict(others), "fields", item.record_id), ensure_ascii=False)
        return Document([item.tokens], fields)

    def decode(self, document: Document) -> Prompt:
        fields, others = document.fields, document.fields.get("others")
        return Prompt(
            tokens=tuple(document.sequences[0]),
            text=fields["text"],
            reference=fields.get("reference"),
            record_id=fields["record_id"],
            chat=fields["chat"],
            fields=None if others is None else json.loads(others),
        )


CODECS: dict[ItemKind, Codec[Any]] = {"group": _GroupCodec(), "pair": _PairCodec(), "prompt": _PromptCodec()}
"""The codecs, by `RecordReader.item_kind`."""


def _run_lengths(mask: Sequence[bool]) -> list[int]:
    """Lengths of the runs of equal values. The first run is of True and may have length 0."""
    runs = [len(list(run)) for _, run in groupby(mask)]
    return runs if mask[0] else [0, *runs]


def _from_run_lengths(runs: Sequence[int]) -> tuple[bool, ...]:
    return tuple(chain.from_iterable(repeat(place % 2 == 0, length) for place, length in enumerate(runs)))
