"""Trains SentencePiece models on text files and on records."""

from __future__ import annotations

import glob
import io
import os
import re
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_brain.data.sources import is_record_file, parse_record, raw_records
from megatron_brain.data.tokenizer import SentencePieceTokenizer
from megatron_brain.errors import ConfigError, RecordError

_TEXT_FIELDS = ("text", "prompt", "completion", "chosen", "rejected", "messages")
_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
_CHARACTERS = string.ascii_letters + string.digits + string.punctuation
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_LEAST_COVERAGE = 0.98
_HOLD_OUT_EVERY, _HOLD_OUT_MOST = 50, 2_000


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining:
    """Settings of the training. The model loses nothing: it normalises nothing and writes unknown characters as bytes.

    There is one exception: SentencePiece writes a space as U+2581, so it reads U+2581 as a space.
    """

    vocab_size: int
    """Number of pieces of the model, including the 4 special and 256 byte pieces."""

    model_type: Literal["bpe", "unigram"] = "bpe"
    """Kind of segmentation."""

    character_coverage: float = 0.9995
    """Share of the corpus's characters that get their own pieces; the others are written in bytes."""

    user_defined_symbols: Sequence[str] = ()
    """Texts that are always one token."""

    input_sentence_size: int = 0
    """Train on this many lines, drawn at random. 0: train on all lines, which are then held in memory."""

    def __post_init__(self) -> None:
        least = len(_SPECIAL) + 256
        if not least < self.vocab_size < 2**31:
            raise ConfigError(f"--vocab-size {self.vocab_size}: must be above {least}, for special tokens and bytes")
        if not _LEAST_COVERAGE <= self.character_coverage <= 1:
            raise ConfigError(
                f"--character-coverage {self.character_coverage}: must be at least {_LEAST_COVERAGE} and at most 1, as "
                "SentencePiece takes it"
            )
        if not 0 <= self.input_sentence_size < 2**63:
            raise ConfigError(
                f"--input-sentence-size {self.input_sentence_size}: must be at least 0, which takes all lines"
            )
        for place, symbol in enumerate(self.user_defined_symbols):
            if not symbol or re.search(r"\s|\u2581", symbol):
                raise ConfigError(f"--user-defined-symbols {symbol!r}: must not be empty or hold white space")
            if symbol in (*_SPECIAL, *_CHARACTERS) or _BYTE.fullmatch(symbol):
                raise ConfigError(f"--user-defined-symbols {symbol}: is always one token; leave it out")
            if symbol in self.user_defined_symbols[:place]:
                raise ConfigError(f"--user-defined-symbols {symbol}: is given twice; leave one out")


@dataclass(kw_only=True)
class Lines:
    """The lines of a corpus, read once. Some of them are held out.

    An error of the corpus ends the iteration and is kept in `error`, because SentencePiece, which iterates, drops it.
    """

    inputs: Sequence[str]
    read: int = 0
    held_out: list[str] = field(default_factory=list)
    error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for line in corpus_lines(self.inputs):
                self.read += 1
                if self.read % _HOLD_OUT_EVERY == 0 and len(self.held_out) < _HOLD_OUT_MOST:
                    self.held_out.append(line)
                else:
                    yield line
        except Exception as error:
            self.error = error


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How a tokenizer splits some lines."""

    lines: int
    bytes_per_token: float
    tokens_per_word: float
    """White space separates words."""
    byte_tokens: float
    """Share of the tokens that are single bytes, for characters without a piece."""


def train(settings: TokenizerTraining, lines: Lines) -> bytes:
    """A serialised SentencePiece model.

    Raises:
        ConfigError: the corpus cannot be read or is empty, or the vocabulary does not fit it; says which size fits.
        RecordError: a record is bad.
        OSError: a file cannot be read.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=settings.vocab_size,
            model_type=settings.model_type,
            character_coverage=settings.character_coverage,
            user_defined_symbols=list(settings.user_defined_symbols),
            input_sentence_size=settings.input_sentence_size,
            shuffle_input_sentence=settings.input_sentence_size > 0,
            # With these the model is lossless, and encodes a text the same way alone and after another text.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            # In transformers, a unigram model that cannot spell "</s>" would read it as the special piece.
            required_chars=_CHARACTERS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            # SentencePiece silently leaves out longer lines.
            max_sentence_length=2**30,
            num_threads=os.cpu_count(),
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if lines.error is None:
            raise ConfigError(_explain(str(error), settings, lines)) from error
    if lines.error is not None:
        raise lines.error
    return model.getvalue()


def corpus_lines(inputs: Sequence[str]) -> Iterator[str]:
    """The lines of text files and of the text fields of records, without blank lines and line breaks.

    Args:
        inputs: text files, sources that `load_records` takes, or globs of either.

    Raises:
        ConfigError: an input does not exist or is not UTF-8; names the place.
        RecordError: a record is bad, or has no text.
    """
    for source in inputs:
        is_file = Path(source).is_file()
        paths = [source] if is_file or Path(source).is_dir() else sorted(glob.glob(source)) or [source]
        for path in paths:
            texts = _plain(path) if Path(path).is_file() and not is_record_file(path) else _texts(path)
            for text in texts:
                yield from (line.rstrip("\r") for line in text.split("\n") if line.strip())


def measure(tokenizer: SentencePieceTokenizer, lines: Sequence[str]) -> Compression:
    """Statistics of the tokens of one or more lines."""
    ids = [i for row in tokenizer.encode_batch(lines) for i in row]
    size = sum(len(line.encode()) for line in lines)
    words = sum(len(line.split()) for line in lines)
    return Compression(
        lines=len(lines),
        bytes_per_token=size / len(ids),
        tokens_per_word=len(ids) / words,
        byte_tokens=sum(map(tokenizer.sp.is_byte, ids)) / len(ids),
    )


def _plain(path: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise ConfigError(f"{path}:{number}: not UTF-8 ({error.reason}); convert the file") from error


def _texts(source: str) -> Iterator[str]:
    """Texts of the records of a source."""
    for where, raw in raw_records(source):
        record = parse_record(where, raw)
        values = [(name, record[name]) for name in _TEXT_FIELDS if record.get(name) is not None]
        if not values:
            raise RecordError(
                where,
                "missing field",
                f"no text; a record needs one of {', '.join(_TEXT_FIELDS)}, this one has "
                f"{', '.join(record) or 'no fields'}",
            )
        for name, value in values:
            if not isinstance(value, (str, list)):
                raise RecordError(
                    where,
                    "wrong type",
                    f"field {name!r} must be a text or a list of messages, not {type(value).__name__}; remove it",
                )
            yield from _strings(value)


def _strings(value: Any) -> Iterable[str]:
    """Texts of a field: the field itself, or the contents of its messages, which may be lists of parts."""
    if isinstance(value, str):
        yield value
    for item in value if isinstance(value, list) else []:
        if isinstance(item, dict):
            yield from _strings(item.get("content") if "content" in item else item.get("text"))


def _explain(error: str, settings: TokenizerTraining, lines: Lines) -> str:
    size = settings.vocab_size
    if not lines.read:
        return f"{', '.join(lines.inputs)}: no text in it; give files with some"
    if match := re.search(r"value <= (\d+)", error):
        return f"--vocab-size {size}: the corpus has text for {match[1]} pieces at most; lower it or give more text"
    if match := re.search(r"\d+ vs (\d+)", error):
        return f"--vocab-size {size}: must be above {match[1]}, for special tokens, bytes and single characters"
    return f"SentencePiece cannot train on {', '.join(lines.inputs)}: {error}"
