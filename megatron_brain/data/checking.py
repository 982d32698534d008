"""Finds every problem of a data set, not only the first: errors by the rules of the stages, and warnings.

An error would stop the stage. A warning tells of something odd that the stage would train on. Several processes read
the records as the stage reads them (`records.RecordReader`). The main process finds what concerns more than one record,
such as duplicates, from their results.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy

from megatron_brain.config.template_date import now
from megatron_brain.data.conversations import NEXT_TURN
from megatron_brain.data.lengths import Ids, ReadReport
from megatron_brain.data.prepared.info import refuse_prepared
from megatron_brain.data.reading_settings import ReadingSettings
from megatron_brain.data.records import PreferencePair, PromptReader, Tokenised
from megatron_brain.data.sources import RawRecord, Record, parse_record, raw_records
from megatron_brain.data.text_hints import TextHints, missing_space
from megatron_brain.data.tokenizer.kinds import token_kinds
from megatron_brain.data.workers import map_in_order
from megatron_brain.errors import RecordError, UserError

_CHUNK = 2000
_MUCH_FALLBACK = 0.1
"""A record gets a warning where at least this share of its tokens are single bytes."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one record."""

    where: str
    kind: str
    message: str
    is_error: bool


@dataclass
class CheckReport:
    """Problems by kind: how many, and the first few of each."""

    max_shown: int
    counts: Counter[tuple[bool, str]] = field(default_factory=Counter)
    """Number of problems by (is an error, kind)."""
    shown: dict[tuple[bool, str], list[Problem]] = field(default_factory=dict)
    reports: dict[str, ReadReport] = field(default_factory=dict)
    """What a stage would make of each source, by its name."""

    def add(self, problem: Problem) -> None:
        """Count a problem, and keep it if it is one of the first of its kind."""
        key = (problem.is_error, problem.kind)
        self.counts[key] += 1
        if len(shown := self.shown.setdefault(key, [])) < self.max_shown:
            shown.append(problem)

    def total(self, *, errors: bool) -> int:
        """Number of errors, or of warnings."""
        return sum(count for (is_error, _), count in self.counts.items() if is_error == errors)

    def __str__(self) -> str:
        lines = [f"{source}: {report}" for source, report in self.reports.items()]
        for (is_error, kind), count in sorted(self.counts.items(), key=lambda item: (not item[0][0], -item[1])):
            lines += ["", f"{'error' if is_error else 'warning'}: {kind}: {count:,}"]
            shown = self.shown[is_error, kind]
            lines += [f"  {problem.where}: {problem.message}" for problem in shown]
            if count > len(shown):
                lines.append(f"  and {count - len(shown):,} more")
        return "\n".join([*lines, "", f"{self.total(errors=True):,} errors, {self.total(errors=False):,} warnings"])


def check(
    train: Sequence[str],
    valid: Sequence[str],
    reading: ReadingSettings,
    *,
    split: str | None = None,
    valid_split: str | None = None,
    workers: int = 1,
    max_shown: int = 5,
) -> CheckReport:
    """Find all problems of training and validation data.

    Args:
        train: sources of records to train on.
        valid: sources of records to validate on, which are also compared with those to train on.
        reading: how the stage will read the records.
        split: split of `train` where it is a saved or hub data set.
        valid_split: the same of `valid`.
        workers: processes that read.
        max_shown: how many problems of each kind to keep.

    Raises:
        ConfigError: a source does not exist, or is prepared data.
    """
    if reading.template_date is None:
        reading = reading.at(now())  # All processes use the same time.
    opened = [[_open(source, of) for source in sources] for sources, of in ((train, split), (valid, valid_split))]
    report = CheckReport(max_shown)
    trained = _Seen()
    for sources, records, seen in zip((train, valid), opened, (trained, _Seen(trained)), strict=True):
        for source, of_source in zip(sources, records, strict=True):
            _check_source(source, of_source, reading, workers, report, seen)
        for problem in seen.mixed_formats():
            report.add(problem)
    return report


def _open(source: str, split: str | None) -> Iterator[RawRecord]:
    refuse_prepared(source)
    return raw_records(source, split)


