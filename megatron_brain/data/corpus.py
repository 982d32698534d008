"""Reads what a stage trains on: raw records, or prepared data of the same items."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from megatron_brain.data.contents import Contents
from megatron_brain.data.groups import Group
from megatron_brain.data.prepared.info import prepared_prefix
from megatron_brain.data.prepared.read import PreparedItems, open_prepared
from megatron_brain.data.records import Item, PreferencePair, Prompt, RecordReader, read_records
from megatron_brain.data.sources import load_records


@dataclass(frozen=True)
class Corpus(Generic[Item]):
    """The items of a source."""

    items: Sequence[Item]
    contents: Contents
    """Fingerprint of the items."""
    summary: str
    """A line that names the source and says how many records were kept, cut or dropped."""


def read_corpus(
    source: str, reader: RecordReader[Item], *, split: str | None = None, limit: int | None = None
) -> Corpus[Item]:
    """The items of a source. They are made at once from raw records, or on demand from prepared data.

    Args:
        source: prefix of prepared data, or what `sources.load_records` reads.
        reader: makes the stage's items of records.
        split: split of a saved or hub data set.
        limit: use only the first so many records.

    Raises:
        ConfigError: there are no records, or the prepared data does not fit the run; says the cure.
        RecordError: a bad record.
    """
    prefix = prepared_prefix(source)
    if prefix is None:
        read, report = read_records(reader, load_records(source, split, limit))
        return Corpus(read, reader.contents(list(map(reader.hash, read))), f"{source}: {report}")
    items, report, contents = open_prepared(prefix, reader, limit=limit)
    return Corpus(items, contents, f"{source}: prepared: {report}; {len(items):,} used")


def place_of(item: Group | PreferencePair | Prompt) -> str:
    """Place of the record that an item was made from, or the record's id."""
    return item.group.record_id if isinstance(item, PreferencePair) else item.record_id


def num_tokens(groups: Sequence[Group]) -> list[int]:
    """Tokens of each group in a packed sequence, its prompt counted once."""
    if isinstance(groups, PreparedItems):
        return groups.num_tokens()
    return [group.num_tokens(shared_prefix=True) for group in groups]
