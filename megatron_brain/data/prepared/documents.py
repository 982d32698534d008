"""Writes and reads items as documents on disk, in megatron-core's indexed format or in Arrow.

A document holds the token sequences of an item, the prompt first and then its responses, and a few named fields (place
of the record, margin, ...). Both formats are memory-mapped, and give the lengths of all sequences without reading one.

- indexed: `PREFIX.bin` and `PREFIX.idx` of megatron-core's `IndexedDataset`. A document has its sequences and one more
  sequence for the fields: their JSON in UTF-8, whose bytes are stored as tokens.
- arrow: `PREFIX.arrow`, one row for each document, as `datasets.Dataset.from_file` reads it.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy
import xxhash

from megatron_brain.errors import ConfigError

Format = Literal["indexed", "arrow"]
FILES: dict[Format, tuple[str, ...]] = {"indexed": (".bin", ".idx"), "arrow": (".arrow",)}
"""Endings of the files of each format."""

_MAGIC = b"MMIDIDX\x00\x00"
"""The first bytes of an index of megatron-core."""


@dataclass(frozen=True)
class Document:
    """Token sequences of one item, at least one token each, and its other fields."""

    sequences: Sequence[Sequence[int]]
    fields: Mapping[str, Any] = field(default_factory=dict)

    def with_checksum(self) -> Document:
        """The same document with a checksum among its fields."""
        return Document(self.sequences, {**self.fields, "checksum": self._checksum()})

    def is_whole(self) -> bool:
        """Whether the document matches its checksum."""
        return self.fields.get("checksum") == self._checksum()

    def _checksum(self) -> str:
        """XXH3 of 64 bits over the sequences and all other fields but null ones."""
        digest = xxhash.xxh3_64()
        for sequence in self.sequences:
            digest.update(len(sequence).to_bytes(8, "little"))
            digest.update(numpy.asarray(sequence, dtype=numpy.int64).tobytes())
        fields = {name: value for name, value in self.fields.items() if name != "checksum" and value is not None}
        digest.update(json.dumps(fields, sort_keys=True).encode())
        return digest.hexdigest()


class DocumentReader(ABC):
    """Documents at a prefix, read on demand."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of documents."""

    @abstractmethod
    def __getitem__(self, index: int) -> Document: ...

    @abstractmethod
    def lengths(self) -> numpy.ndarray:
        """Lengths in tokens of all sequences, `[documents, sequences]` integers, from the index alone."""


def open_documents(prefix: str | Path, form: Format, num_sequences: int) -> DocumentReader:
    """The documents at a prefix, of `num_sequences` sequences each.

    Raises:
        ConfigError: a file is damaged, as far as opening it shows.
    """
    return {"indexed": _IndexedReader, "arrow": _ArrowReader}[form](str(prefix), num_sequences)


def write_documents(prefix: str | Path, form: Format, documents: Sequence[Document], vocab_size: int) -> None:
    """Write documents into the files of a prefix; there may be no documents."""
    {"indexed": _write_indexed, "arrow": _write_arrow}[form](str(prefix), documents, vocab_size)


def merge_documents(prefix: str | Path, form: Format, parts: Sequence[str | Path], vocab_size: int) -> None:
    """Write the documents of several prefixes as one, in order."""
    {"indexed": _merge_indexed, "arrow": _merge_arrow}[form](str(prefix), list(map(str, parts)), vocab_size)


