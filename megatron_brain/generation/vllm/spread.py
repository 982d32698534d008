"""Spreads the prompts of a round over servers by load, and sends none to servers that failed."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_brain.generation.engine import Prompt


@dataclass(frozen=True, kw_only=True)
class Request:
    """One response to draw. `place`: its own among those of the round."""

    place: int
    prompt: Prompt
    seed: int


class Waiting:
    """Requests that wait for a server.

    A server gets all responses of a prompt if it can, because it then computes the prompt once. It gets the next prompt
    that nobody has begun when its own is used up, and takes from the one with most responses left when all are begun.
    """

    def __init__(self, requests: Iterable[Request]) -> None:
        self._of_prompt: dict[Prompt, deque[Request]] = {}
        for request in requests:
            self._of_prompt.setdefault(request.prompt, deque()).append(request)
        self._fresh = deque(self._of_prompt)
        self._own: dict[int, Prompt] = {}

    def __bool__(self) -> bool:
        return bool(self._of_prompt)

    def take(self, server: int) -> Request:
        """The next request for a server; there must be one."""
        own = self._own.get(server)
        if own is None or own not in self._of_prompt:
            own = self._fresh.popleft() if self._fresh else max(self._of_prompt, key=self._left)
            self._own[server] = own
        request = self._of_prompt[own].popleft()
        if not self._of_prompt[own]:
            del self._of_prompt[own]
        return request

    def _left(self, prompt: Prompt) -> int:
        return len(self._of_prompt[prompt])


class Spread:
    """Which server gets the next request: the one with the fewest of this replica's requests under way.

    All methods must be called in one event loop. A server is closed at first.

    Args:
        count: number of servers.
        most: how many requests may be under way to one server.
        first: the server that gets the first request where all are equal; replicas begin at other ones.
    """

    def __init__(self, count: int, *, most: int, first: int) -> None:
        self._most = most
        self._order = [(first + place) % count for place in range(count)]
        self._under_way = [0] * count
        self._open = [False] * count
        self._changed = asyncio.Condition()

    @property
    def open(self) -> Sequence[bool]:
        """For each server, whether it gets requests."""
        return self._open

    async def take(self) -> int:
        """Wait for a place at a server; `give_back` must follow. Who waits longest gets the first place."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._best() is not None)
            best = self._best()
            assert best is not None
            self._under_way[best] += 1
            return best

    async def give_back(self, server: int) -> None:
        """A request to the server has ended."""
        async with self._changed:
            self._under_way[server] -= 1
            self._changed.notify()

    def close(self, server: int) -> None:
        """Give the server no requests."""
        self._open[server] = False

    async def reopen(self, server: int) -> None:
        """Give the server requests from now on."""
        async with self._changed:
            self._open[server] = True
            self._changed.notify(self._most)

    def _best(self) -> int | None:
        free = [server for server in self._order if self._open[server] and self._under_way[server] < self._most]
        return min(free, key=lambda server: self._under_way[server], default=None)
