"""A server that rewards responses: of our JSON form, or `vllm serve` with a classifier or a reward model.

A POST request of our form has the JSON object

    {"prompts": ["text", ...], "responses": ["text", ...], "records": [{"id": "...", ...}, ...]}

with lists of equal length, and the answer has status 200 and the JSON object `{"rewards": [0.5, ...]}` with one finite
number for each response, in order.

An address whose path ends in `/classify` is asked in the form of vLLM's endpoint of that name. The input is the token
ids of prompt and response, EOS included, so the served model must have the tokenizer of the run; the ids of a sentence,
which the server's `/detokenize` must turn into that sentence, show it. The reward is the one output of the model before
any activation, as ours is. Of a classifier with several outputs, `#INDEX` behind the address says which one is the
reward.
"""

import asyncio
import contextlib
import math
from collections.abc import Sequence
from typing import Any, Protocol
from urllib.parse import urldefrag, urlsplit

import httpx2

from megatron_brain.config.rewards import RewardPart
from megatron_brain.config.stages import ScoringConfig
from megatron_brain.data.tokenizer import Tokenizer
from megatron_brain.errors import ConfigError, short
from megatron_brain.stages.posting import post_until_answered
from megatron_brain.stages.rewards.answers import Answer

_SENTENCE = "The quick brown fox jumps over 13 lazy dogs, doesn't it?"
"""What the tokenizers of run and server are compared on."""


class _FormError(Exception):
    """An answer has another form than it must have."""


