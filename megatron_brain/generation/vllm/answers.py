"""Reads what a vLLM server answers, and refuses what it must not answer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_brain.config.stages import SamplingConfig
from megatron_brain.errors import UserError, short
from megatron_brain.generation.batch import Completion
from megatron_brain.generation.engine import Prompt

_ROUNDING = 1e-3
"""How far above 0 rounding may lift a log-probability."""


class AnswerError(UserError):
    """A server's answer is not one to the question: its model, tokenizer or version is another one than it should be.

    It names the server and the cure.
    """


@dataclass(frozen=True, kw_only=True)
class Served:
    """The model of a server. `longest`: most tokens of prompt and response together."""

    name: str
    longest: int


def read_served(url: str, body: Mapping[str, Any]) -> Served:
    """The model that `/v1/models` lists first; the others are adapters."""
    try:
        name, longest = str(body["data"][0]["id"]), int(body["data"][0]["max_model_len"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise AnswerError(f"{url}/v1/models: {short(dict(body))} names no model: is it a vLLM server?") from error
    return Served(name=name, longest=longest)


def read_start_time(url: str, text: str) -> float:
    """The start of the process from the text of `/metrics`."""
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == "process_start_time_seconds":
            return float(value)
    raise AnswerError(
        f"{url}/metrics: no process_start_time_seconds, so a restart would not be seen: start the server with "
        "--api-server-count 1"
    )


def read_choice(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The one choice of a completion."""
    choices = body.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise AnswerError(f"{url}/v1/completions: {short(dict(body))} has not one choice: is it a vLLM server?")
    return choices[0]


def read_completion(
    url: str, choice: Mapping[str, Any], prompt: Prompt, *, sampling: SamplingConfig, eos_id: int, vocab_size: int
) -> Completion:
    """The response of a choice.

    Raises:
        AnswerError: it answers another prompt, has other tokens than the vocabulary, is cut short, or its
            log-probabilities are none.
    """
    _require_prompt(url, choice, prompt)
    tokens = choice.get("token_ids")
    if not isinstance(tokens, list) or not tokens:
        raise AnswerError(f"{url}: answered with no tokens (token_ids={short(tokens)})")
    outside = [token for token in tokens if not isinstance(token, int) or not 0 <= token < vocab_size]
    if outside:
        raise AnswerError(
            f"{url}: answered with token {outside[0]}, and the run's vocabulary has {vocab_size} tokens: does the "
            "server have another model or tokenizer? Start it from an export of this run's model"
        )
    _require_end(url, choice, tokens, eos_id=eos_id, longest=sampling.max_new_tokens)
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
    if not isinstance(logprobs, list) or len(logprobs) != len(tokens):
        count = len(logprobs) if isinstance(logprobs, list) else 0
        raise AnswerError(f"{url}: answered with {len(tokens)} tokens and the log-probabilities of {count}")
    _require_logprobs(url, logprobs)
    if sampling.temperature == 0:
        logprobs = [0.0] * len(tokens)
    return Completion(tokens=tuple(tokens), token_logprobs=tuple(logprobs), finished=tokens[-1] == eos_id)


def read_prompt_logprobs(url: str, choice: Mapping[str, Any], prompt: Prompt) -> list[float]:
    """Log-probabilities of a prompt's tokens from the second on."""
    _require_prompt(url, choice, prompt)
    told = choice.get("prompt_logprobs")
    try:
        assert isinstance(told, list) and len(told) == len(prompt)
        values = [float(row[str(token)]["logprob"]) for row, token in zip(told[1:], prompt[1:], strict=True)]
    except (AssertionError, KeyError, TypeError) as error:
        raise AnswerError(f"{url}: has no log-probability for each token of a prompt: {short(told)}") from error
    _require_logprobs(url, values)
    return values


def read_top_logprobs(url: str, choice: Mapping[str, Any]) -> list[float]:
    """Log-probabilities of the likeliest first tokens, the largest first."""
    told = (choice.get("logprobs") or {}).get("top_logprobs")
    if not isinstance(told, list) or not told or not isinstance(told[0], dict):
        raise AnswerError(f"{url}: has no log-probabilities of the likeliest tokens: {short(told)}")
    values = sorted((float(value) for value in told[0].values()), reverse=True)
    _require_logprobs(url, values)
    return values


def error_text(body: str) -> str:
    """What an error's body says, in one line of at most 400 characters."""
    try:
        found = json.loads(body)
        error = found.get("error", found.get("detail", body))
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError, KeyError):
        text = body
    text = " ".join(str(text).split())
    return text if len(text) <= 400 else text[:397] + "..."


def _require_prompt(url: str, choice: Mapping[str, Any], prompt: Prompt) -> None:
    echoed = choice.get("prompt_token_ids")
    if echoed is None:
        raise AnswerError(f"{url}: returns no token ids (return_token_ids): its vLLM is too old; use a newer one")
    if tuple(echoed) != tuple(prompt):
        raise AnswerError(
            f"{url}: answered the prompt {short(echoed)}, and was asked {short(list(prompt))}: does something between "
            "the trainer and the server change requests, or does the server use another tokenizer?"
        )


def _require_end(url: str, choice: Mapping[str, Any], tokens: list[int], *, eos_id: int, longest: int) -> None:
    reason, count = choice.get("finish_reason"), len(tokens)
    if count > longest or eos_id in tokens[:-1]:
        raise AnswerError(f"{url}: went on after {longest} tokens or after EOS ({eos_id}): {short(tokens)}")
    if (tokens[-1] == eos_id) != (reason == "stop"):
        raise AnswerError(
            f"{url}: ended a response with token {tokens[-1]} and finish_reason {reason!r}, and only EOS ({eos_id}) "
            "may stop it: has the server stop tokens or a logits processor of its own?"
        )
    if tokens[-1] != eos_id and count < longest:
        raise AnswerError(
            f"{url}: ended a response after {count} of {longest} tokens without EOS ({eos_id}), finish_reason "
            f"{reason!r}: is its --max-model-len too small?"
        )


def _require_logprobs(url: str, values: list[Any]) -> None:
    for value in values:
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value > _ROUNDING:
            raise AnswerError(f"{url}: answered with the log-probability {value}: are its weights finite?")
