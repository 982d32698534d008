"""What is asked of the servers before a run gives them weights."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from megatron_brain.errors import UserError
from megatron_brain.generation.engine import Prompt
from megatron_brain.generation.vllm.answers import Served
from megatron_brain.generation.vllm.client import Server, UnavailableError

log = logging.getLogger(__name__)

_POLL = 0.5
_TOLD_EVERY = 30.0
_HOT = 2.0
"""The highest temperature that vLLM takes."""

T = TypeVar("T")


class ServersError(UserError):
    """The servers do not fit the run, or each other. It names the server and the cure."""


async def open_servers(servers: Sequence[Server], longest_sequence: int, *, timeout: float) -> str:
    """Wait until all servers answer, and require that they serve one model that is long enough.

    Returns:
        The name of the model.

    Raises:
        ServersError: a server does not answer within the time limit, or the servers do not fit.
    """
    deadline = time.monotonic() + timeout
    served = await asyncio.gather(*(_once_there(server, server.model, deadline, timeout) for server in servers))
    builds = await asyncio.gather(*(_once_there(server, server.build, deadline, timeout) for server in servers))
    await asyncio.gather(*(_once_there(server, server.start_time, deadline, timeout) for server in servers))
    _require_equal(servers, "serves the model", [model.name for model in served], "the same --served-model-name")
    _require_equal(servers, "is vLLM", builds, "the same version, or responses depend on which server draws them")
    for server, model in zip(servers, served, strict=True):
        _require_length(server, model, longest_sequence)
        if await _once_there(server, server.is_paused, deadline, timeout):
            log.warning("%s: was left paused, as by a run that was killed; it goes on", server.url)
            await _once_there(server, server.resume, deadline, timeout)
    return served[0].name


async def require_processed_logprobs(server: Server, model: str, prompt: Prompt, *, eos_id: int) -> None:
    """Require that a server's log-probabilities are those after temperature: they must be half as far apart at 2.

    Raises:
        ServersError: they are those of before.
    """
    cold, hot = [
        await server.first_token_logprobs(model, prompt, temperature=temperature, count=10, eos_id=eos_id)
        for temperature in (1.0, _HOT)
    ]
    # The answer also has the token that was drawn, which may be a less likely one.
    spread, shrunk = cold[0] - cold[9], hot[0] - hot[9]
    if shrunk > 0.75 * spread:
        raise ServersError(
            f"{server.url}: gives log-probabilities of before temperature, top-k and top-p, and --proposal-logprobs "
            "engine needs those of the distribution that it draws from: start it with --logprobs-mode "
            f"processed_logprobs (the likeliest and the tenth token are {spread:.3g} nats apart at temperature 1, and "
            f"{shrunk:.3g} at {_HOT:g})"
        )


async def _once_there(server: Server, ask: Callable[[], Awaitable[T]], deadline: float, timeout: float) -> T:
    """What a server answers, however long it takes to start within the time limit."""
    told_at = -_TOLD_EVERY
    while True:
        try:
            return await ask()
        except UnavailableError as fault:
            now = time.monotonic()
            if now > deadline:
                raise ServersError(
                    f"{fault}. No vLLM server answers at this address of --engine-url within --engine-timeout "
                    f"{timeout:g} s: is it started, and is the address right?"
                ) from fault
            if now - told_at >= _TOLD_EVERY:
                log.info("waiting for %s", fault)
                told_at = now
            await asyncio.sleep(min(_POLL, timeout / 10))


def _require_equal(servers: Sequence[Server], what: str, found: Sequence[str], cure: str) -> None:
    for server, value in zip(servers, found, strict=True):
        if value != found[0]:
            raise ServersError(
                f"{server.url} {what} {value!r}, and {servers[0].url} {found[0]!r}: start all servers with {cure}"
            )


def _require_length(server: Server, model: Served, longest_sequence: int) -> None:
    if model.longest < longest_sequence:
        raise ServersError(
            f"{server.url}: takes {model.longest} tokens of prompt and response, and the run needs {longest_sequence}: "
            f"start it with --max-model-len {longest_sequence}"
        )
