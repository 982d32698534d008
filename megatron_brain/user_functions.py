"""Loads and calls functions that a user gives as ``path/to/file.py:function``, and reports their errors as theirs."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import faulthandler
import importlib.util
import inspect
import math
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_brain.errors import ConfigError, short


class UserFunctionError(ConfigError):
    """A user's function raised an error or returned a wrong value; the message holds the function's traceback."""


_GRACE = 20.0
"""Seconds that a function which does not react to the end of its time has before the whole process is ended."""


class _OutOfTimeError(BaseException):
    """Raised inside of a function whose time is over. It is no Exception, so that `except Exception` lets it pass."""


class ScoringFunction:
    """A user's function of three lists of length n that returns n numbers, or a coroutine function.

    A judge gets prompts, responses and references, which are texts. A reward function gets prompts, responses and
    records, which are dicts. It runs in the main thread of this process.

    Args:
        name: ``path/to/file.py:function``.
        flag: the flag that gave it, for error messages.
        timeout: longest time of a call in seconds, all calls that look for a failing record included, and the flag that
            set it; None: any time. When it is over, SIGALRM interrupts the function where it is. A function that does
            not return to Python's interpreter (in a library in C) cannot be interrupted: 20 seconds later the process
            prints the stacks of its threads and ends.

    Raises:
        ConfigError: no such file or function.
        UserFunctionError: the file raises an error when it is imported.
    """

    def __init__(self, name: str, flag: str, *, timeout: tuple[float, str] | None = None) -> None:
        self._what, self._timeout = f"{flag}={name}", timeout
        path, _, function = name.rpartition(":")
        if not path or not Path(path).is_file():
            raise ConfigError(f"{self._what}: give path/to/file.py:function; {path or name} is no file")
        self._path = str(Path(path).resolve())
        stem = Path(path).stem
        spec = importlib.util.spec_from_file_location(f"{stem}_of_user" if stem in sys.modules else stem, self._path)
        if spec is None or spec.loader is None:
            raise ConfigError(f"{self._what}: {path} is no Python file (.py)")
        module = importlib.util.module_from_spec(spec)
        # Python does the same for a script: dataclasses, pickle and process pools look a module up by its name, and it
        # can import files beside it. Its folder comes last in the path, so that none of them replaces a package.
        sys.modules[spec.name] = module
        sys.path.append(str(Path(self._path).parent))
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise self._raised(error, "when it was imported") from error
        if not callable(getattr(module, function, None)):
            raise ConfigError(f"{self._what}: {path} has no function {function}; give path/to/file.py:function")
        self._function: Callable[[list[str], list[str], list[Any]], Any] = getattr(module, function)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], others: Sequence[Any], ids: Sequence[str]
    ) -> list[float]:
        """The function's scores of the responses.

        Args:
            others: references or records.
            ids: names of the records, for error messages.

        Raises:
            UserFunctionError: the function raised an error, took too long, or did not return one finite number for each
                response; names the record.
        """
        columns: tuple[list[Any], ...] = (list(prompts), list(responses), list(others))
        try:
            with self._limited():
                scores = self._scores_or_error(columns, ids)
        except _OutOfTimeError as error:
            assert self._timeout is not None
            seconds, flag = self._timeout
            told = self._traceback(error).rstrip() or "  in an event loop, while nothing of it ran"
            raise UserFunctionError(
                f"{self._what} did not score the {len(ids)} responses to the records {ids[0]} to {ids[-1]} within "
                f"{flag} {seconds:g} seconds; it was interrupted here:\n{told}"
            ) from error
        if not isinstance(scores, list):
            raise UserFunctionError(
                f"{self._what} returned {type(scores).__name__}; it must return one number for each response, in order"
            )
        if len(scores) != len(ids):
            raise UserFunctionError(
                f"{self._what} returned {len(scores)} scores for {len(ids)} responses; it must return one for each"
            )
        return [self._finite(score, record) for score, record in zip(scores, ids, strict=True)]

    def _scores_or_error(self, columns: tuple[list[Any], ...], ids: Sequence[str]) -> Any:
        """The function's result. An error is raised as one that names the record."""
        try:
            return self._scores(*columns)
        except (Exception, SystemExit) as error:
            raise self._raised(*self._first_failing(columns, ids, error)) from error

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        """Inside of the context, which the main thread enters, `_OutOfTimeError` is raised when the time is over."""
        if self._timeout is None:
            yield
            return
        seconds, _ = self._timeout

        def interrupt(number: int, frame: FrameType | None) -> None:
            raise _OutOfTimeError

        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        faulthandler.dump_traceback_later(seconds + _GRACE, exit=True, file=2)  # 2: standard error
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGALRM, before)

    def _scores(self, *columns: list[Any]) -> Any:
        """The function's result, as a list if it has an order. A generator may raise its error only here."""
        # A function may change what it gets. Other calls, and other responses to the same record, must not see that.
        scores = self._function(*([copy.deepcopy(item) for item in column] for column in columns))
        if inspect.isawaitable(scores):
            scores = asyncio.run(_wait_for(scores))
        has_order = isinstance(scores, Iterable) and not isinstance(scores, (str, bytes, Mapping, Set))
        return list(scores) if has_order else scores

    def _finite(self, score: Any, record: str) -> float:
        try:
            number = float(score)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or isinstance(score, str):
            raise UserFunctionError(
                f"{self._what} returned {short(score)} for the response to {record}; it must be a finite number"
            )
        return number

    def _first_failing(
        self, columns: tuple[list[Any], ...], ids: Sequence[str], error: BaseException
    ) -> tuple[BaseException, str]:
        """The error that the function raises for one record alone, and that record, found by bisection.

        The function sees about as many records again as it failed on. More calls could cost much time or money.
        """
        start, end = 0, len(ids)
        while end - start > 1:
            middle = (start + end) // 2
            found = self._error_on(columns, start, middle)
            if found is not None:
                end, error = middle, found
            else:
                start = middle  # It is in the other half, or in both together.
        found = self._error_on(columns, start, end)
        if found is None:
            return error, f"on the records {ids[0]} to {ids[-1]} together" if ids else "on no records"
        return found, f"on the record {ids[start]}"

    def _error_on(self, columns: tuple[list[Any], ...], start: int, end: int) -> BaseException | None:
        try:
            self._scores(*(column[start:end] for column in columns))
        except (Exception, SystemExit) as error:
            return error
        return None

    def _raised(self, error: BaseException, where: str) -> UserFunctionError:
        """The error with the user's part of its traceback."""
        told = self._traceback(error) + "".join(traceback.format_exception_only(error))
        return UserFunctionError(
            f"{self._what} raised {type(error).__name__} {where}; its own traceback:\n{told.rstrip()}"
        )

    def _traceback(self, error: BaseException) -> str:
        """The user's part of the traceback of an error."""
        frames = traceback.extract_tb(error.__traceback__)
        own = next((place for place, frame in enumerate(frames) if frame.filename == self._path), len(frames))
        return "".join(traceback.format_list([frame for frame in frames[own:] if frame.filename != __file__]))


async def _wait_for(scores: Awaitable[Any]) -> Any:
    return await scores