def _check_source(
    source: str, records: Iterator[RawRecord], reading: ReadingSettings, workers: int, report: CheckReport, seen: _Seen
) -> None:
    unreadable: list[str] = []

    def chunks() -> Iterator[list[RawRecord]]:
        try:
            while chunk := list(islice(records, _CHUNK)):
                yield chunk
        except UserError as error:
            unreadable.append(str(error))

    counts: Counter[str] = Counter(read=0)
    for checked in map_in_order(
        _check_chunk, chunks(), workers=workers, set_up=functools.partial(RecordChecker, reading)
    ):
        counts.update(checked.counts)
        for problem in [*checked.problems, *(p for fact in checked.facts for p in seen.add(fact, counts))]:
            report.add(problem)
    kept = counts.pop("kept", 0)
    report.reports[source] = ReadReport(kept=kept, **counts)
    for message in unreadable:
        report.add(Problem(source, "unreadable source", message.removeprefix(f"{source}: "), True))
    if not kept and not unreadable:
        report.add(Problem(source, "nothing left", "no record of it can be used", True))


@dataclass(frozen=True)
class _Fact:
    """What the comparison of a record with others needs: its place, its format and hashes of its ids."""

    where: str
    format: str
    prompt: bytes
    whole: bytes
    reverse: bytes
    """Hash of the pair with its responses exchanged."""


@dataclass
class _Checked:
    """What is found in a chunk of records."""

    problems: list[Problem]
    facts: list[_Fact]
    counts: Counter[str]


class RecordChecker:
    """Checks records one by one."""

    def __init__(self, reading: ReadingSettings) -> None:
        self._reader = reading.build()
        # Overlong records are reported, whatever the stage would do with them.
        self._strict = copy.copy(self._reader)
        self._strict.limits = dataclasses.replace(reading.config.data, overlong="error")
        self._kinds = token_kinds(self._reader.tokenizer)
        self._hints = TextHints(self._kinds.special)

    def check(self, chunk: Sequence[RawRecord]) -> _Checked:
        """The problems of some records in their order, and the facts to compare the records by."""
        problems: list[Problem] = []
        formats: dict[str, str] = {}

        def on_error(where: str, error: UserError) -> None:
            kind, message = (error.kind, error.message) if isinstance(error, RecordError) else ("other", str(error))
            problems.append(Problem(where, kind, message, True))

        def records() -> Iterator[Record]:
            for where, raw in chunk:
                try:
                    record = parse_record(where, raw)
                except RecordError as error:
                    on_error(where, error)
                    continue
                formats[where] = "messages" if "messages" in record else ""
                problems.extend(Problem(where, *hint, False) for hint in self._hints.of_record(record))
                yield where, record

        counts: Counter[str] = Counter()
        facts = []
        for tokenised in self._reader.tokenise(records(), on_error):
            where = tokenised.draft.where
            try:
                problems += self._overlong(tokenised)
                unlearned = counts["dropped_unlearned"]
                item = self._reader.fit(tokenised, counts)
            except RecordError as error:
                on_error(where, error)
                continue
            if (reason := tokenised.draft.left_out) is not None:
                problems.append(Problem(where, "dialogue left out", reason, False))
            problems += [Problem(where, *hint, False) for hint in self._token_hints(tokenised)]
            if item is None and counts["dropped_unlearned"] > unlearned:
                left = "the cut to the length limits leaves nothing that is learned (weight 0)"
                problems.append(Problem(where, "nothing learned, dropped", left, False))
            if item is not None:
                counts["kept"] += 1
                if isinstance(item, PreferencePair) and item.group.responses[0] == item.group.responses[1]:
                    problems.append(Problem(where, "identical pair", "chosen and rejected are the same", False))
                facts.append(_fact(where, formats[where] or tokenised.draft.kind, self._reader.ids(item)))
        counts["read"] = len(chunk)
        order = {where: place for place, (where, _) in enumerate(chunk)}
        return _Checked(sorted(problems, key=lambda problem: order[problem.where]), facts, counts)

    def _overlong(self, tokenised: Tokenised) -> list[Problem]:
        """A warning where a record is dropped or cut. Under "error" the reader itself raises the error."""
        if self._reader.limits.overlong == "error":
            return []
        try:
            self._strict.fit(tokenised, Counter())
        except RecordError as error:
            if error.kind == "overlong":
                done = {"drop": "dropped", "truncate": "cut"}[self._reader.limits.overlong]
                lengths = error.message.removeprefix("too long: ").partition(";")[0]
                return [Problem(error.where, f"overlong, {done}", lengths, False)]
        return []

    def _token_hints(self, tokenised: Tokenised) -> Iterator[tuple[str, str]]:
        draft, prompt, responses = tokenised
        ids = [*prompt, *(token for response in responses for token in response)]
        if unknown := sum(token == self._kinds.unknown for token in ids):
            yield "unknown tokens", f"{unknown} of {len(ids)} tokens are unknown to the tokenizer"
        fallback = sum(token in self._kinds.byte_fallback for token in ids)
        if fallback > _MUCH_FALLBACK * len(ids):
            yield "byte fallback", f"{fallback} of {len(ids)} tokens are single bytes: the tokenizer lacks its script"
        if draft.kind == "text" and not isinstance(self._reader, PromptReader):
            hints = (missing_space(draft.prompt, response) for response in draft.responses)
            if (hint := next(filter(None, hints), None)) is not None:
                yield hint
            if any(NEXT_TURN in response for response in draft.responses):
                yield "turns in an answer", f"an answer holds {NEXT_TURN!r}, where the next turn begins"


