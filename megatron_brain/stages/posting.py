"""POST requests with a JSON object, sent again while their problem may pass."""

import json
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
import tenacity

_PASSING = (408, 425, 429)
"""Statuses below 500 that say that the same request may work later."""

_PAUSE = tenacity.wait_exponential_jitter(initial=0.2, max=10, jitter=0.2)


class _PassingError(Exception):
    """A request failed in a way that may pass; `pause` is the shortest one in seconds that the server asks for."""

    def __init__(self, said: str, pause: float = 0.0) -> None:
        super().__init__(said)
        self.pause = pause


async def post_until_answered(
    client: httpx2.AsyncClient,
    url: str,
    body: Mapping[str, Any],
    *,
    note: Callable[[str], None],
    headers: Mapping[str, str] | None = None,
) -> httpx2.Response:
    """The answer to a POST request, whatever its status is, unless the status says that there may be another later.

    The request is sent again without end, after a pause that grows, where the server cannot be reached, does not
    answer within the client's limit, sends what cannot be decoded, or answers with a status of 500 or more, 408, 425 or
    429. No pause is shorter than the server's `Retry-After`.

    Args:
        note: gets each such problem in words.
        headers: further headers.
    """
    content = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    sent = {"content-type": "application/json", **(headers or {})}
    async for attempt in tenacity.AsyncRetrying(retry=tenacity.retry_if_exception_type(_PassingError), wait=_wait):
        with attempt:
            try:
                return await _post(client, url, content, sent)
            except _PassingError as error:
                note(str(error))
                raise
    raise AssertionError("attempts have no end of their own")


def _wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return max(_PAUSE(state), error.pause if isinstance(error, _PassingError) else 0.0)


async def _post(client: httpx2.AsyncClient, url: str, content: bytes, headers: Mapping[str, str]) -> httpx2.Response:
    """The answer to one request.

    Raises:
        _PassingError: there was none, or its status says that there may be another one later.
    """
    try:
        reply = await client.post(url, content=content, headers=dict(headers))
    except httpx2.RequestError as error:
        raise _PassingError(f"{type(error).__name__} {error}".rstrip()) from error
    if reply.status_code >= 500 or reply.status_code in _PASSING:
        pause = _seconds(reply.headers.get("retry-after", ""))
        raise _PassingError(f"status {reply.status_code}: {reply.text[:300]}", pause)
    return reply


def _seconds(retry_after: str) -> float:
    """The pause that a `Retry-After` header asks for: seconds, or a date (RFC 9110). 0 where it is neither."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0
