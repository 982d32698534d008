"""The error a user's configuration gets."""

import traceback
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


class ConfigError(ValueError):
    """A key, value or layout that cannot work; the message names it, where it was set and what would be right."""


class AgreedError(ConfigError):
    """An error that every rank raises with the same text. Rank 0 alone prints it."""


class OwnError(ConfigError):
    """An error that may concern this process alone, such as one in its own variables. Every rank prints it."""


def is_ours(error: ValueError) -> bool:
    """Whether this package raised the error on purpose, rather than a library it calls."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return _PACKAGE in raised_in.parents


def short(value: object) -> str:
    """A value for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