class _Form(Protocol):
    """What is sent and what comes back."""

    def body(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The JSON object to send."""

    def rewards(self, reply: Any) -> list[Any]:
        """The rewards in the JSON value that came back.

        Raises:
            _FormError: it has another form; says which it must have.
        """


class _OwnForm:
    def body(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return {
            "prompts": [answer.prompt for answer in answers],
            "responses": [answer.response for answer in answers],
            "records": [answer.record for answer in answers],
        }

    def rewards(self, reply: Any) -> list[Any]:
        if not isinstance(reply, dict) or not isinstance(reply.get("rewards"), list):
            raise _FormError('must be {"rewards": [...]}')
        return list(reply["rewards"])


class _VllmForm:
    """vLLM's /classify.

    Args:
        place: index of the output that is the reward; None: there is one output.
    """

    def __init__(self, place: int | None) -> None:
        self._place = place

    def body(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return {"input": [list(answer.tokens) for answer in answers], "use_activation": False}

    def rewards(self, reply: Any) -> list[Any]:
        try:
            outputs = [item["probs"] for item in sorted(reply["data"], key=lambda item: item["index"])]
        except (TypeError, KeyError) as error:
            raise _FormError('must be {"data": [{"index": 0, "probs": [...]}, ...]}, as vLLM writes it') from error
        if self._place is None and any(len(output) != 1 for output in outputs):
            raise _FormError("has several outputs for a response; put #INDEX of the one to take behind the address")
        if any(len(output) <= (self._place or 0) for output in outputs):
            raise _FormError(f"has fewer than {(self._place or 0) + 1} outputs for a response; give another #INDEX")
        return [output[self._place or 0] for output in outputs]


class RewardServer:
    """Rewards of responses from a server.

    A request is sent again, after a pause that grows, where the server cannot be reached, or answers with a status of
    500 or more, 408, 425 or 429. Other statuses are mistakes, which are told at once.

    Args:
        part: the part of the reward, of the kind "url".
        settings: time limit, responses in a request, and requests under way at one time.
        tokenizer: the run's. A vLLM server with another one is refused when it is first asked.

    Raises:
        ConfigError: what stands behind `#` is no index.
    """

    def __init__(self, part: RewardPart, settings: ScoringConfig, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._known = tokenizer, False
        self._what, self._settings = f"--reward-url {part.source}", settings
        self._url, place = urldefrag(part.source)
        self._is_vllm = urlsplit(self._url).path.endswith("/classify")
        if place and not (self._is_vllm and place.isdecimal()):
            raise ConfigError(f"{self._what}: #{place} must be the index of an output, behind an address of /classify")
        self._form: _Form = _VllmForm(int(place) if place else None) if self._is_vllm else _OwnForm()

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """One finite number for each response, in order.

        Raises:
            ConfigError: the server did not give them within the time limit, or gave something else; names the records.
        """
        return asyncio.run(self._score(answers))

    async def _score(self, answers: Sequence[Answer]) -> list[float]:
        size, seconds = self._settings.reward_batch_size, self._settings.reward_timeout
        batches = [answers[start : start + size] for start in range(0, len(answers), size)]
        rewards: dict[int, list[float]] = {}
        problems: dict[int, str] = {}
        try:
            async with asyncio.timeout(seconds):
                await self._score_batches(batches, rewards, problems)
        except TimeoutError as error:
            missing = [place for place in range(len(batches)) if place not in rewards]
            raise ConfigError(
                f"{self._what}: no rewards within --reward-timeout {seconds:g} seconds for {len(missing)} of "
                f"{len(batches)} requests, the first with {_named(batches[missing[0]])}: "
                f"{problems.get(missing[0], 'no answer yet')}"
            ) from error
        return [reward for place in range(len(batches)) for reward in rewards[place]]

    async def _score_batches(
        self, batches: Sequence[Sequence[Answer]], rewards: dict[int, list[float]], problems: dict[int, str]
    ) -> None:
        """Put the rewards of each request, and the latest problem of requests that failed, under the request's place.
        The first mistake ends all."""
        slots = asyncio.Semaphore(self._settings.reward_concurrency)

        async def work(client: httpx2.AsyncClient, place: int) -> None:
            await slots.acquire()
            rewards[place] = await self._score_batch(client, batches[place], problems, place)
            slots.release()  # A mistake keeps its slot: no request follows it.

        try:
            async with (
                httpx2.AsyncClient(timeout=self._settings.reward_timeout) as client,
                asyncio.TaskGroup() as tasks,
            ):
                if self._is_vllm and not self._known:
                    await self._compare_tokenizers(client, batches[0], problems)
                for place in range(len(batches)):
                    tasks.create_task(work(client, place))
        except* ConfigError as group:
            raise group.exceptions[0] from None

    async def _score_batch(
        self, client: httpx2.AsyncClient, answers: Sequence[Answer], problems: dict[int, str], place: int
    ) -> list[float]:
        """Rewards of one request. `problems` gets the latest problem at `place`."""
        reply = await self._ask(client, self._url, self._form.body(answers), problems, place)
        if reply.status_code != 200:
            raise ConfigError(
                f"{self._what} answered with status {reply.status_code} to {_named(answers)}: {reply.text[:1000]}"
            )
        return self._checked(reply, answers)

    async def _compare_tokenizers(
        self, client: httpx2.AsyncClient, answers: Sequence[Answer], problems: dict[int, str]
    ) -> None:
        """Raise ConfigError where vLLM's tokenizer makes another text of the ids of a sentence than the run's."""
        url = self._url.removesuffix("/classify") + "/detokenize"
        reply = await self._ask(client, url, {"tokens": self._tokenizer.encode(_SENTENCE)}, problems, 0)
        text = reply.text
        if reply.status_code == 200:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                text = str(reply.json()["prompt"])
        if "".join(text.split()) != "".join(_SENTENCE.split()):
            raise ConfigError(
                f"{self._what}: {url} makes {short(text)} of the ids of {_SENTENCE!r}: the model that is served must "
                "have the tokenizer of the run; serve another one, or give a server of our form that takes texts"
            )
        self._known = True

    async def _ask(
        self, client: httpx2.AsyncClient, url: str, body: dict[str, Any], problems: dict[int, str], place: int
    ) -> httpx2.Response:
        """The answer to a POST request, which is repeated while its problem may pass."""
        return await post_until_answered(client, url, body, note=lambda problem: problems.update({place: problem}))

    def _checked(self, reply: httpx2.Response, answers: Sequence[Answer]) -> list[float]:
        try:
            found = reply.json()
        except ValueError:
            found = None
        try:
            rewards = self._form.rewards(found)
        except _FormError as error:
            raise ConfigError(
                f"{self._what} answered to {_named(answers)} with {short(reply.text)}: the answer {error}"
            ) from error
        if len(rewards) != len(answers):
            raise ConfigError(
                f"{self._what} gave {len(rewards)} rewards for {_named(answers)}; it must give one for each"
            )
        for reward, answer in zip(rewards, answers, strict=True):
            if type(reward) not in (int, float) or not math.isfinite(reward):
                raise ConfigError(
                    f"{self._what} gave {short(reward)} for the response to {answer.record_id}; it must be a finite "
                    "number"
                )
        return [float(reward) for reward in rewards]


def _named(answers: Sequence[Answer]) -> str:
    """The responses of a request in words."""
    first, last = answers[0].record_id, answers[-1].record_id
    of = first if first == last else f"{first} to {last}"
    return f"the {len(answers)} responses to {of}" if len(answers) > 1 else f"the response to {of}"
