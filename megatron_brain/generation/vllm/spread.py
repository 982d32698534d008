"""Spreads requests over servers by load, and keeps them from servers that failed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence


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
