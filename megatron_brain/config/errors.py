"""The error a user's configuration gets."""


class ConfigError(ValueError):
    """A key, value or layout that cannot work; the message names it, where it was set and what would be right."""


class AgreedError(ConfigError):
    """A mistake that all ranks, being connected, know of in the same words: it is enough that one says it."""


class OwnError(ConfigError):
    """A mistake that one process alone may see, as in its own variables: it says so, whatever its rank."""
