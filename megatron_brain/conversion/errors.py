"""What can go wrong in a conversion besides a mistake in what was asked for."""


class MismatchError(Exception):
    """The two models do not compute the same."""


class ConversionError(RuntimeError):
    """A process could not do its part; raised on all of them, with its rank."""
