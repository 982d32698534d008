"""Prepares a corpus: several processes tokenise the records once, and write them in a memory-mapped format.

The records are cut into numbered parts. A worker writes each part into its own folder under `PREFIX.parts`, and the
folder gets its final name when it is complete. A run after a kill keeps the complete parts. At the end all parts become
one result, whose `PREFIX.json` is written last. The result depends on records, tokenizer and settings, not on workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy

from megatron_brain.config.template_date import now
from megatron_brain.data.lengths import ReadReport, make_report
from megatron_brain.data.prepared.codecs import CODECS
from megatron_brain.data.prepared.documents import FILES, Format, merge_documents, open_documents, write_documents
from megatron_brain.data.prepared.info import FORMAT_VERSION, PreparedInfo, read_info, refuse_prepared
from megatron_brain.data.prepared.statistics import count_duplicates, length_statistics
from megatron_brain.data.reading_settings import ReadingSettings
from megatron_brain.data.records import RecordReader, Tokenised
from megatron_brain.data.sources import RawRecord, parse_record, raw_records, source_files
from megatron_brain.data.tokenizer.fingerprint import tokenizer_fingerprint
from megatron_brain.data.workers import map_in_order
from megatron_brain.errors import ConfigError
from megatron_brain.files import file_problem, sync_folder, sync_tree, write_whole

log = logging.getLogger(__name__)

RECORDS_PER_PART = 10_000
_MOST_CHANGES = 5
_PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What to prepare, and where to."""

    input: str
    """Source of the records, as --train-data takes it."""
    split: str | None
    """Split of a saved or hub data set."""
    prefix: str
    """Path of the result without the endings of its files."""
    format: Format
    reading: ReadingSettings
    workers: int = 1
    """Processes that tokenise."""


@dataclass(frozen=True)
class _Part:
    """Consecutive records: the part's number, the row of its first record and the records."""

    number: int
    first_row: int
    records: list[RawRecord]


def prepare(job: Preparation) -> PreparedInfo:
    """Prepare a corpus, or continue a preparation that was stopped.

    Raises:
        RecordError: the stage would not take a record; names its place.
        ConfigError: there are leftovers of another preparation, or the place or the tokenizer cannot be used.
    """
    refuse_prepared(job.input)
    _require_place(job)
    job = _dated(job)
    reader = job.reading.build()
    plan = _plan(job, reader)
    if Path(f"{job.prefix}.json").exists():
        info = _already_done(job, plan)
        shutil.rmtree(_parts_folder(job), ignore_errors=True)
        return info
    records = raw_records(job.input, job.split)
    with _locked(_parts_folder(job)) as folder:
        _take_up(folder, plan)
        parts = _write_parts(job, records, folder)
        info = _merge(job, plan, reader, parts)
    shutil.rmtree(folder)
    return info


def _require_place(job: Preparation) -> None:
    """Raise ConfigError where the files of the result cannot be written, or would replace those of the source."""
    if os.path.basename(job.prefix) in ("", ".", ".."):
        example = os.path.join(job.prefix, "train")
        raise ConfigError(f"--output {job.prefix}: is a folder; give the files in it a name, such as {example}")
    source = {path.resolve() for path in source_files(job.input)}
    for ending in (*FILES[job.format], ".json"):
        place = job.prefix + ending
        if (problem := file_problem("--output", place)) is not None:
            raise ConfigError(problem)
        if Path(place).resolve() in source:
            raise ConfigError(f"--output {job.prefix}: {place} would replace the records of --input; give another name")


def _dated(job: Preparation) -> Preparation:
    """The job with the date that chat templates take for today's. It stays the same if the job is continued later."""
    if job.reading.template_date is not None:
        return job
    before = next((path for path in (Path(f"{job.prefix}.json"), _parts_folder(job) / _PLAN) if path.is_file()), None)
    date = None
    if before is not None:
        with contextlib.suppress(ValueError, AttributeError):  # The code that reads it reports what is wrong.
            date = json.loads(before.read_bytes()).get("settings", {}).get("template_date")
    return dataclasses.replace(job, reading=job.reading.at(date or now()))


