"""Gives servers the weights of a folder, and proves that they have them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential_jitter

from megatron_brain.errors import UserError
from megatron_brain.generation.engine import Prompt
from megatron_brain.generation.vllm.client import Server, UnavailableError
from megatron_brain.generation.vllm.probes import Expected, Values, mean_difference

_PATIENCE = 30.0
"""Seconds for which a step is repeated whose failure the server itself tells: a new folder may take a while to be seen
by all machines, and the prefix cache is held while requests end."""
_CURE = "Look at its log; start it again, or leave it out of --engine-url"

_POLL = 0.5
"""Seconds between looks at a server that another replica gives weights."""

T = TypeVar("T")


class HandOverError(UserError):
    """A server did not take weights over, or holds other ones than it should. It names the server and the cure."""


@dataclass(frozen=True, kw_only=True)
class HandOver:
    """One hand-over of weights.

    label: the servers keep it, so it is one that no other run uses.
    expected: known when the trainer has scored the probes, which it does while the servers load.
    """

    label: str
    folder: Path
    expected: Future[Expected]


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a server answered when it was proven to hold the weights of a hand-over.

    weights_label: None where this vLLM keeps none.
    """

    start_time: float
    weights_label: str | None
    probes: Values


@dataclass(frozen=True, kw_only=True)
class Giver:
    """Gives weights to servers.

    Args:
        timeout: longest hand-over to one server with all repetitions, in seconds.
        limit: largest mean difference between a server's and the trainer's log-probs, in nats per token.
    """

    model: str
    probes: Sequence[Prompt]
    eos_id: int
    timeout: float
    limit: float

    async def give(self, server: Server, hand_over: HandOver) -> Held:
        """Let a server load the weights, and verify that it has.

        Raises:
            HandOverError: a step fails for longer than it may, or the server holds other weights.
        """
        try:
            async with asyncio.timeout(self.timeout):
                while True:
                    started = await self._step(server.start_time)
                    await self._load(server, hand_over)
                    held = await self._look(server)
                    if held.start_time == started:
                        break
        except TimeoutError:
            raise HandOverError(
                f"{server.url}: did not take over the weights of {hand_over.folder} within --engine-timeout "
                f"{self.timeout:g} s; last it said: {server.last_fault or 'nothing'}. {_CURE}"
            ) from None
        except UnavailableError as fault:
            raise HandOverError(
                f"{fault}: it could not take over the weights of {hand_over.folder}. {_CURE}"
            ) from fault
        expected = await asyncio.wrap_future(hand_over.expected)
        if (problem := expected.problem(held.probes, self.limit)) is not None:
            raise HandOverError(
                f"{server.url}: {problem}. Does the server share the model's output layer with its embedding? Then "
                "start it from an untied export of this run's model (megatron-brain-convert megatron-to-hf --untie). "
                "Or has another client given it weights?"
            )
        return held

    async def wait_until_given(self, server: Server, hand_over: HandOver) -> Held:
        """Wait until another replica has given a server the weights.

        Raises:
            HandOverError: it has not within the time limit.
        """
        try:
            async with asyncio.timeout(self.timeout):
                while True:
                    held = await self._look(server)
                    named = held.weights_label in (None, hand_over.label)
                    if named and hand_over.expected.result().problem(held.probes, self.limit) is None:
                        return held
                    await asyncio.sleep(_POLL)
        except TimeoutError:
            raise HandOverError(
                f"{server.url}: restarted, and has not got the weights of {hand_over.folder} again within "
                f"--engine-timeout {self.timeout:g} s; last it said: {server.last_fault or 'nothing'}. Look at its log"
            ) from None

    async def require(self, server: Server, held: Held) -> bool:
        """Whether a server is still the process that held these weights; then it must still hold them.

        Raises:
            UnavailableError: it does not answer.
            HandOverError: it did not restart, and holds other weights: another trainer gave it some.
        """
        if await server.start_time() != held.start_time:
            return False
        label = await server.weights_label()
        if label != held.weights_label:
            raise HandOverError(
                f"{server.url}: holds the weights {label!r}, and this run gave it {held.weights_label!r}: another "
                "trainer uses this server. Give each run servers of its own"
            )
        found = [await server.prompt_logprobs(self.model, self.probes[0], eos_id=self.eos_id)]
        # The same weights on the same server: only the other requests of a batch change the rounding.
        if (difference := mean_difference(found, held.probes[:1])) > self.limit / 2:
            raise HandOverError(
                f"{server.url}: holds other weights than this run gave it, and did not restart: its log-probabilities "
                f"of a probe have changed by {difference:.3g} nats per token. Another trainer or client uses this "
                "server. Give each run servers of its own"
            )
        return True

    async def _load(self, server: Server, hand_over: HandOver) -> None:
        await self._step(server.pause)
        await self._reload(server, hand_over.folder)
        await self._reset(server)
        await self._step(lambda: server.name_weights(hand_over.label))
        await self._step(server.resume)

    async def _look(self, server: Server) -> Held:
        async def probe(prompt: Prompt) -> list[float]:
            return await self._step(lambda: server.prompt_logprobs(self.model, prompt, eos_id=self.eos_id))

        return Held(
            start_time=await self._step(server.start_time),
            weights_label=await self._step(server.weights_label),
            probes=await asyncio.gather(*map(probe, self.probes)),
        )

    async def _reload(self, server: Server, folder: Path) -> None:
        try:
            await self._step(lambda: server.reload(folder))
        except UnavailableError as fault:
            raise HandOverError(
                f"{fault}: it could not read {folder}. Does its machine see this folder under the same name "
                "(--engine-sync-dir must be shared storage), and does it serve an export of this run's model? Start "
                "the server again: after a failed reload it has no weights"
            ) from fault

    async def _reset(self, server: Server) -> None:
        try:
            await self._step(server.reset_prefix_cache)
        except UnavailableError as fault:
            raise HandOverError(
                f"{fault}: its prefix cache still has results of the earlier weights, so its responses would mix both. "
                "Do other clients use this server? Give the run servers of its own, or start it with "
                "--no-enable-prefix-caching"
            ) from fault

    async def _step(self, step: Callable[[], Awaitable[T]]) -> T:
        """Do one step, and repeat it while the server is away, or for a while when it says that it failed."""
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(UnavailableError),
            stop=self._stop,
            wait=wait_exponential_jitter(initial=0.1, max=5, jitter=0.1),
            reraise=True,
        ):
            with attempt:
                return await step()
        raise AssertionError("a step ends with a result or an error")

    def _stop(self, state: RetryCallState) -> bool:
        fault = state.outcome.exception() if state.outcome is not None else None
        answered = isinstance(fault, UnavailableError) and fault.answered
        elapsed = state.seconds_since_start or 0.0
        return elapsed > (min(_PATIENCE, self.timeout / 2) if answered else self.timeout)
