"""Opens prepared data for a stage and checks that they fit its settings."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

from megatron_brain.data.contents import Contents
from megatron_brain.data.lengths import ReadReport
from megatron_brain.data.on_demand import OnDemand
from megatron_brain.data.prepared.codecs import CODECS, Codec
from megatron_brain.data.prepared.documents import Document, DocumentReader, open_documents
from megatron_brain.data.prepared.info import TOOL, PreparedInfo, read_info
from megatron_brain.data.records import Item, RecordReader
from megatron_brain.data.tokenizer.fingerprint import tokenizer_fingerprint
from megatron_brain.errors import ConfigError, RecordError


class PreparedItems(OnDemand[Item]):
    """Items of prepared data, each made when it is asked for.

    Args:
        documents: the documents; the first `count` of them are the items.
        prefix: prefix of the files, for error messages about damage.
        keeps_fields: whether the items hold the other fields of their records.
    """

    def __init__(
        self, documents: DocumentReader, codec: Codec[Item], count: int, *, prefix: str, keeps_fields: bool
    ) -> None:
        super().__init__(count, self._read)
        self._documents, self._codec, self._prefix, self._keeps_fields = documents, codec, prefix, keeps_fields

    def _read(self, place: int) -> Item:
        document = self._documents[place]
        if not document.is_whole():
            raise ConfigError(
                f"{self._prefix}: document {place} is damaged (it is not what was written, by its checksum): copy the "
                "files again, or prepare the records again"
            )
        if not self._keeps_fields:
            document = Document(document.sequences, {**document.fields, "others": None})
        elif "others" not in document.fields:
            raise RecordError(
                document.fields["record_id"],
                "no other fields",
                f"{self._prefix} lacks the other fields of the record, which the reward reads: they were prepared "
                "by an earlier version, or JSON has no word for one (a date, bytes, NaN). Give the records themselves, "
                f"which tells the field, or run {TOOL} again",
            )
        return self._codec.decode(document)

    def num_tokens(self) -> list[int]:
        """Number of tokens of each item, its prompt counted once. Reads the index, not the items."""
        lengths: list[int] = self._documents.lengths()[: len(self)].sum(axis=1).tolist()
        return lengths


def open_prepared(
    prefix: str, reader: RecordReader[Item], *, limit: int | None = None
) -> tuple[PreparedItems[Item], ReadReport, Contents]:
    """The items of prepared data, if they equal what `reader` would make of the raw records.

    Args:
        prefix: prefix of the files.
        reader: the stage's reader of raw records.
        limit: use only the items of the first so many records of the source.

    Returns:
        the items, the counts of what was done with the records of the whole source, and the fingerprint of the items.

    Raises:
        ConfigError: they were prepared for another stage, tokenizer or rule, or for longer sequences; says the cure.
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
    items = PreparedItems(documents, CODECS[reader.item_kind], count, prefix=prefix, keeps_fields=reader.keeps_fields)
    if count == len(documents) and not reader.keeps_fields:
        return items, report, Contents.from_dict(info.contents)
    return items, report, reader.contents(list(map(reader.hash, items)))


def _check_stage(info: PreparedInfo, reader: RecordReader[Any], prefix: str) -> None:
    if info.stage != reader.stage:
        raise ConfigError(
            f"{prefix}: prepared with --stage {info.stage}, and {reader.stage} records are needed here; run {TOOL} "
            f"--stage {reader.stage}, or name the data prepared for it"
        )


def _check_tokenizer(info: PreparedInfo, reader: RecordReader[Any], prefix: str) -> None:
    if info.tokenizer["fingerprint"] != tokenizer_fingerprint(reader.tokenizer):
        raise ConfigError(
            f"{prefix}: prepared with another tokenizer ({info.tokenizer['tokenizer_type']} of "
            f"{info.tokenizer['vocab_size']} ids; the run's {reader.tokenizer.tokenizer_type} has "
            f"{reader.tokenizer.vocab_size}), or one with other rules or another chat template; run {TOOL} with the "
            "--load, --hf-model or --tokenizer-model of the run"
        )


def _check_settings(info: PreparedInfo, reader: RecordReader[Any], prefix: str) -> None:
    """Raise ConfigError where rules differ, or where items may be longer than the run allows."""
    mine, prepared = reader.settings(), info.settings
    if missing := sorted(mine.keys() - prepared.keys() - {"template_date"}):
        raise ConfigError(
            f"{prefix}.json is damaged: its settings lack {', '.join(missing)}: copy it again, or prepare the records "
            "again"
        )
    again = f"or prepare it again: {TOOL} --stage {info.stage}"
    if mine.get("multi_turn_loss") != prepared.get("multi_turn_loss"):
        flag = "--multi-turn-loss" if prepared["multi_turn_loss"] else "--no-multi-turn-loss"
        raise ConfigError(f"{prefix}: prepared with {flag}; run with it, {again} with the other")
    if mine.get("template_date") != prepared.get("template_date"):
        date = prepared.get("template_date")
        raise ConfigError(
            f"{prefix}: its chat template wrote the date {date}, the run's is {mine.get('template_date')}: run with "
            f"--template-date {date}, {again} --template-date {mine.get('template_date')}"
        )
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
    left: int = settings["seq_length"] - settings["max_new_tokens"]
    return min(left, settings["max_prompt_length"] or left)
