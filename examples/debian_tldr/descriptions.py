"""Turn Debian package lists into (long description, one-line synopsis) pairs.

The functions here only work on text: `fetch_data.py` downloads the lists and writes the files.

Every package that the lists name ends in exactly one place: a split, or the counter of the rule that dropped it.
Splits are drawn by a hash of the stem of the *source* package name (`gcc-12-cross` and `gcc-11` share the stem
`gcc`), so packages built from one source, and successive versions of it, are always in the same split.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from user_errors import UserError

SPLITS = ("train", "valid", "test")
SHARED_PARAGRAPH_WORDS = 20
"""A paragraph of at least this many words counts as a leak if two splits have it."""

LIST_ITEM = re.compile(r"[*+•-] ")
VERSION_SUFFIX = re.compile(r"(?<=[a-z])[-.+]?\d[\d.]*(-.*)?$")

DROPPED_SECTIONS = {
    "libdevel": "development package",
    "debug": "development package",
    "oldlibs": "transitional package",
    "doc": "documentation package",
    "libs": "library package",
    "introspection": "library package",
}
DROPPED_NAMES = (
    (re.compile(r"-(dev|dbg|dbgsym|debug|headers)$"), "development package"),
    (re.compile(r"-(doc|docs|manual)$"), "documentation package"),
    (re.compile(r"^lib(?!re(?:office|cad|swan)).*(?<!-perl)(?<!-java)$"), "library package"),
)
TRANSITIONAL = re.compile(r"\b(transitional|dummy)\b", re.IGNORECASE)


@dataclass(kw_only=True, frozen=True)
class Package:
    """One binary package of the lists."""

    name: str
    source: str
    """Name of the source package that it is built from."""
    section: str
    """Section of the archive without the component, such as `games`."""
    synopsis: str
    paragraphs: tuple[str, ...]
    """Paragraphs of the long description. A list keeps one line for each item."""

    @property
    def description(self) -> str:
        return "\n\n".join(self.paragraphs)


@dataclass(kw_only=True, frozen=True)
class FilterSettings:
    """Limits of the filter. Lengths are in words, separated by white space."""

    min_description_words: int = 25
    max_description_words: int = 160
    """Longer descriptions are cut after the last paragraph within the limit."""
    min_synopsis_words: int = 3
    max_synopsis_words: int = 16
    max_paragraph_packages: int = 3
    """A paragraph that more packages than this have is boilerplate, and is removed from all of them."""

    def __post_init__(self) -> None:
        for low, high in (
            ("min_description_words", "max_description_words"),
            ("min_synopsis_words", "max_synopsis_words"),
        ):
            if not 0 < getattr(self, low) <= getattr(self, high):
                raise UserError(
                    f"{low} = {getattr(self, low)} and {high} = {getattr(self, high)}: "
                    "both must be positive and the first at most the second"
                )


def parse_stanzas(text: str) -> Iterator[dict[str, str]]:
    """Yield the stanzas of a Debian control file; continuation lines keep their leading space."""
    for block in text.split("\n\n"):
        fields: dict[str, str] = {}
        key = ""
        for line in block.splitlines():
            if line[:1] in (" ", "\t") and key:
                fields[key] += "\n" + line
            elif ":" in line:
                key, _, value = line.partition(":")
                fields[key] = value.strip()
        if fields:
            yield fields


def split_paragraphs(lines: Iterable[str]) -> tuple[str, ...]:
    """Unwrap the continuation lines of a description: ` .` ends a paragraph, a list item starts a line."""
    paragraphs: list[str] = []
    current: list[str] = []
    in_item = False
    for line in lines:
        content = " ".join(line.split())
        if content in ("", "."):
            if current:
                paragraphs.append("\n".join(current))
            current, in_item = [], False
            continue
        is_item = LIST_ITEM.match(content) is not None
        is_verbatim = line.startswith("  ") and not in_item
        if current and not is_item and not is_verbatim:
            current[-1] += " " + content
        else:
            current.append(content)
        in_item = is_item or (in_item and not is_verbatim)
    if current:
        paragraphs.append("\n".join(current))
    return tuple(paragraphs)


def parse_packages(package_lists: Iterable[str], translation_lists: Iterable[str]) -> tuple[list[Package], Counter]:
    """Join `Packages` (source, section) with `Translation-en` (synopsis, description), by package name.

    A name that is listed more than once (a security or point update) is taken from the first list that has it.

    Returns: the packages sorted by name, and the number of stanzas left out, by rule.
    """
    origin: dict[str, tuple[str, str]] = {}
    for text in package_lists:
        for stanza in parse_stanzas(text):
            if "Package" in stanza:
                source = stanza.get("Source", stanza["Package"]).split()[0]
                section = stanza.get("Section", "").rpartition("/")[2]
                origin.setdefault(stanza["Package"], (source, section))
    dropped: Counter = Counter()
    packages: dict[str, Package] = {}
    for text in translation_lists:
        for stanza in parse_stanzas(text):
            name, description = stanza.get("Package", ""), stanza.get("Description-en", "")
            if not name or not description:
                dropped["no English description"] += 1
            elif name in packages:
                dropped["listed again"] += 1
            elif name not in origin:
                dropped["source unknown (no package for this architecture)"] += 1
            else:
                synopsis, *lines = description.split("\n")
                source, section = origin[name]
                packages[name] = Package(
                    name=name,
                    source=source,
                    section=section,
                    synopsis=" ".join(synopsis.split()),
                    paragraphs=split_paragraphs(lines),
                )
    return [packages[name] for name in sorted(packages)], dropped


def normalised(text: str) -> str:
    """The form in which texts are compared: lower-case words joined by single spaces, without punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def long_paragraphs(package: Package) -> set[str]:
    """Normalised paragraphs of at least `SHARED_PARAGRAPH_WORDS` words."""
    texts = (normalised(paragraph) for paragraph in package.paragraphs)
    return {text for text in texts if len(text.split()) >= SHARED_PARAGRAPH_WORDS}


