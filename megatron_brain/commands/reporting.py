"""How a command reports a mistake of the user: one message on standard error, and exit status 2."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from megatron_brain.errors import UserError
from megatron_brain.files import explained

USER_ERROR = 2
"""Exit status of a command after a mistake of the user."""

Arguments = ParamSpec("Arguments")


def reports_mistakes(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """A command's `main` that prints the message of a UserError and returns 2; other errors keep their traceback."""

    @functools.wraps(main)
    def reporting(*arguments: Arguments.args, **named: Arguments.kwargs) -> int:
        try:
            with explained():
                return main(*arguments, **named)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return USER_ERROR

    return reporting
