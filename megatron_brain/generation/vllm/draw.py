"""Draws one replica's responses from the servers, and proves that each came from the weights it should."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence

from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential_jitter

from megatron_brain.config.stages import SamplingConfig
from megatron_brain.errors import UserError
from megatron_brain.generation.batch import Completion
from megatron_brain.generation.vllm.client import Server, UnavailableError
from megatron_brain.generation.vllm.handover import Giver, HandOver, Held
from megatron_brain.generation.vllm.spread import Request, Spread, Waiting

log = logging.getLogger(__name__)

_MOST_RESTARTS = 3
"""Restarts of one server in one round; after more of them the run stops."""


class NoAnswerError(UserError):
    """The servers gave no answer within the time limit. It names each server and what it said."""


class Drawing:
    """The responses of one round of one replica.

    Before the first request a server is proven to hold the weights of the last hand-over, and again after the last one.
    A server that has restarted is given them again, and what it answered since it was proven is drawn again, with the
    same seeds. A server that fails gets no requests until it is proven again.

    Args:
        held: what each server answered at the hand-over; the entries of servers that restart are replaced.
        most: requests under way to one server.
        first: the server that is asked first.
        timeout: longest wait for one response with all repetitions, in seconds.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        held: list[Held],
        *,
        giver: Giver,
        hand_over: HandOver,
        sampling: SamplingConfig,
        vocab_size: int,
        most: int,
        first: int,
        timeout: float,
    ) -> None:
        self._servers, self._held, self._giver, self._hand_over = servers, held, giver, hand_over
        self._sampling, self._vocab_size, self._timeout = sampling, vocab_size, timeout
        self._most = most
        self._spread = Spread(len(servers), most=most, first=first)
        self._restarts = [0] * len(servers)
        self._proofs: dict[int, asyncio.Task[None]] = {}
        self._found: dict[int, tuple[int, Completion]] = {}
        """By its place, the server that gave a response, and the response."""

    async def draw(self, requests: Sequence[Request]) -> list[Completion]:
        """The responses, in the order of the requests.

        Raises:
            NoAnswerError: no server answers for longer than the time limit, or a server restarts again and again.
            UserError: a server answers what it must not, or holds other weights.
        """
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for server in range(len(self._servers)):
                    self._prove(server)
                watch = group.create_task(self._watch())
                while missing := [request for request in requests if request.place not in self._found]:
                    await self._ask_all(missing)
                    await self._prove_answers()
                watch.cancel()
                for proof in self._proofs.values():
                    proof.cancel()
        except BaseExceptionGroup as errors:
            raise first_error(errors) from errors
        return [self._found[request.place][1] for request in requests]

    async def _ask_all(self, requests: Sequence[Request]) -> None:
        waiting = Waiting(requests)

        async def ask_next() -> None:
            while waiting:
                server = await self._spread.take()
                if not waiting:  # The last request was taken while this waited for a place.
                    await self._spread.give_back(server)
                    return
                await self._ask_until_answered(server, waiting.take(server))

        # No more at one time than have a place: one that is asked again gets the next place, not the last.
        count = min(len(requests), self._most * len(self._servers))
        await asyncio.gather(*(self._group.create_task(ask_next()) for _ in range(count)))

    async def _ask_until_answered(self, server: int, request: Request) -> None:
        """Ask a server at which a place was taken, and others if it fails."""
        try:
            async with asyncio.timeout(self._timeout):
                async for attempt in AsyncRetrying(
                    retry=retry_if_exception_type(UnavailableError),
                    wait=wait_exponential_jitter(initial=0.05, max=5, jitter=0.1),
                ):
                    with attempt:
                        if attempt.retry_state.attempt_number > 1:
                            server = await self._spread.take()
                        await self._ask(server, request)
        except TimeoutError:
            raise NoAnswerError(self._said(f"no response within --engine-timeout {self._timeout:g} s")) from None

    async def _ask(self, server: int, request: Request) -> None:
        """Ask a server at which a place was taken."""
        started = self._held[server].start_time
        try:
            completion = await self._servers[server].complete(
                self._giver.model,
                request.prompt,
                seed=request.seed,
                sampling=self._sampling,
                eos_id=self._giver.eos_id,
                vocab_size=self._vocab_size,
            )
        except UnavailableError as fault:
            if self._spread.open[server]:
                log.warning("%s; it gets no requests until it is seen to be well", fault)
                self._prove(server)
            raise
        finally:
            await self._spread.give_back(server)
        # A process that has ended meanwhile may have given this answer, even if another one was proven since.
        if self._held[server].start_time == started:
            self._found[request.place] = (server, completion)
        else:
            raise UnavailableError(self._servers[server].url, "restarted while it answered")

    def _prove(self, server: int) -> None:
        """Close a server until it is proven to hold the weights."""
        self._spread.close(server)
        running = self._proofs.get(server)
        if running is None or running.done():
            self._proofs[server] = self._group.create_task(self._reopen_when_proven(server))

    async def _reopen_when_proven(self, server: int) -> None:
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(UnavailableError),
            wait=wait_exponential_jitter(initial=0.1, max=10, jitter=0.2),
        ):
            with attempt:
                await self._prove_once(server)
        await self._spread.reopen(server)

    async def _prove_once(self, server: int) -> None:
        """Prove that a server holds the weights, or give it them again if it has restarted.

        Raises:
            UnavailableError: it does not answer.
            UserError: it holds other weights though it has not restarted, or does not take them.
        """
        if await self._giver.require(self._servers[server], self._held[server]):
            return
        url = self._servers[server].url
        self._restarts[server] += 1
        if self._restarts[server] > _MOST_RESTARTS:
            raise NoAnswerError(
                f"{url}: has restarted {self._restarts[server]} times in one round. Look at its log; start it again, "
                "or leave it out of --engine-url"
            )
        log.warning("%s: has restarted; it gets the weights of %s again", url, self._hand_over.folder)
        held = await self._give_again(server)
        # Not earlier: a request that was under way may have been answered with the weights of the start meanwhile.
        self._forget_answers(server)
        self._held[server] = held

    async def _give_again(self, server: int) -> Held:
        """Give a restarted server the weights. Of the replicas that see the restart, one does it; the others wait."""
        start_time = await self._servers[server].start_time()
        mark = self._hand_over.folder.with_name(f"{self._hand_over.folder.name}-{server}-{start_time}.restored")
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return await self._giver.wait_until_given(self._servers[server], self._hand_over)
        return await self._giver.give(self._servers[server], self._hand_over)

    async def _prove_answers(self) -> None:
        """Prove the servers that have answered; forget what those have answered that cannot be proven now."""
        used = sorted({server for server, _ in self._found.values()})
        checked = [server for server in used if self._spread.open[server]]
        results = await asyncio.gather(*map(self._is_proven, checked))
        proven = {server for server, good in zip(checked, results, strict=True) if good}
        for server in used:
            if server not in proven:
                self._forget_answers(server)

    async def _is_proven(self, server: int) -> bool:
        try:
            await self._prove_once(server)
        except UnavailableError as fault:
            log.warning("%s; what it has answered is drawn again", fault)
            self._prove(server)
            return False
        return True

    def _forget_answers(self, server: int) -> None:
        self._found = {place: found for place, found in self._found.items() if found[0] != server}

    async def _watch(self) -> None:
        """Raise when no server has been open for the time limit."""
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            await asyncio.sleep(min(0.2, self._timeout / 10))
            if any(self._spread.open):
                last = loop.time()
            elif loop.time() - last > self._timeout:
                raise NoAnswerError(self._said(f"no server answers for --engine-timeout {self._timeout:g} s"))

    def _said(self, what: str) -> str:
        told = "; ".join(f"{server.url} said: {server.last_fault or 'nothing'}" for server in self._servers)
        return f"{what}. {told}. Look at the servers' logs, and start them again"


def first_error(errors: BaseExceptionGroup) -> BaseException:
    """The first error of a group, or of a group in it; one that tells the user what to do goes before others."""
    flat: list[BaseException] = []
    for error in errors.exceptions:
        flat.append(first_error(error) if isinstance(error, BaseExceptionGroup) else error)
    return next((error for error in flat if isinstance(error, UserError)), flat[0])
