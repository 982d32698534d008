"""The engine of vLLM servers: it hands weights over to them, and draws responses with them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_brain.config.engine import EngineConfig
from megatron_brain.config.stages import SamplingConfig
from megatron_brain.errors import ConfigError
from megatron_brain.generation.batch import Completion
from megatron_brain.generation.engine import Prompt
from megatron_brain.generation.vllm.client import Server, UnavailableError
from megatron_brain.generation.vllm.draw import Drawing, first_error
from megatron_brain.generation.vllm.folders import SyncFolders
from megatron_brain.generation.vllm.handover import Giver, HandOver, Held
from megatron_brain.generation.vllm.jobs import Job, wait_together
from megatron_brain.generation.vllm.opening import open_servers, require_processed_logprobs
from megatron_brain.generation.vllm.probes import Expected, Values, mean_difference
from megatron_brain.generation.vllm.spread import Request
from megatron_brain.models.gpt import PolicyModel
from megatron_brain.runtime.parallel import Parallel

log = logging.getLogger(__name__)

_LOWEST_TEMPERATURE = 0.01
"""vLLM draws at this temperature where a lower one is asked for, unless it is 0."""

T = TypeVar("T")

_Drawn = tuple[list[list[Completion]], float]
"""The responses, and the seconds that they took."""


class PendingResponses:
    """Responses that servers draw in the background. `result` must be called once, by all ranks together."""

    def __init__(self, engine: VllmEngine, job: Job[_Drawn] | None) -> None:
        self._engine, self._job = engine, job
        self.seconds = 0.0

    def result(self) -> list[list[Completion]]:
        """Wait for the responses. A signal to stop does not end the wait.

        Raises:
            AgreedError: on all ranks: see `VllmEngine.sample`.
        """
        return self._take(stoppable=False)

    def _take(self, *, stoppable: bool) -> list[list[Completion]]:
        responses, self.seconds = self._engine._wait(self._job, stoppable=stoppable)
        return responses


class VllmEngine:
    """Draws responses with `vllm serve` processes over HTTP. docs/engines.md says what is checked and when.

    One rank of each replica talks to the servers about its replica's prompts, and rank 0 about weights; the others wait
    with it. All ranks make this object together, which waits until all servers answer.

    Args:
        settings: addresses, folder and time limits.
        eos_id: token that ends a response.
        vocab_size: of the tokenizer; a server must give no other tokens.
        longest_sequence: most tokens of a prompt and its response together.
        write: makes a folder of the weights that a server can load; all ranks call it together.
        probes: token ids of a few fixed texts of at least two tokens, the same on all ranks.
        score: the trainer's log-probabilities of the probes; all ranks call it together and get the same.

    Raises:
        AgreedError: on all ranks: a server does not answer within the time limit, has another model than the others,
            or cannot be given weights; or the folder cannot be written to.
        Interrupted: on all ranks: one got a stop signal.
    """

    keeps_weights = True

    def __init__(
        self,
        settings: EngineConfig,
        parallel: Parallel,
        *,
        eos_id: int,
        vocab_size: int,
        longest_sequence: int,
        write: Callable[[Sequence[PolicyModel], Path], None],
        probes: Sequence[Prompt],
        score: Callable[[Sequence[PolicyModel], Sequence[Prompt]], list[list[float]]],
    ) -> None:
        assert settings.engine_sync_dir is not None, "engine=vllm needs engine_sync_dir"
        self._settings, self._parallel = settings, parallel
        self._eos_id, self._vocab_size, self._probes = eos_id, vocab_size, probes
        self._write, self._score = write, score
        self.holds: str | None = None
        self.difference: float | None = None
        """Largest mean difference between a server's and the trainer's log-probs at the last hand-over, in nats per
        token."""
        self._held: list[Held] = []
        self._hand_over: HandOver | None = None
        self._run_id = parallel.gather_over_world(
            f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}", parallel.host_group()
        )[0]
        self._folders = SyncFolders(settings.engine_sync_dir, self._run_id, parallel)
        model = self._on_first(lambda: self._open(longest_sequence), what="waiting for the vLLM servers (--engine-url)")
        self._giver = Giver(
            model=model,
            probes=probes,
            eos_id=eos_id,
            timeout=settings.engine_timeout,
            limit=settings.max_engine_difference,
        )

    def require_processed_logprobs(self) -> None:
        """Require that the servers' log-probabilities are those of the distribution that they draw from.

        Raises:
            AgreedError: on all ranks: a server gives those of before temperature, top-k and top-p.
        """

        async def ask() -> None:
            async with self._servers(1) as servers:
                for server in servers:
                    await require_processed_logprobs(server, self._giver.model, self._probes[0], eos_id=self._eos_id)

        self._on_first(ask, what="checking --logprobs-mode")

    def take_weights(self, chunks: Sequence[PolicyModel], label: str) -> None:
        """Hand this policy over to all servers, and verify that they have it. All ranks call it together.

        Raises:
            AgreedError: on all ranks: the folder cannot be written, or a server does not take the weights over, holds
                others afterwards, or got others from another trainer before.
            Interrupted: on all ranks: one got a stop signal.
        """
        self.holds = None
        start = time.perf_counter()
        folder = self._folders.write(lambda place: self._write(chunks, place))
        written = time.perf_counter()
        hand_over = HandOver(label=f"{self._run_id}/{folder.name} ({label})", folder=folder, expected=Future())
        job = Job(self._give(hand_over)) if self._parallel.is_writer else None
        values = self._expect(hand_over, chunks, label)
        self._held = self._from_first(job, what=f"the vLLM servers took the weights over ({label})")
        self._hand_over, self.holds = hand_over, label
        self.difference = max(mean_difference(held.probes, values) for held in self._held)
        self._folders.remove_old()
        if self._parallel.is_writer:
            log.info(
                "%d vLLM servers hold the weights of %s: written in %.1f s, loaded and verified in %.1f s; they differ "
                "from the trainer by %.3g nats per token",
                len(self._held),
                label,
                written - start,
                time.perf_counter() - written,
                self.difference,
            )

    def _expect(self, hand_over: HandOver, chunks: Sequence[PolicyModel], label: str) -> Values:
        """Score the probes while the servers load. Whatever happens, what waits for the values hears of it."""
        before = None if self._hand_over is None else self._hand_over.expected.result()
        try:
            values = self._score(chunks, self._probes)
        except BaseException as error:
            hand_over.expected.set_exception(error)
            raise
        hand_over.expected.set_result(
            Expected(
                label=label,
                values=values,
                label_before=None if before is None else before.label,
                values_before=None if before is None else before.values,
            )
        )
        return values

    def sample(
        self, prompts: Sequence[Prompt], *, seeds: Sequence[Sequence[int]], sampling: SamplingConfig
    ) -> list[list[Completion]]:
        """Draw responses, as `Engine.sample` says.

        Raises:
            AgreedError: on all ranks: no server answers within the time limit, or one answers what it must not, or
                holds other weights.
            Interrupted: on all ranks: one got a stop signal.
        """
        return self.begin(prompts, seeds=seeds, sampling=sampling)._take(stoppable=True)

    def begin(
        self, prompts: Sequence[Prompt], *, seeds: Sequence[Sequence[int]], sampling: SamplingConfig
    ) -> PendingResponses:
        """Begin what `sample` does. Weights must not be given before the result is taken."""
        assert self._hand_over is not None, "the servers were given no weights"
        if 0 < sampling.temperature < _LOWEST_TEMPERATURE:
            raise ConfigError(
                f"temperature={sampling.temperature}: vLLM draws at {_LOWEST_TEMPERATURE} instead; use that, or 0"
            )
        job = Job(self._draw(prompts, seeds, sampling)) if self._parallel.leads_replica else None
        return PendingResponses(self, job)

    def _wait(self, job: Job[_Drawn] | None, *, stoppable: bool) -> _Drawn:
        """The result of the job of this replica's leading rank, on all its ranks."""
        found = [wait_together(job, self._parallel, what="the vLLM servers drew responses", stoppable=stoppable)]
        group = self._parallel.groups.mp
        dist.broadcast_object_list(found, src=dist.get_process_group_ranks(group)[0], group=group)
        assert found[0] is not None
        return found[0]

    async def _draw(
        self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]], sampling: SamplingConfig
    ) -> _Drawn:
        assert self._hand_over is not None
        start = time.perf_counter()
        # Each response is a request of its own: of several in one request vLLM seeds the k-th with seed + k.
        pairs = [(prompt, seed) for prompt, of_prompt in zip(prompts, seeds, strict=True) for seed in of_prompt]
        requests = [Request(place=place, prompt=prompt, seed=seed) for place, (prompt, seed) in enumerate(pairs)]
        most = max(1, self._settings.engine_concurrency // self._parallel.dp_size)
        async with self._servers(most + 1) as servers:  # One more, for what proves a server.
            drawing = Drawing(
                servers,
                self._held,
                giver=self._giver,
                hand_over=self._hand_over,
                sampling=sampling,
                vocab_size=self._vocab_size,
                most=most,
                first=self._parallel.dp_rank,
                timeout=self._settings.engine_timeout,
            )
            drawn = iter(await drawing.draw(requests))
        return [[next(drawn) for _ in of_prompt] for of_prompt in seeds], time.perf_counter() - start

    async def _open(self, longest_sequence: int) -> str:
        async with self._servers(1) as servers:
            return await open_servers(servers, longest_sequence, timeout=self._settings.engine_timeout)

    async def _give(self, hand_over: HandOver) -> list[Held]:
        async def give(server: Server, held: Held | None) -> Held:
            if held is not None:
                # A server that does not answer is waited for when it is given the weights.
                with contextlib.suppress(UnavailableError):
                    await self._giver.require(server, held)
            return await self._giver.give(server, hand_over)

        async with self._servers(len(self._probes)) as servers:
            before: list[Held | None] = [*self._held] or [None] * len(servers)
            try:
                async with asyncio.TaskGroup() as group:
                    given = [group.create_task(give(*pair)) for pair in zip(servers, before, strict=True)]
            except BaseExceptionGroup as errors:
                raise first_error(errors) from errors
        return [task.result() for task in given]

    @contextlib.asynccontextmanager
    async def _servers(self, connections: int) -> AsyncIterator[list[Server]]:
        """The servers, with connections that are closed at the end."""
        async with contextlib.AsyncExitStack() as stack:
            yield [
                await stack.enter_async_context(
                    Server(
                        url,
                        request_timeout=self._settings.engine_request_timeout,
                        slow_timeout=self._settings.engine_timeout,
                        connections=connections,
                    )
                )
                for url in self._settings.urls
            ]

    def _on_first(self, work: Callable[[], Coroutine[Any, Any, T]], *, what: str) -> T:
        """What a coroutine returns on rank 0, on all ranks."""
        return self._from_first(Job(work()) if self._parallel.is_writer else None, what=what)

    def _from_first(self, job: Job[T] | None, *, what: str) -> T:
        """What rank 0's job returns, on all ranks."""
        found = wait_together(job, self._parallel, what=what)
        on_first: T = self._parallel.gather_over_world(found, self._parallel.host_group())[0]  # type: ignore[assignment]
        return on_first
