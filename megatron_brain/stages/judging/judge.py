"""A language model that compares two answers, over an OpenAI-compatible chat-completions endpoint."""

import asyncio
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx2

from megatron_brain.config.judging import JudgingConfig
from megatron_brain.errors import ConfigError, short
from megatron_brain.stages.judging.template import JudgeTemplate
from megatron_brain.stages.judging.verdicts import Verdict, VerdictFile, parse_verdict
from megatron_brain.stages.posting import post_until_answered

log = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable with the key of the endpoint. Without it, none is sent."""

_REQUEST_SECONDS = 120.0
"""Longest wait for one reply; then the request is sent again."""

_ANSWER_SECONDS = 120.0
"""Longest wait for the first verdict, before anything is sampled."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two answers to a prompt, in the order in which the judge reads them."""

    prompt: str
    answer_a: str
    answer_b: str
    record_id: str
    order: str
    """The names of the answers, such as `policy, baseline`."""


_SAMPLE = Comparison(
    prompt="What is the capital of France?",
    answer_a="Paris.",
    answer_b="I do not know.",
    record_id="a sample",
    order="sample, sample",
)
"""What the judge is asked before anything else."""


class LanguageModelJudge:
    """Asks for verdicts, and keeps each of them in a file as soon as it is there.

    Args:
        settings: address, model, template and limits. `judge_url` and `judge_model` are set.
        file: verdicts of before, and the place for new ones.
        environment: variables of the process. The key in it goes into requests and nowhere else.

    Raises:
        ConfigError: the template cannot be used, or the key cannot be sent.
    """

    def __init__(self, settings: JudgingConfig, file: VerdictFile, environment: Mapping[str, str]) -> None:
        assert settings.judge_url is not None and settings.judge_model is not None
        self._settings, self.file, self._model = settings, file, settings.judge_model
        self._what, self._url = f"--judge-url {settings.judge_url}", _endpoint(settings.judge_url)
        self._template = JudgeTemplate(settings.judge_template)
        self._secret = environment.get(KEY_VARIABLE, "").strip()
        if not (self._secret.isascii() and self._secret.isprintable()):
            raise ConfigError(f"{KEY_VARIABLE}: holds characters that no key has; set it anew")
        self._last_problem: str | None = None

    def key(self, comparison: Comparison) -> str:
        """The name of a verdict: a hash of everything that the reply depends on."""
        texts = [comparison.prompt, comparison.answer_a, comparison.answer_b]
        about = [self._url, self._model, self._settings.judge_max_tokens, self._template.source, *texts]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def require_answer(self) -> None:
        """Ask for the verdict on a sample, if it is not known, to see that endpoint, key and model answer.

        Raises:
            ConfigError: they do not, within two minutes.
        """
        limit = min(_ANSWER_SECONDS, self._settings.judge_timeout)
        try:
            [verdict] = self._verdicts([_SAMPLE], limit)
        except TimeoutError as error:
            raise ConfigError(
                f"{self._what}: gave no verdict on {_SAMPLE.record_id} within {limit:g} seconds: {self._problem()}. Is "
                "the address right, and does its server run?"
            ) from error
        if verdict is None:
            log.warning("%s: its reply on %s has no verdict; see %s", self._what, _SAMPLE.record_id, self.file.path)

    def verdicts(self, comparisons: Sequence[Comparison]) -> list[Verdict | None]:
        """The verdict on each comparison, in order; None where the reply has none. Only unknown ones are asked for.

        Raises:
            ConfigError: the endpoint did not give them all within the time limit, or refused one; names the record.
        """
        limit = self._settings.judge_timeout
        try:
            return self._verdicts(comparisons, limit)
        except TimeoutError as error:
            missing = self._missing(comparisons)
            first = next(iter(missing.values())).record_id
            raise ConfigError(
                f"{self._what}: {len(missing)} verdicts did not come within --judge-timeout {limit:g} seconds, the "
                f"first on {first}: {self._problem()}. The others are in {self.file.path}: the same command goes on "
                "from them"
            ) from error

    def _verdicts(self, comparisons: Sequence[Comparison], limit: float) -> list[Verdict | None]:
        """As `verdicts`, but raises TimeoutError after `limit` seconds."""
        keys = [self.key(comparison) for comparison in comparisons]
        missing, needed = self._missing(comparisons), len(set(keys))
        log.info("%s: %d verdicts needed, %d are in %s", self._what, needed, needed - len(missing), self.file.path)
        if missing:
            asyncio.run(asyncio.wait_for(self._ask_together(missing), limit))
        return [self.file.known[key] for key in keys]

    def _missing(self, comparisons: Sequence[Comparison]) -> dict[str, Comparison]:
        """By their keys, the comparisons whose verdicts are not known."""
        by_key = {self.key(comparison): comparison for comparison in comparisons}
        return {key: comparison for key, comparison in by_key.items() if key not in self.file.known}

    async def _ask_together(self, missing: Mapping[str, Comparison]) -> None:
        """Ask for all, a few at one time. The first mistake ends all."""
        self._last_problem = None
        slots = asyncio.Semaphore(self._settings.judge_concurrency)

        async def work(client: httpx2.AsyncClient, key: str, comparison: Comparison) -> None:
            await slots.acquire()
            reply = await self._ask(client, comparison)
            self.file.add(
                key,
                parse_verdict(reply),
                model=self._model,
                id=comparison.record_id,
                order=comparison.order,
                reply=reply,
            )
            slots.release()  # A mistake keeps its slot: no request follows it.

        try:
            async with (
                httpx2.AsyncClient(timeout=min(_REQUEST_SECONDS, self._settings.judge_timeout)) as client,
                asyncio.TaskGroup() as tasks,
            ):
                for key, comparison in missing.items():
                    tasks.create_task(work(client, key, comparison))
        except* (ConfigError, OSError) as group:  # The file of verdicts may not be writable.
            raise group.exceptions[0] from None

    async def _ask(self, client: httpx2.AsyncClient, comparison: Comparison) -> str:
        """The text of the reply to one comparison."""
        message = self._template.message(comparison.prompt, comparison.answer_a, comparison.answer_b)
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": message}],
            "temperature": 0,
            "max_tokens": self._settings.judge_max_tokens,
        }
        headers = {"authorization": f"Bearer {self._secret}"} if self._secret else {}
        reply = await post_until_answered(client, self._url, body, note=self._note, headers=headers)
        if reply.status_code != 200:
            cure = f"; is {KEY_VARIABLE} the key of this endpoint?" if reply.status_code in (401, 403) else ""
            raise ConfigError(
                f"{self._what} answered with status {reply.status_code} on {comparison.record_id}: "
                f"{self._without_key(reply.text[:1000])}{cure}"
            )
        try:
            content = reply.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"{self._what} answered on {comparison.record_id} with {short(self._without_key(reply.text))}, which "
                "is no chat completion: give the base address of an OpenAI-compatible endpoint, such as "
                "http://host:8000/v1"
            ) from error
        return self._without_key(content) if isinstance(content, str) else ""  # A refusal has null.

    def _problem(self) -> str:
        return self._last_problem or "no answer yet"

    def _note(self, problem: str) -> None:
        first, self._last_problem = self._last_problem is None, self._without_key(problem)
        if first:
            log.warning("%s: %s; it is asked again until its time is over", self._what, self._last_problem)

    def _without_key(self, text: str) -> str:
        """A text that a server sent. Some repeat the key in it."""
        return text.replace(self._secret, "***") if self._secret else text


def _endpoint(base: str) -> str:
    """The address of the chat completions of a base address, which may lack its `/v1`, or be that address itself."""
    base = base.rstrip("/")
    if base.endswith("/chat/completions"):
        return base
    has_path = "/" in base.split("://", 1)[1]
    return f"{base}/chat/completions" if has_path else f"{base}/v1/chat/completions"
