"""Finds signs of damage in the texts of records. They stop no run, but they teach a model something odd."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Hint = tuple[str, str]
"""Kind of the hint, and its message."""

_FIELDS = ("prompt", "completion", "chosen", "rejected", "messages")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_REPLACEMENT = re.compile("\ufffd")
# UTF-8 read as Latin-1 or Windows-1252.
_MOJIBAKE = re.compile("[ÃÂ][\u0080-\u00bf]|â€")


class TextHints:
    """Looks for special tokens, control characters and wrongly decoded characters."""

    def __init__(self, special: Iterable[str]) -> None:
        texts = sorted(filter(None, special), key=lambda text: (-len(text), text))
        self._patterns = {
            "control character": (_CONTROL, "a control character"),
            "replacement character": (_REPLACEMENT, "a character that could not be decoded"),
            "wrong encoding": (_MOJIBAKE, "text that was decoded with another encoding than it was written in"),
        }
        if texts:
            said = "the text of a special token: in a message it becomes that token, in a plain text it does not"
            self._patterns["special token"] = (re.compile("|".join(map(re.escape, texts))), said)

    def of_record(self, record: Mapping[str, Any]) -> Iterator[Hint]:
        """Hints about a record, at most one of each kind for each field."""
        for field in _FIELDS:
            for kind, (pattern, what) in self._patterns.items():
                found = (match for text in _texts(record.get(field)) for match in pattern.finditer(text))
                if (first := next(found, None)) is not None:
                    yield kind, f"field {field!r} has {what}: ...{_around(first)!r}..."


def missing_space(prompt: str, response: str) -> Hint | None:
    """A hint where no space separates prompt and response: they are joined without one."""
    before, after = prompt[-1:], response[:1]
    if not before or not after or before.isspace() or after.isspace() or _has_no_spaces(before + after):
        return None
    return "no space between prompt and response", (
        f"...{prompt[-20:]!r} and {response[:20]!r}... are joined as they are: begin the response with the space or "
        "line break that belongs there"
    )


def _has_no_spaces(text: str) -> bool:
    """Whether a text has a character of a script that is written without spaces between words."""
    return any(unicodedata.east_asian_width(character) in "WF" for character in text)


def _texts(value: Any) -> Iterator[str]:
    """The texts of a field: the field itself, or the contents of its messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        yield from _texts(value.get("content"))
        yield from _texts(value.get("text"))


def _around(match: re.Match[str]) -> str:
    return match.string[max(match.start() - 15, 0) : match.end() + 15]
