"""Types of the tools' flags for argparse: numbers in a range. An error says which numbers are allowed."""

import argparse
import math


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _integer(text, least=1)


def whole(text: str) -> int:
    """An integer of at least 0."""
    return _integer(text, least=0)


def finite(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: must be a finite number")
    return value


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    value = finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0")
    return value


def _integer(text: str, *, least: int) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: must be an integer of at least {least}") from error
    if value < least:
        raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
    return value
