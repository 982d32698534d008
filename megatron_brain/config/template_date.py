"""The date that chat templates write as today's: one moment for a whole run, on all ranks and after each resume."""

from datetime import datetime

from megatron_brain.errors import ConfigError


def now() -> str:
    """The local time in ISO 8601, without fractions of a second."""
    return datetime.now().isoformat(timespec="seconds")


def parse_date(text: str) -> datetime:
    """A date such as ``2026-11-30``, or with a time, ``2026-11-30T12:00``.

    Raises:
        ConfigError: the text is no date, or has a time zone, which templates do not use.
    """
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        date = None
    if date is None or date.tzinfo is not None:
        raise ConfigError(
            f"template_date={text}: must be a date such as 2026-11-30, or with a time as 2026-11-30T12:00, no time zone"
        )
    return date