class _IndexedReader(DocumentReader):
    def __init__(self, prefix: str, num_sequences: int) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        index, tokens = f"{prefix}.idx", f"{prefix}.bin"
        with open(index, "rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise _damaged(index, "it does not begin as an index does")
        try:
            self._data = IndexedDataset(prefix)
        except (AssertionError, IndexError, OverflowError, ValueError) as error:
            raise _damaged(index, str(error) or "its numbers contradict each other") from error
        told = int(self._data.sequence_lengths.sum(dtype=numpy.int64)) * self._data.index.dtype_size
        if told != os.path.getsize(tokens):
            raise _damaged(index, f"its sequences are {told:,} bytes, {tokens} has {os.path.getsize(tokens):,}")
        self._stride, self._tokens = num_sequences + 1, tokens

    def __len__(self) -> int:
        return len(self._data) // self._stride

    def __getitem__(self, index: int) -> Document:
        first = range(len(self))[index] * self._stride
        try:
            arrays: Any = self._data[first : first + self._stride]
            *sequences, fields = arrays
            named = json.loads(fields.tobytes())
        except ValueError as error:
            raise _damaged(self._tokens, f"document {index}: {error}") from error
        return Document([sequence.tolist() for sequence in sequences], named)

    def lengths(self) -> numpy.ndarray:
        # This must be a copy: the index is unmapped with its reader, even if somebody still uses a view of it.
        lengths: numpy.ndarray = self._data.sequence_lengths.reshape(len(self), self._stride)[:, :-1].copy()
        return lengths


def _damaged(file: str, problem: object) -> ConfigError:
    return ConfigError(f"{file} is damaged ({problem}): copy it again, or prepare the records again")


def _token_type(vocab_size: int) -> type[numpy.number]:
    from megatron.core.datasets.indexed_dataset import DType

    token_type: type[numpy.number] = DType.optimal_dtype(vocab_size)
    return token_type


def _write_indexed(prefix: str, documents: Sequence[Document], vocab_size: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    dtype = _token_type(vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        sequences = [numpy.asarray(sequence, dtype=dtype) for sequence in document.sequences]
        sequences.append(_as_tokens(document.fields, dtype))
        tokens, lengths = numpy.concatenate(sequences), [len(sequence) for sequence in sequences]
        builder.add_document(tokens, lengths)  # type: ignore[arg-type]  # It takes arrays; its annotation says tensors.
    builder.finalize(f"{prefix}.idx")


def _as_tokens(fields: Mapping[str, Any], dtype: type[numpy.number]) -> numpy.ndarray:
    """Fields as JSON in UTF-8, its bytes as an array of tokens. Spaces, which JSON ignores, fill the last token."""
    text = json.dumps(dict(fields), ensure_ascii=False, separators=(",", ":")).encode()
    size = numpy.dtype(dtype).itemsize
    return numpy.frombuffer(text.ljust(-(-len(text) // size) * size), dtype=dtype)


def _merge_indexed(prefix: str, parts: Sequence[str], vocab_size: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=_token_type(vocab_size))
    for part in parts:
        builder.add_index(part)
    builder.finalize(f"{prefix}.idx")


class _ArrowReader(DocumentReader):
    def __init__(self, prefix: str, num_sequences: int) -> None:
        import datasets

        try:
            self._data = datasets.Dataset.from_file(f"{prefix}.arrow")
        except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError.
            raise _damaged(f"{prefix}.arrow", error) from error
        self._num_responses = num_sequences - 1

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Document:
        row = self._data[range(len(self))[index]]
        sequences = [row.pop("prompt"), *row.pop("responses")]
        return Document(sequences, {name: value for name, value in row.items() if value is not None})

    def lengths(self) -> numpy.ndarray:
        import pyarrow.compute

        table = self._data.data
        prompts = pyarrow.compute.list_value_length(table["prompt"]).to_numpy()
        responses = pyarrow.compute.list_value_length(pyarrow.compute.list_flatten(table["responses"])).to_numpy()
        return numpy.column_stack([prompts, responses.reshape(len(self), self._num_responses)])


def _arrow_schema() -> Any:
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    return pyarrow.schema(
        {
            "prompt": ids,
            "responses": pyarrow.list_(ids),
            "record_id": pyarrow.string(),
            "row": pyarrow.int64(),
            "loss_mask": ids,
            "margin": pyarrow.float64(),
            "text": pyarrow.string(),
            "reference": pyarrow.string(),
            "chat": pyarrow.bool_(),
            "others": pyarrow.string(),
            "checksum": pyarrow.string(),
        }
    )


def _write_arrow(prefix: str, documents: Sequence[Document], vocab_size: int) -> None:
    import pyarrow

    rows = [
        {"prompt": document.sequences[0], "responses": document.sequences[1:], **document.fields}
        for document in documents
    ]
    with pyarrow.ipc.new_stream(f"{prefix}.arrow", _arrow_schema()) as writer:
        writer.write_table(pyarrow.Table.from_pylist(rows, schema=_arrow_schema()))


def _merge_arrow(prefix: str, parts: Sequence[str], vocab_size: int) -> None:
    import pyarrow

    with pyarrow.ipc.new_stream(f"{prefix}.arrow", _arrow_schema()) as writer:
        for part in parts:
            try:
                with pyarrow.memory_map(f"{part}.arrow") as source, pyarrow.ipc.open_stream(source) as batches:
                    for batch in batches:
                        writer.write_batch(batch)
            except pyarrow.ArrowException as error:
                raise _damaged(f"{part}.arrow", error) from error
