"""Computes numbers about a prepared corpus, such as lengths and duplicates, and makes a table of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy
from rich.console import Group as Lines
from rich.table import Table

from megatron_brain.data.lengths import ReadReport

_PERCENTILES = (50, 90, 99)


def length_statistics(lengths: numpy.ndarray) -> dict[str, dict[str, float]]:
    """Mean, percentiles and maximum of the lengths, in tokens.

    Args:
        lengths: `[items, sequences]`, the prompt first and then the responses, if there are any.

    Returns:
        the numbers by "prompt" and, where there are responses, by "response" (each response by itself) and "total"
        (prompt and longest response, which --seq-length limits).
    """
    columns = {"prompt": lengths[:, 0]}
    if lengths.shape[1] > 1:
        columns["response"] = lengths[:, 1:].reshape(-1)
        columns["total"] = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    return {name: _summary(column) for name, column in columns.items()}


def count_duplicates(hashes: Sequence[numpy.ndarray]) -> int:
    """Number of items that equal an earlier one, from their hashes: `[items, 2]` uint64 for each part."""
    everything = numpy.concatenate(hashes)
    return len(everything) - len(numpy.unique(everything, axis=0))


def statistics_table(title: str, counts: dict[str, int], statistics: dict[str, Any]) -> Lines:
    """A table to print of what was done with the records, and of their lengths."""
    records = Table(show_header=False)
    for name, value in dataclasses.asdict(ReadReport(**counts)).items():
        records.add_row("records " + name if name in ("read", "kept") else name.replace("_", " "), f"{value:,}")
    records.add_row("tokens", f"{statistics['tokens']:,}")
    records.add_row("bytes per token", f"{statistics['bytes_per_token']:.2f}")
    lengths = Table("tokens of", *next(iter(statistics["lengths"].values())))
    for name, summary in statistics["lengths"].items():
        lengths.add_row(name, *(f"{value:,.10g}" for value in summary.values()))
    return Lines(title, records, lengths)


def _summary(column: numpy.ndarray) -> dict[str, float]:
    values = numpy.percentile(column, _PERCENTILES, method="lower")
    return {
        "mean": round(float(column.mean()), 1),
        **{f"p{percent}": int(value) for percent, value in zip(_PERCENTILES, values)},
        "max": int(column.max()),
    }
