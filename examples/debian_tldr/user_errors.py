"""The errors of these scripts that are a user's to mend. Standard library only, as fetch_data.py runs anywhere."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """What was asked for, or what is there, cannot work. The message says what would be right."""


def run(main: Callable[[], None]) -> None:
    """Run a script. Of a user's error, and of a file or a network that fails, it prints the message alone and exits
    with status 2; other errors keep their traceback.
    """
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
