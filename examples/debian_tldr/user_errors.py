"""Errors of these scripts that a user can mend. The module needs only the standard library, so it runs anywhere."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """What the user asked for, or what exists, cannot work. The message says what would be right."""


def run(main: Callable[[], None]) -> None:
    """Run a script. For an error of the user, a file or the network, print only the message and exit with status 2.
    Other errors keep their traceback.
    """
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
