"""Rollouts: the sampled and scored groups of a round, in memory and as files that any engine may write.

A file holds one JSON object per prompt:

    {"id": "...", "index": 0, "prompt_tokens": [...], "prompt": "...",
     "responses": [{"tokens": [...], "text": "...", "finished": true, "sampler_logprob": -12.3,
                    "trainer_logprob": -12.3, "log_proposal": -12.3, "log_prior": -12.3, "reward": 0.4,
                    "reward_parts": {"my_model": 0.4}, "alpha": 0.1}, ...]}

`record` stands beside the responses where the reward reads other fields of the prompt's record. BRAIn fixes `alpha` for
the round. Other objectives fix another number (`preference`, `advantage`).

sampler_logprob and trainer_logprob are log q' as the engine that drew the response and the model that trains compute
it; log_proposal is the one of the two that makes the weights. A response that a checkpoint holds before the trainer has
computed it also has `sampler_token_logprobs`, the engine's values of the single tokens.

A response that is read back needs its tokens. If the objective uses log q', it also needs log_proposal, which is the
log-probability under the distribution that it was drawn from, or sampler_logprob, the sampling engine's value of the
same. Reward and log_prior are computed where they are missing.
"""

import glob
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from megatron_brain.data.groups import Group
from megatron_brain.data.sources import load_records
from megatron_brain.errors import ConfigError, short
from megatron_brain.files import write_whole
from megatron_brain.objectives.registry import OBJECTIVES

_LOG_PROBABILITIES = ("sampler_logprob", "trainer_logprob", "log_proposal", "log_prior")
_ROUNDING = 0.01
"""The log-probability of a response may exceed 0 by this much, because of rounding."""
_TYPES = {
    "id": (str, int),
    "index": (int,),
    "prompt": (str,),
    "responses": (list, tuple),
    "text": (str,),
    "finished": (bool,),
    "record": (dict,),
    "reward_parts": (dict,),
}
"""Types of those fields of a record and its responses that have no other check."""


@dataclass(kw_only=True)
class Response:
    """One sample. Log-probabilities are sums over its tokens, EOS included, in nats."""

    tokens: tuple[int, ...]
    text: str = ""
    finished: bool = True
    sampler_logprob: float | None = None
    sampler_token_logprobs: tuple[float, ...] | None = None
    """What sampler_logprob is the sum of, until `compare_tokens` has read it."""
    trainer_logprob: float | None = None
    log_proposal: float | None = None
    log_prior: float | None = None
    reward: float | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)
    """What each part of the reward says, by its name."""
    fixed: dict[str, float] = field(default_factory=dict)
    """The number that the objective has fixed for the round, by its name."""
    largest_token_difference: float | None = None
    """Largest difference of a token's log-probability between sampler and trainer, in nats. No file has it."""

    def compare_tokens(self, trainer: Sequence[float]) -> None:
        """Compare the sampler's log-probabilities of the tokens with the trainer's, and forget them."""
        if self.sampler_token_logprobs is not None:
            pairs = zip(self.sampler_token_logprobs, trainer, strict=True)
            self.largest_token_difference = max(abs(sampler - trained) for sampler, trained in pairs)
            self.sampler_token_logprobs = None

    def value(self, name: str) -> float | None:
        """A number of the response; None if it is not known."""
        return self.fixed[name] if name in self.fixed else getattr(self, name)