def cut_at_paragraph(paragraphs: tuple[str, ...], max_words: int) -> tuple[str, ...]:
    """Return the first paragraphs that together have at most `max_words` words; there may be none."""
    kept, words = [], 0
    for paragraph in paragraphs:
        words += len(paragraph.split())
        if words > max_words:
            break
        kept.append(paragraph)
    return tuple(kept)


def dropping_rule(package: Package) -> str | None:
    """Name the rule about kinds of packages that drops this one, or None."""
    if package.section in DROPPED_SECTIONS:
        return DROPPED_SECTIONS[package.section]
    for pattern, rule in DROPPED_NAMES:
        if pattern.search(package.name):
            return rule
    if TRANSITIONAL.search(package.synopsis):
        return "transitional package"
    return None


def filter_packages(packages: list[Package], settings: FilterSettings) -> tuple[list[Package], Counter, Counter]:
    """Keep the packages that are fit for a summarisation pair.

    Returns: the kept packages in the given order, with a clean and cut `description`; the number of dropped packages,
    by rule; the number of changes to kept packages, by kind.
    """
    dropped: Counter = Counter()
    changed: Counter = Counter()
    candidates = []
    for package in packages:
        rule = dropping_rule(package)
        if rule:
            dropped[rule] += 1
        else:
            candidates.append(package)
    uses = Counter(text for package in candidates for text in {normalised(p) for p in package.paragraphs})
    kept: list[Package] = []
    descriptions: set[str] = set()
    for package in candidates:
        own = tuple(p for p in package.paragraphs if uses[normalised(p)] <= settings.max_paragraph_packages)
        short = replace(package, paragraphs=cut_at_paragraph(own, settings.max_description_words))
        rule = text_rule(short, own, settings, descriptions)
        if rule:
            dropped[rule] += 1
            continue
        changed["boilerplate paragraph left out"] += len(own) < len(package.paragraphs)
        changed["cut at a paragraph edge"] += len(short.paragraphs) < len(own)
        descriptions.add(normalised(short.description))
        kept.append(short)
    return kept, dropped, changed


def text_rule(package: Package, uncut: tuple[str, ...], settings: FilterSettings, seen: set[str]) -> str | None:
    """Name the rule about texts that drops a package, or None; `seen` holds the descriptions kept so far."""
    words = len(package.description.split())
    if uncut and not package.paragraphs:
        return f"first paragraph over {settings.max_description_words} words"
    if words < settings.min_description_words:
        return f"description under {settings.min_description_words} words"
    if not settings.min_synopsis_words <= len(package.synopsis.split()) <= settings.max_synopsis_words:
        return f"synopsis outside {settings.min_synopsis_words}-{settings.max_synopsis_words} words"
    if normalised(package.description) in seen:
        return "duplicate description"
    return None


def source_stem(source: str) -> str:
    """Source name without its version and what follows: `gcc-12-cross` -> `gcc`, `python3.11` -> `python`."""
    return VERSION_SUFFIX.sub("", source)


def split_of(source: str, valid_share: float, test_share: float, seed: int) -> str:
    """Draw the split of a source package from a hash of its stem. Additions to the archive do not change it."""
    digest = hashlib.sha256(f"{seed}:{source_stem(source)}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    if draw < test_share:
        return "test"
    return "valid" if draw < test_share + valid_share else "train"


def split_packages(
    packages: list[Package], valid_share: float, test_share: float, seed: int
) -> tuple[dict[str, list[Package]], Counter]:
    """Split by source stem, then drop from valid what shares a long paragraph with train, and from test likewise.

    Returns: the packages of each split in a random order drawn by `seed`, so that the first lines of a file are a fair
    sample; the number of dropped packages, by rule.
    """
    splits: dict[str, list[Package]] = {name: [] for name in SPLITS}
    for package in packages:
        splits[split_of(package.source, valid_share, test_share, seed)].append(package)
    dropped: Counter = Counter()
    seen: set[str] = set()
    for name in SPLITS:
        clean = [package for package in splits[name] if seen.isdisjoint(long_paragraphs(package))]
        leaked = len(splits[name]) - len(clean)
        if leaked:
            dropped[f"{name}: shares a {SHARED_PARAGRAPH_WORDS}-word paragraph with another split"] = leaked
        random.Random(f"{seed}:{name}").shuffle(clean)
        splits[name] = clean
        for package in clean:
            seen |= long_paragraphs(package)
    return splits, dropped
