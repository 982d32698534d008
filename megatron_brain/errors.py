"""The errors that a user can mend. Every other error is a fault of this package and keeps its traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What the user asked for, or gave, cannot work. The message names the place and what would be right.

    The command line and the tools print the message of this type alone, and end with exit status 2.
    """


class ConfigError(UserError):
    """A key, value or layout that cannot work; the message names it, where it was set and what would be right."""


class AgreedError(ConfigError):
    """An error that every rank raises with the same text. Rank 0 alone prints it."""


class OwnError(ConfigError):
    """An error that may concern this process alone, such as one in its environment variables. Every rank prints it."""


class RecordError(UserError):
    """A record that no stage takes.

    Attributes:
        where: place of the record, such as ``data.jsonl:17``.
        kind: the mistake in two or three words, the same for every record that makes it.
    """

    def __init__(self, where: str, kind: str, message: str) -> None:
        super().__init__(where, kind, message)  # It gets all three, so that the error can be pickled.
        self.where, self.kind, self.message = where, kind, message

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def short(value: object) -> str:
    """The text of a value, cut to 60 characters, for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'a' or 'b'?` with the nearest known words, or an empty string when none is near."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