@dataclass(kw_only=True)
class Rollout:
    """One prompt with its samples. `index` is the prompt's place in the round, which decides the replica."""

    id: str
    index: int
    prompt_tokens: tuple[int, ...]
    prompt: str = ""
    responses: list[Response] = field(default_factory=list)
    record: dict = field(default_factory=dict)
    """`data.records.Prompt.record`, which reward functions and servers read; empty where nothing reads it."""

    def values(self, name: str) -> tuple[float, ...]:
        """One number per response."""
        return tuple(response.value(name) for response in self.responses)

    def numbers(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Numbers of the responses in the form that the objective takes: each `[n]` float32."""
        return {name: torch.tensor(self.values(name), dtype=torch.float32) for name in names}

    def group(self, responses: Sequence[int] | None = None) -> Group:
        """The group to score or train on, or a part of it, with the numbers that are known so far."""
        chosen = self.responses if responses is None else [self.responses[i] for i in responses]
        names = ("log_proposal", "log_prior", "reward", *chosen[0].fixed)
        values = {name: tuple(response.value(name) for response in chosen) for name in names}
        known = {name: numbers for name, numbers in values.items() if None not in numbers}
        return Group(
            prompt=self.prompt_tokens,
            responses=tuple(response.tokens for response in chosen),
            values={**known, "finished": tuple(float(response.finished) for response in chosen)},
            record_id=self.id,
        )

    def as_dict(self) -> dict:
        """The rollout as JSON-able values. The fixed number stands beside the others; what is empty is left out."""
        record = asdict(self)
        if not self.record:
            del record["record"]
        for response in record["responses"]:
            del response["largest_token_difference"]
            for name in ("reward_parts", "sampler_token_logprobs"):
                if not response[name]:
                    del response[name]
            response |= response.pop("fixed")
        return record


def rollout_from_dict(record: dict, where: str, *, needs_log_proposal: bool = True) -> Rollout:
    """Read one record.

    Args:
        record: a record as `Rollout.as_dict` makes it.
        where: the place of the record, for errors.
        needs_log_proposal: whether a response without log_proposal is an error.

    Raises:
        ConfigError: a field is missing, unknown or of another type, or there are fewer than two responses. The
            message has `where`.
    """
    _check_fields(record, Rollout, ("id", "index", "prompt_tokens", "responses"), where)
    if len(record["responses"]) < 2:
        raise ConfigError(f"{where}: {len(record['responses'])} response(s), a group needs at least 2")
    responses, fixed = [], _fixed()
    for values in record["responses"]:
        _check_fields(values, Response, ("tokens",), where)
        plain = {name: value for name, value in values.items() if name not in fixed}
        response = Response(**{**plain, "tokens": _token_ids(values["tokens"], where)})
        response.fixed = {name: float(values[name]) for name in fixed if values.get(name) is not None}
        _make_floats(response, where)
        if response.log_proposal is None:
            response.log_proposal = response.sampler_logprob
        if response.log_proposal is None and needs_log_proposal:
            raise ConfigError(
                f"{where}: a response has neither log_proposal nor sampler_logprob: give the log-probability under the "
                "distribution that it was drawn from"
            )
        responses.append(response)
    prompt_tokens = _token_ids(record["prompt_tokens"], where)
    return Rollout(**{**record, "prompt_tokens": prompt_tokens, "responses": responses})


def _fixed() -> list[str]:
    """Names of the numbers that objectives fix for a round. They are computed anew when a file is read."""
    return sorted({objective.fixes for objective in OBJECTIVES.values()})


def _check_fields(values: object, kind: type, needed: Sequence[str], where: str) -> None:
    """Raise ConfigError if an object of a file lacks a field, or has one that is unknown or of another type."""
    what = f"a {kind.__name__.lower()}"
    known = [field.name for field in fields(kind) if field.name not in ("fixed", "largest_token_difference")]
    fixed = _fixed() if kind is Response else []
    known += fixed
    if not isinstance(values, dict):
        raise _no_rollout(where, f"{what} must be an object, not {short(values)}")
    for name in needed:
        if values.get(name) is None:
            raise _no_rollout(where, f"{what} must have {name!r}, this one has {', '.join(values) or 'nothing'}")
    for name, value in values.items():
        if name not in known:
            raise _no_rollout(where, f"{what} has no field {name!r}, only {', '.join(known)}")
        types = (float, int) if name in fixed else _TYPES.get(name)
        if value is not None and types is not None and type(value) not in types:
            raise _no_rollout(where, f"{name!r} must be of type {types[0].__name__}, not {short(value)}")


def _no_rollout(where: str, problem: str) -> ConfigError:
    return ConfigError(f"{where}: not a rollout record, {problem}; docs/stages.md shows the format")


def _token_ids(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not value or not all(type(token) is int for token in value):
        raise _no_rollout(where, f"tokens must be a list of at least one id, not {short(value)}")
    return tuple(value)


def _make_floats(response: Response, where: str) -> None:
    if (alpha := response.fixed.get("alpha", 0.0)) < 0:
        raise ConfigError(f"{where}: alpha is {alpha}; a weight is at least 0")
    for name in (*_LOG_PROBABILITIES, "reward"):
        value = getattr(response, name)
        if value is None:
            continue
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise ConfigError(f"{where}: {name} is {short(value)}; it must be a finite number")
        if name in _LOG_PROBABILITIES and value > _ROUNDING:
            raise ConfigError(f"{where}: {name} is {value}; the logarithm of a probability is at most 0")
        setattr(response, name, float(value))
    if response.sampler_token_logprobs is not None:
        response.sampler_token_logprobs = _token_logprobs(response, where)
    for name, value in response.reward_parts.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ConfigError(f"{where}: reward_parts has {short(value)} for {name}; it must be a finite number")
        response.reward_parts[name] = float(value)


def _token_logprobs(response: Response, where: str) -> tuple[float, ...]:
    told = response.sampler_token_logprobs
    is_right = isinstance(told, (list, tuple)) and len(told) == len(response.tokens)
    if not is_right or not all(type(value) in (int, float) and math.isfinite(value) for value in told):
        raise ConfigError(
            f"{where}: sampler_token_logprobs is {short(told)}; it must have a finite number for each of the "
            f"{len(response.tokens)} tokens"
        )
    return tuple(float(value) for value in told)


def rollout_files(pattern: str) -> list[str]:
    """Rollout files in the order of their names. Each is a round.

    Raises:
        ConfigError: no file matches.
    """
    files = sorted(glob.glob(pattern))
    if not files:
        raise ConfigError(f"rollout_data={pattern} matches no file under {Path.cwd()}: give one that is there")
    return files


def read_rollouts(path: str, *, needs_log_proposal: bool = True) -> list[Rollout]:
    """All rollouts of a file (jsonl or Arrow), sorted by index."""
    rollouts = [
        rollout_from_dict(record, where, needs_log_proposal=needs_log_proposal) for where, record in load_records(path)
    ]
    return sorted(rollouts, key=lambda rollout: rollout.index)


def write_rollouts(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Write a round. The file appears whole or not at all."""
    write_whole(
        path, "".join(json.dumps(rollout.as_dict(), ensure_ascii=False, allow_nan=False) + "\n" for rollout in rollouts)
    )
