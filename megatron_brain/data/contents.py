"""A fingerprint of what was tokenised. It tells whether two runs or ranks have the same items, and where they differ.

Counts alone do not tell: an edited record, another chat template or another date in it does not change them. So the
ids, masks and margins of every item are hashed, and the hashes of up to 64 runs of consecutive items are kept. Raw
records and the data prepared from them have the same fingerprint.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy
import xxhash

_MOST_BLOCKS = 64


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A fingerprint of the items of a corpus."""

    count: int
    """Number of items."""
    blocks: tuple[str, ...]
    """A hash for each of up to 64 runs of consecutive items, all about equally long."""
    tokenizer: str
    """Fingerprint of the tokenizer and its chat templates."""
    template_date: str = ""
    """The date that the chat template took for today's; "" where it writes no date."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "blocks": list(self.blocks)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Contents:
        """The inverse of `as_dict`."""
        return cls(**{**values, "blocks": tuple(values["blocks"])})

    def first_other_block(self, other: Contents) -> range | None:
        """Places of the first run of items that differs from another corpus, which has as many items."""
        for block, (mine, theirs) in enumerate(zip(self.blocks, other.blocks, strict=True)):
            if mine != theirs:
                return range(*_bounds(self.count)[block : block + 2])
        return None

    def difference(self, earlier: Contents, place_of: Callable[[int], str]) -> str | None:
        """A sentence that says what differs from an earlier run's corpus; None where nothing does.

        Args:
            earlier: the contents of the run that is resumed.
            place_of: gives the place of the record that an item of this corpus was made from.
        """
        if self.count != earlier.count:
            return f"there were {earlier.count:,} records, now there are {self.count:,}"
        block = self.first_other_block(earlier)
        if block is None:
            return None
        said = (
            f"of the {self.count:,} records, some between {place_of(block[0])} and {place_of(block[-1])} have other ids"
        )
        if self.template_date != earlier.template_date:
            dates = (date or "none" for date in (earlier.template_date, self.template_date))
            return "the date in the chat template was {}, now it is {} (--template-date): {}".format(*dates, said)
        if self.tokenizer != earlier.tokenizer:
            return f"the tokenizer or its chat template is another one: {said}"
        return f"{said}: they were edited, or their order was changed"


def contents_of(hashes: Sequence[int] | numpy.ndarray, *, tokenizer: str, template_date: str = "") -> Contents:
    """The fingerprint of items from their 64-bit hashes `[items]`, in order."""
    data = numpy.asarray(hashes, dtype="<u8")
    bounds = _bounds(len(data))
    blocks = (xxhash.xxh3_64_hexdigest(data[a:b].tobytes()) for a, b in pairwise(bounds))
    return Contents(count=len(data), blocks=tuple(blocks), tokenizer=tokenizer, template_date=template_date)


def hash_item(ids: Iterable[Sequence[int]], others: bytes = b"") -> int:
    """64-bit hash of an item: of its sequences of ids and of what else it holds, as bytes."""
    digest = xxhash.xxh3_64()
    for sequence in ids:
        digest.update(len(sequence).to_bytes(8, "little"))
        digest.update(array("i", sequence).tobytes())
    digest.update(others)
    return digest.intdigest()


def _bounds(count: int) -> list[int]:
    """Where the runs of items begin, and where the last one ends."""
    blocks = min(_MOST_BLOCKS, count)
    return [block * count // blocks for block in range(blocks + 1)] if blocks else [0]
