"""One vLLM server over HTTP: what is asked, and what its answers mean."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2

from megatron_brain.config.stages import SamplingConfig
from megatron_brain.errors import UserError
from megatron_brain.generation.batch import Completion
from megatron_brain.generation.engine import Prompt
from megatron_brain.generation.vllm import answers

_CONNECT_SECONDS = 10.0
_IDLE_SECONDS = 2.0
"""An idle connection is used no more after this time: vLLM closes it after 5 s, perhaps just when a request comes."""
_REPEATABLE = (408, 425, 429)
"""Statuses below 500 that say `not now`."""


class UnavailableError(Exception):
    """A server does not answer, or answers that it failed: the same request may work later, or at another server.

    Attributes:
        url: address of the server.
        said: what it said, or what became of the connection.
        answered: whether the server itself said it.
    """

    def __init__(self, url: str, said: str, *, answered: bool = False) -> None:
        super().__init__(url, said)
        self.url, self.said, self.answered = url, said, answered

    def __str__(self) -> str:
        return f"{self.url}: {self.said}"


class RefusedError(UserError):
    """A server is not what the run needs, or was asked what it cannot do: repeating the request is no cure."""


class Server:
    """One server. It is an async context manager, in which the connections to the server are kept.

    Args:
        url: http://host:port.
        request_timeout: longest wait for the answer to a request that generates, in seconds.
        slow_timeout: longest wait for the answer to a request that loads weights or waits for others.
        connections: how many requests may be under way at one time.

    Attributes:
        last_fault: what it said, or what became of the connection, when it failed last; None if it never did.
    """

    def __init__(self, url: str, *, request_timeout: float, slow_timeout: float, connections: int) -> None:
        self.url = url
        self.last_fault: str | None = None
        self._request_timeout, self._slow_timeout = request_timeout, slow_timeout
        # The servers are the run's own: a proxy of the environment is meant for the world outside.
        self._http = httpx2.AsyncClient(
            base_url=url,
            trust_env=False,
            verify=url.startswith("https://"),  # Reading the certificates takes 20 ms a server.
            timeout=httpx2.Timeout(None, connect=min(_CONNECT_SECONDS, request_timeout)),
            limits=httpx2.Limits(
                max_connections=connections,
                max_keepalive_connections=connections,
                keepalive_expiry=_IDLE_SECONDS,
            ),
        )

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def model(self) -> answers.Served:
        """The model that the server serves."""
        return answers.read_served(self.url, await self._json("GET", "/v1/models"))

    async def build(self) -> str:
        """The version of vLLM."""
        return str((await self._json("GET", "/version")).get("version"))

    async def start_time(self) -> float:
        """When the server's process started, in seconds since 1970."""
        response = await self._ask("GET", "/metrics", timeout=self._request_timeout)
        return answers.read_start_time(self.url, response.text)

    async def weights_label(self) -> str | None:
        """The label of its weights that a trainer left with `name_weights`; None if this vLLM keeps none."""
        response = await self._ask("GET", "/weight_info", timeout=self._request_timeout, may_lack=True)
        return None if response.status_code == 404 else str(self._object(response, "/weight_info")["weight_version"])

    async def name_weights(self, label: str) -> None:
        """Leave a label of the weights at the server, where this vLLM can keep one. A restart forgets it."""
        body = {"new_version": label}
        await self._ask("POST", "/update_weight_version", body=body, timeout=self._request_timeout, may_lack=True)

    async def is_paused(self) -> bool:
        """Whether it keeps requests waiting because somebody paused it."""
        return bool((await self._json("GET", "/is_paused"))["is_paused"])

    async def pause(self) -> None:
        """End the requests that are under way, and let new ones wait."""
        await self._ask("POST", "/pause", params={"mode": "abort"}, timeout=self._slow_timeout)

    async def reload(self, folder: Path) -> None:
        """Read the weights of a folder that the server sees under the same name."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        await self._ask("POST", "/collective_rpc", body=body, timeout=self._slow_timeout)

    async def reset_prefix_cache(self) -> None:
        """Forget what was computed with earlier weights.

        Raises:
            UnavailableError: the server says that it did not forget.
        """
        said = await self._json("POST", "/reset_prefix_cache")
        if said.get("success") is not True:
            raise self._fault(f"/reset_prefix_cache: {json.dumps(said)}", answered=True)

    async def resume(self) -> None:
        """Let requests run again."""
        await self._ask("POST", "/resume", timeout=self._slow_timeout)

    async def complete(
        self, model: str, prompt: Prompt, *, seed: int, sampling: SamplingConfig, eos_id: int, vocab_size: int
    ) -> Completion:
        """Draw one response.

        Raises:
            RefusedError: the answer is not a response to this prompt under these settings.
        """
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": sampling.max_new_tokens,
            "seed": seed,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "logprobs": 0,
        }
        choice = await self._choice(body | _neutral(eos_id))
        return answers.read_completion(
            self.url, choice, prompt, sampling=sampling, eos_id=eos_id, vocab_size=vocab_size
        )

    async def prompt_logprobs(self, model: str, prompt: Prompt, *, eos_id: int) -> list[float]:
        """Log-probabilities, at temperature 1, of the tokens of a prompt from its second on."""
        body = {"model": model, "prompt": list(prompt), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        choice = await self._choice(body | _neutral(eos_id))
        return answers.read_prompt_logprobs(self.url, choice, prompt)

    async def first_token_logprobs(
        self, model: str, prompt: Prompt, *, temperature: float, count: int, eos_id: int
    ) -> list[float]:
        """Log-probabilities of the likeliest tokens after a prompt, the largest first."""
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": 1,
            "seed": 0,
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": 0,
            "logprobs": count,
            "return_tokens_as_token_ids": True,  # Two ids may have the same text, and the answer is a map.
        }
        return answers.read_top_logprobs(self.url, await self._choice(body | _neutral(eos_id)))

    async def _choice(self, body: Mapping[str, Any]) -> dict[str, Any]:
        choice = answers.read_choice(self.url, await self._json("POST", "/v1/completions", body))
        if choice.get("finish_reason") == "abort":
            raise self._fault("ended a response early (finish_reason abort): somebody paused it", answered=True)
        return choice

    async def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self._object(await self._ask(method, path, body=body, timeout=self._request_timeout), path)

    def _object(self, response: httpx2.Response, path: str) -> dict[str, Any]:
        try:
            found = response.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise RefusedError(f"{self.url}{path}: no JSON object but {response.text[:200]!r}: is it a vLLM server?")
        return found

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        timeout: float,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
        may_lack: bool = False,
    ) -> httpx2.Response:
        """The answer to one request.

        Args:
            timeout: longest wait for the whole answer, in seconds.
            may_lack: whether 404 is an answer.

        Raises:
            UnavailableError: no answer, or one that says `not now` or `I failed`.
            RefusedError: the server refuses the request.
        """
        try:
            async with asyncio.timeout(timeout):
                response = await self._http.request(method, path, json=body, params=params)
        except TimeoutError:
            raise self._fault(f"no answer to {path} within {timeout:g} s") from None
        except httpx2.RequestError as error:
            raise self._fault(f"{path}: {type(error).__name__} {error}".rstrip()) from error
        status = response.status_code
        if status < 400 or (may_lack and status == 404):
            return response
        said = f"{path}: {status} {answers.error_text(response.text)}"
        if status >= 500 or status in _REPEATABLE:
            raise self._fault(said, answered=True)
        raise RefusedError(f"{self.url}{said}{_cure(path, status)}")

    def _fault(self, said: str, *, answered: bool = False) -> UnavailableError:
        self.last_fault = said
        return UnavailableError(self.url, said, answered=answered)


def _neutral(eos_id: int) -> dict[str, Any]:
    """What every request to generate says. All is explicit: a server has defaults of its own (generation_config.json).

    Only our EOS ends a response, and it is among the tokens, because the server takes it for a stop token.
    """
    return {
        "n": 1,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "ignore_eos": True,
        "stop_token_ids": [eos_id],
        "return_token_ids": True,
    }


def _cure(path: str, status: int) -> str:
    if status == 404 and not path.startswith("/v1/"):
        return ". Start the server with VLLM_SERVER_DEV_MODE=1 in its environment: else nobody can give it weights"
    if status in (401, 403):
        return ". Start the server without --api-key: the trainer sends none"
    return ""