def _plan(job: Preparation, reader: RecordReader[Any]) -> dict[str, Any]:
    """What the result is made from, and how, in the form of `PREFIX.json`."""
    files = [{"path": str(path), **_stamp(path)} for path in source_files(job.input)]
    return {
        "format_version": FORMAT_VERSION,
        "stage": reader.stage,
        "format": job.format,
        "tokenizer": {
            "tokenizer_type": reader.tokenizer.tokenizer_type,
            "vocab_size": reader.tokenizer.vocab_size,
            "fingerprint": tokenizer_fingerprint(reader.tokenizer),
        },
        "settings": reader.settings(),
        "source": {"input": job.input, "split": job.split, "files": files},
    }


def _stamp(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"bytes": status.st_size, "changed_ns": status.st_mtime_ns}


def _parts_folder(job: Preparation) -> Path:
    return Path(f"{job.prefix}.parts")


def _already_done(job: Preparation, plan: dict[str, Any]) -> PreparedInfo:
    info = read_info(job.prefix)
    _require_same({name: getattr(info, name) for name in plan}, plan, f"{job.prefix}.json", f"{job.prefix}.*")
    log.info("%s: complete already", job.prefix)
    return info


def _take_up(folder: Path, plan: dict[str, Any]) -> None:
    """Begin in an empty folder, or continue a preparation of the same plan that was stopped."""
    path = folder / _PLAN
    has_parts = any(part.is_dir() and not part.suffix for part in folder.iterdir())
    if has_parts:
        _require_same(_read_plan(path), plan, str(folder), str(folder))
    else:
        write_whole(path, json.dumps(plan, indent=1))


def _read_plan(path: Path) -> dict[str, Any]:
    """The plan of a preparation that was stopped."""
    try:
        plan: dict[str, Any] = json.loads(path.read_bytes())
        return plan
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(
            f"{path}: parts of a preparation are there and what they are of is not to be read ({error}); remove "
            f"{path.parent}, or give another --output"
        ) from error


def _require_same(before: dict[str, Any], now: dict[str, Any], where: str, leftovers: str) -> None:
    """Raise ConfigError where two plans differ; it says in what."""
    before, now = (_flat(json.loads(json.dumps(plan))) for plan in (before, now))
    changed = [
        f"{name} was {before.get(name)}, is now {now.get(name)}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if changed:
        more = f" and {len(changed) - _MOST_CHANGES} more" if len(changed) > _MOST_CHANGES else ""
        raise ConfigError(
            f"{where} is of another preparation: {'; '.join(changed[:_MOST_CHANGES])}{more}. "
            f"Give the same input and settings, or another --output, or remove {leftovers}"
        )


def _flat(plan: dict[str, Any] | list[Any], above: str = "") -> dict[str, Any]:
    """The values of a plan by their paths, such as "source.files.0.bytes"."""
    flat: dict[str, Any] = {}
    for name, value in plan.items() if isinstance(plan, dict) else enumerate(plan):
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, (dict, list)) else {f"{above}{name}": value}
    return flat


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Lock the folder of parts for this process, and yield it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}): remove it, or give another --output"
        ) from error
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{folder}: another process is preparing this output; wait for it") from error
        yield folder


def _write_parts(job: Preparation, records: Iterable[RawRecord], folder: Path) -> list[Path]:
    """Write the parts that do not exist yet. Returns all parts in order."""
    parts: list[Path] = []

    def missing() -> Iterator[_Part]:
        for part in _cut(records):
            parts.append(folder / f"{part.number:06d}")
            if not parts[-1].exists():
                yield part

    set_up = functools.partial(_Worker, job.reading, job.format, folder)
    for number in map_in_order(_write_part, missing(), workers=job.workers, set_up=set_up):
        log.info("%s: part %d written", job.prefix, number)
    if not parts:
        raise ConfigError(f"{job.input}: no records in it")
    return parts


def _cut(records: Iterable[RawRecord]) -> Iterator[_Part]:
    remaining = iter(records)
    for number in count():
        if not (batch := list(islice(remaining, RECORDS_PER_PART))):
            return
        yield _Part(number, number * RECORDS_PER_PART, batch)


class _Worker:
    """The state of a process that writes parts."""

    def __init__(self, reading: ReadingSettings, form: Format, folder: Path) -> None:
        self.reader, self.format, self.folder = reading.build(), form, folder


