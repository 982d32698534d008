"""What chat templates that write the date take for now: one moment for a run, on all its ranks and all its days."""

from datetime import datetime

from megatron_brain.errors import ConfigError


def now() -> str:
    """The local time in ISO 8601, to the second."""
    return datetime.now().isoformat(timespec="seconds")


def parse_date(text: str) -> datetime:
    """A date such as ``2026-11-30``, or with a time, ``2026-11-30T12:00``.

    Raises:
        ConfigError: it is none, or has a time zone, which templates do not ask for.
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
