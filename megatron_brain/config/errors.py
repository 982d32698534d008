"""The error a user's configuration gets."""


class ConfigError(ValueError):
    """A key, value or layout that cannot work; the message names it, where it was set and what would be right."""