def _check_chunk(checker: RecordChecker, chunk: Sequence[RawRecord]) -> _Checked:
    return checker.check(chunk)


def _fact(where: str, form: str, ids: tuple[Ids, ...]) -> _Fact:
    prompt, *responses = map(_hash, ids)
    whole, reverse = (b"".join([prompt, *order]) for order in (responses, responses[::-1]))
    return _Fact(where, form, prompt, _shorter(whole), _shorter(reverse))


def _hash(ids: Ids) -> bytes:
    return _shorter(numpy.asarray(ids, dtype="<i4").tobytes())


def _shorter(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class _Seen:
    """What is kept of earlier records, for comparing later ones with them."""

    def __init__(self, trained: _Seen | None = None) -> None:
        self._whole: dict[bytes, str] = {}
        self._prompts: dict[bytes, str] = {}
        self._formats: dict[str, tuple[int, str]] = {}
        self._trained = trained

    def add(self, fact: _Fact, counts: Counter[str]) -> Iterator[Problem]:
        """Compare a record with the earlier ones and yield its problems; `counts` are those of a `ReadReport`."""
        count, first = self._formats.get(fact.format, (0, fact.where))
        self._formats[fact.format] = (count + 1, first)
        if (earlier := self._whole.get(fact.whole)) is not None:
            counts["duplicates"] += 1
            yield Problem(fact.where, "duplicate", f"repeats {earlier}", False)
        elif (opposite := self._whole.get(fact.reverse)) is not None:
            yield Problem(fact.where, "contradiction", f"prefers the opposite of {opposite}", False)
        self._whole.setdefault(fact.whole, fact.where)
        self._prompts.setdefault(fact.prompt, fact.where)
        if self._trained is not None:
            if (same := self._trained._whole.get(fact.whole)) is not None:
                yield Problem(fact.where, "trained on", f"the same record is trained on: {same}", False)
            elif (same := self._trained._prompts.get(fact.prompt)) is not None:
                yield Problem(fact.where, "trained on", f"a record with the same prompt is trained on: {same}", False)

    def mixed_formats(self) -> Iterator[Problem]:
        """A problem for each format other than the most frequent one."""
        ranked = sorted(self._formats.items(), key=lambda item: -item[1][0])
        for form, (count, first) in ranked[1:]:
            most, (count_of_most, _) = ranked[0]
            message = f"{count} records are {form!r} (this is the first), {count_of_most} are {most!r}"
            yield Problem(first, "mixed formats", message, False)
