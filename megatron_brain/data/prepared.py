"""Prepared data: items tokenised beforehand by ``tools/preprocess_data.py``, memory-mapped and made on demand.

`PREFIX.json` says what they are, and is written last: without it there is nothing to read. The items equal those that
the stage would make of the raw records, but that the length limits are the ones they were prepared with.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, groupby, repeat
from pathlib import Path
from typing import Any, Generic

from megatron_brain.config.errors import ConfigError
from megatron_brain.data.documents import FILES, Document, DocumentReader, Format, open_documents
from megatron_brain.data.groups import Group
from megatron_brain.data.lengths import ReadReport
from megatron_brain.data.records import Item, PreferencePair, Prompt, RecordReader
from megatron_brain.data.tokenizer_fingerprint import tokenizer_fingerprint
from megatron_brain.files import write_whole

FORMAT_VERSION = 1
_TOOL = "tools/preprocess_data.py"


class Codec(ABC, Generic[Item]):
    """Items of one stage as documents and back."""

    @abstractmethod
    def encode(self, item: Item, row: int) -> Document:
        """The item of record `row` of its source, counted from 0."""

    @abstractmethod
    def decode(self, document: Document) -> Item: ...


class _GroupCodec(Codec[Group]):
    def encode(self, item: Group, row: int) -> Document:
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
    def encode(self, item: PreferencePair, row: int) -> Document:
        fields = {"record_id": item.group.record_id, "row": row, "margin": item.margin}
        return Document([item.group.prompt, *item.group.responses], fields)

    def decode(self, document: Document) -> PreferencePair:
        return PreferencePair(group=CODECS["sft"].decode(document), margin=document.fields["margin"])


class _PromptCodec(Codec[Prompt]):
    def encode(self, item: Prompt, row: int) -> Document:
        fields = {"record_id": item.record_id, "row": row, "text": item.text, "chat": item.chat}
        if item.reference is not None:
            fields["reference"] = item.reference
        return Document([item.tokens], fields)

    def decode(self, document: Document) -> Prompt:
        fields = document.fields
        return Prompt(
            tokens=tuple(document.sequences[0]),
            text=fields["text"],
            reference=fields.get("reference"),
            record_id=fields["record_id"],
            chat=fields["chat"],
        )


CODECS: dict[str, Codec] = {"sft": _GroupCodec(), "reward": _PairCodec(), "brain": _PromptCodec()}
"""By the stage whose records they are."""


@dataclass(frozen=True, kw_only=True)
class PreparedInfo:
    """Contents of `PREFIX.json`."""

    format_version: int
    stage: str
    """Whose records they are: sft, reward or brain."""
    format: Format
    tokenizer: dict[str, Any]
    """`tokenizer_type`, `vocab_size` and `fingerprint`."""
    settings: dict[str, Any]
    """`RecordReader.settings`: limits and rules the items were made with."""
    source: dict[str, Any]
    """`input`, `split` and the `files` with their sizes and times of change."""
    counts: dict[str, int]
    """`ReadReport` of the whole source."""
    statistics: dict[str, Any]
    """Lengths and numbers of tokens."""
    files: dict[str, int]
    """Sizes of the data files in bytes, by their ending."""

    def write(self, prefix: str) -> None:
        """Write `PREFIX.json`, which makes the result complete."""
        write_whole(Path(f"{prefix}.json"), json.dumps(asdict(self), indent=1) + "\n")


class PreparedItems(Sequence[Item]):
    """Items of prepared data, each made when it is asked for."""

    def __init__(self, documents: DocumentReader, codec: Codec[Item], count: int) -> None:
        self._documents, self._codec, self._count = documents, codec, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Item:
        return self._codec.decode(self._documents[range(self._count)[index]])

    def num_tokens(self) -> list[int]:
        """Tokens of each item, its prompt counted once, without reading the items."""
        return self._documents.lengths()[: self._count].sum(axis=1).tolist()


def prepared_prefix(source: str) -> str | None:
    """The prefix where `source` names prepared data as PREFIX or PREFIX.json, or else None.

    Raises:
        ConfigError: a preparation that has not finished.
    """
    prefix = source.removesuffix(".json")
    data = any(Path(prefix + ending).is_file() for endings in FILES.values() for ending in endings)
    if data and Path(f"{prefix}.json").is_file():
        return prefix
    if Path(f"{prefix}.parts").is_dir() and not Path(source).exists():
        raise ConfigError(f"{source}: its preparation has not finished; run the same {_TOOL} command again")
    return None


def read_info(prefix: str) -> PreparedInfo:
    """What prepared data is, all its files being whole.

    Raises:
        ConfigError: the files are of another version or damaged.
    """
    path = Path(f"{prefix}.json")
    try:
        info = PreparedInfo(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not written by {_TOOL} ({error})") from error
    if info.format_version != FORMAT_VERSION:
        raise ConfigError(
            f"{path}: prepared in format version {info.format_version}, this is version {FORMAT_VERSION}; prepare it "
            f"again with {_TOOL}"
        )
    for ending, size in info.files.items():
        file = Path(prefix + ending)
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise ConfigError(f"{file}: {state}, {path.name} says {size:,} bytes; copy it again or prepare it again")
    return info


def open_prepared(
    prefix: str, reader: RecordReader[Item], *, limit: int | None = None
) -> tuple[PreparedItems[Item], ReadReport]:
    """The items of prepared data, where they are what `reader` would make of the records.

    Args:
        prefix: of the files.
        reader: how the stage would read the raw records.
        limit: only what the first so many records of the source gave.

    Returns:
        the items, and what became of the records of the whole source.

    Raises:
        ConfigError: prepared for another stage, tokenizer or rule, or for longer sequences, with the cure.
    """
    info = read_info(prefix)
    _check_stage(info, reader, prefix)
    _check_tokenizer(info, reader, prefix)
    _check_settings(info, reader, prefix)
    documents = open_documents(prefix, info.format, 1 + reader.num_responses)
    report = ReadReport(**info.counts)
    count = len(documents)
    if limit is not None and limit < report.read:
        count = bisect_left(range(count), limit, key=lambda index: documents[index].fields["row"])
        if not count:
            raise ConfigError(f"{prefix}: none of the first {limit} records was kept when it was prepared")
    return PreparedItems(documents, CODECS[info.stage], count), report


def _check_stage(info: PreparedInfo, reader: RecordReader, prefix: str) -> None:
    if info.stage != reader.stage:
        raise ConfigError(
            f"{prefix}: prepared with --stage {info.stage}, and {reader.stage} records are needed here; run {_TOOL} "
            f"--stage {reader.stage}, or name the data prepared for it"
        )


def _check_tokenizer(info: PreparedInfo, reader: RecordReader, prefix: str) -> None:
    if info.tokenizer["fingerprint"] != tokenizer_fingerprint(reader.tokenizer):
        raise ConfigError(
            f"{prefix}: prepared with another tokenizer ({info.tokenizer['tokenizer_type']} of "
            f"{info.tokenizer['vocab_size']} ids; the run's {reader.tokenizer.tokenizer_type} has "
            f"{reader.tokenizer.vocab_size}), or one with other rules or another chat template; run {_TOOL} with the "
            "--load, --hf-model or --tokenizer-model of the run"
        )


def _check_settings(info: PreparedInfo, reader: RecordReader, prefix: str) -> None:
    """Rules must be the same; items may be shorter than the run allows, but not longer."""
    mine, prepared = reader.settings(), info.settings
    again = f"or prepare it again: {_TOOL} --stage {info.stage}"
    if mine.get("multi_turn_loss") != prepared.get("multi_turn_loss"):
        flag = "--multi-turn-loss" if prepared["multi_turn_loss"] else "--no-multi-turn-loss"
        raise ConfigError(f"{prefix}: prepared with {flag}; run with it, {again} with the other")
    for_prompts = "max_new_tokens" in mine
    for name in ("seq_length",) if for_prompts else ("seq_length", "max_prompt_length", "max_response_length"):
        allowed, longest = mine[name], prepared[name]
        if allowed is not None and allowed < (longest or prepared["seq_length"]):
            flag = "--" + name.replace("_", "-")
            state = f"with {flag} {longest}" if longest else f"without {flag}"
            raise ConfigError(
                f"{prefix}: prepared {state}, the run has {flag} {allowed}; run {state}, {again} {flag} {allowed}"
            )
    if for_prompts:
        longest, allowed = (_longest_prompt(settings) for settings in (prepared, mine))
        if allowed < longest:
            raise ConfigError(
                f"{prefix}: prepared for prompts of up to {longest} tokens, and the run's --seq-length "
                f"{mine['seq_length']} and --max-new-tokens {mine['max_new_tokens']} leave room for {allowed}; raise "
                f"--seq-length, {again} --max-new-tokens {mine['max_new_tokens']}"
            )


def _longest_prompt(settings: dict[str, Any]) -> int:
    left = settings["seq_length"] - settings["max_new_tokens"]
    return min(left, settings["max_prompt_length"] or left)


def _run_lengths(mask: Sequence[bool]) -> list[int]:
    """Lengths of the runs of equal values, those of True first (which may have none)."""
    runs = [len(list(run)) for _, run in groupby(mask)]
    return runs if mask[0] else [0, *runs]


def _from_run_lengths(runs: Sequence[int]) -> tuple[bool, ...]:
    return tuple(chain.from_iterable(repeat(place % 2 == 0, length) for place, length in enumerate(runs)))
