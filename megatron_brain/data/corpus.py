"""What stages read: raw records, or prepared data of the same items."""

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
    """Their fingerprint."""
    summary: str
    """The source and what became of its records, in words."""


def read_corpus(
    source: str, reader: RecordReader[Item], *, split: str | None = None, limit: int | None = None
) -> Corpus[Item]:
    """The items of a source, made of raw records at once or of prepared data on demand.

    Args:
        source: prefix of prepared data, or what `sources.load_records` reads.
        reader: what the stage makes of a record.
        split: of a saved or hub data set.
        limit: use only the first so many records.

    Raises:
        ConfigError: no records, or prepared data that does not fit the run, with the cure.
        RecordError: a bad record.
    """
    prefix = prepared_prefix(source)
    if prefix is None:
        read, report = read_records(reader, load_records(source, split, limit))
        return Corpus(read, reader.contents(list(map(reader.hash, read))), f"{source}: {report}")
    items, report, contents = open_prepared(prefix, reader, limit=limit)
    return Corpus(items, contents, f"{source}: prepared: {report}; {len(items):,} used")


def place_of(item: Group | PreferencePair | Prompt) -> str:
    """Place of the record an item was made of, or its id."""
    return item.group.record_id if isinstance(item, PreferencePair) else item.record_id


def num_tokens(groups: Sequence[Group]) -> list[int]:
    """Tokens of each group in a packed sequence, its prompt counted once."""
    if isinstance(groups, PreparedItems):
        return groups.num_tokens()
    return [group.num_tokens(shared_prefix=True) for group in groups]
