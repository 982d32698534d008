"""Errors of a conversion that are not mistakes in the request."""


class MismatchError(Exception):
    """The two models compute different results."""


class ConversionError(RuntimeError):
    """A process failed. All processes raise this error, and it names the rank that failed."""