def _write_part(worker: _Worker, part: _Part) -> int:
    """Write the documents of a part, the hashes of its items and its counts."""
    reader, codec = worker.reader, CODECS[worker.reader.item_kind]
    counts: Counter[str] = Counter()
    sums: Counter[str] = Counter(text_bytes=0, text_tokens=0)
    documents, hashes, contents = [], [], []
    records = ((where, parse_record(where, raw)) for where, raw in part.records)
    for row, tokenised in enumerate(reader.tokenise(records), start=part.first_row):
        item = reader.fit(tokenised, counts)
        if tokenised.draft.left_out is not None:
            continue
        sums["text_bytes"] += _text_bytes(tokenised, reader)
        sums["text_tokens"] += len(tokenised.prompt) + sum(map(len, tokenised.responses))
        if item is not None:
            contents.append(reader.hash(item))
            documents.append(codec.encode(item, row, tokenised.draft.fields).with_checksum())
            hashes.append(_hash(reader.ids(item)))
    target = worker.folder / f"{part.number:06d}"
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write_documents(partial / "data", worker.format, documents, reader.tokenizer.vocab_size)
    numpy.save(partial / "hashes.npy", numpy.frombuffer(b"".join(hashes), dtype=numpy.uint64).reshape(-1, 2))
    numpy.save(partial / "contents.npy", numpy.array(contents, dtype=numpy.uint64))
    (partial / "counts.json").write_text(json.dumps({"records": counts, "sums": sums}))
    sync_tree(partial, but="")
    partial.rename(target)
    return part.number


def _hash(ids: Iterable[tuple[int, ...]]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for sequence in ids:
        digest.update(len(sequence).to_bytes(8, "little") + numpy.asarray(sequence, dtype="<i4").tobytes())
    return digest.digest()


def _text_bytes(tokenised: Tokenised, reader: RecordReader[Any]) -> int:
    """UTF-8 bytes of the texts that the ids were made from. Special tokens do not count where the draft holds ids."""
    draft = tokenised.draft
    if draft.kind == "ids":
        return len(reader.tokenizer.decode([*tokenised.prompt, *tokenised.responses[0]]).encode())
    return sum(len(text.encode()) for text in (draft.prompt, *draft.responses))


def _merge(job: Preparation, plan: dict[str, Any], reader: RecordReader[Any], parts: list[Path]) -> PreparedInfo:
    """Make one result of the parts."""
    counts: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    for part in parts:
        of_part = _read(part, "counts.json")
        counts.update(of_part["records"])
        sums.update(of_part["sums"])
    hashes = [_read(part, "hashes.npy") for part in parts]
    counts["duplicates"] = count_duplicates(hashes)
    report: ReadReport = make_report(counts, sum(map(len, hashes)), reader.limits)
    partial = f"{job.prefix}.partial"
    merge_documents(partial, job.format, [part / "data" for part in parts], reader.tokenizer.vocab_size)
    lengths = open_documents(partial, job.format, 1 + reader.num_responses).lengths()
    statistics = {
        "lengths": length_statistics(lengths),
        "tokens": int(lengths.sum()),
        "bytes_per_token": round(sums["text_bytes"] / sums["text_tokens"], 4),
    }
    sizes = {}
    for ending in FILES[job.format]:
        with open(partial + ending, "rb") as file:
            os.fsync(file.fileno())
        sizes[ending] = os.path.getsize(partial + ending)
        os.replace(partial + ending, job.prefix + ending)
    sync_folder(Path(job.prefix).parent)
    contents = reader.contents(numpy.concatenate([_read(part, "contents.npy") for part in parts]))
    info = PreparedInfo(
        **plan, counts=dataclasses.asdict(report), statistics=statistics, contents=contents.as_dict(), files=sizes
    )
    info.write(job.prefix)
    return info


def _read(part: Path, name: str) -> Any:
    """The content of a small JSON file of a part."""
    path = part / name
    try:
        return json.loads(path.read_text()) if path.suffix == ".json" else numpy.load(path)
    except (ValueError, EOFError) as error:
        raise ConfigError(f"{path} is damaged ({error}): remove {part}, and run the same command again") from error
