"""Rollouts: the sampled and scored groups of a round, in memory and as files any engine may write.

A file holds one JSON object per prompt:

    {"id": "...", "index": 0, "prompt_tokens": [...], "prompt": "...",
     "responses": [{"tokens": [...], "text": "...", "finished": true, "sampler_logprob": -12.3,
                    "log_proposal": -12.3, "log_prior": -12.3, "reward": 0.4, "alpha": 0.1}, ...]}

To be read back, a response needs its tokens and log_proposal, the log-probability under the distribution it was drawn
from (or sampler_logprob, the sampling engine's own word for it). Reward and log_prior are computed where they are
missing.
"""

import glob
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_brain.config.errors import ConfigError
from megatron_brain.data.groups import Group
from megatron_brain.data.sources import load_records
from megatron_brain.files import write_whole


@dataclass(kw_only=True)
class Response:
    """One sample. Log-probabilities are sums over its tokens, EOS included, in nats."""

    tokens: tuple[int, ...]
    text: str = ""
    finished: bool = True
    sampler_logprob: float | None = None
    log_proposal: float | None = None
    log_prior: float | None = None
    reward: float | None = None
    alpha: float | None = None

    @property
    def log_alpha(self) -> float | None:
        """Log of the posterior weight."""
        return None if self.alpha is None else math.log(self.alpha) if self.alpha else -math.inf


@dataclass(kw_only=True)
class Rollout:
    """One prompt with its samples. `index` is the prompt's place in the round, which decides its replica."""

    id: str
    index: int
    prompt_tokens: tuple[int, ...]
    prompt: str = ""
    responses: list[Response] = field(default_factory=list)

    def values(self, name: str) -> tuple[float, ...]:
        """One number per response."""
        return tuple(getattr(response, name) for response in self.responses)

    def group(self, responses: Sequence[int] | None = None) -> Group:
        """The group to score or train on, or some of its responses, with the numbers known so far."""
        chosen = self.responses if responses is None else [self.responses[i] for i in responses]
        values = {
            name: tuple(getattr(response, name) for response in chosen)
            for name in ("log_proposal", "log_prior", "reward", "log_alpha")
        }
        known = {name: numbers for name, numbers in values.items() if None not in numbers}
        return Group(
            prompt=self.prompt_tokens,
            responses=tuple(response.tokens for response in chosen),
            values={**known, "finished": tuple(float(response.finished) for response in chosen)},
            record_id=self.id,
        )

    def as_dict(self) -> dict:
        """JSON-able form."""
        return asdict(self)


def rollout_from_dict(record: dict, where: str) -> Rollout:
    """Read one record.

    Raises:
        ConfigError: a field is missing, unknown or of another kind, or there are fewer than two responses; names
            `where`.
    """
    try:
        responses = [Response(**{**r, "tokens": _token_ids(r["tokens"])}) for r in record["responses"]]
        rollout = Rollout(**{**record, "prompt_tokens": _token_ids(record["prompt_tokens"]), "responses": responses})
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{where}: not a rollout record, {error}; docs/stages.md shows the format") from error
    if len(responses) < 2:
        raise ConfigError(f"{where}: {len(responses)} response(s), a group needs at least 2")
    for response in responses:
        _make_floats(response, where)
        if response.log_proposal is None:
            response.log_proposal = response.sampler_logprob
        if response.log_proposal is None:
            raise ConfigError(f"{where}: a response has neither log_proposal nor sampler_logprob")
    return rollout


def _token_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(token, int) for token in value):
        raise TypeError(f"tokens must be a list of at least one id, not {str(value)[:40]!r}")
    return tuple(value)


def _make_floats(response: Response, where: str) -> None:
    for name in ("sampler_logprob", "log_proposal", "log_prior", "reward"):
        value = getattr(response, name)
        if value is None:
            continue
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"{where}: {name} is {value!r}; it must be a finite number")
        setattr(response, name, float(value))


def rollout_files(pattern: str) -> list[str]:
    """Rollout files in the order of their names, one a round.

    Raises:
        ConfigError: there are none.
    """
    files = sorted(glob.glob(pattern))
    if not files:
        raise ConfigError(f"rollout_data={pattern} matches no file under {Path.cwd()}")
    return files


def read_rollouts(path: str) -> list[Rollout]:
    """All rollouts of a file (jsonl or Arrow), sorted by index."""
    rollouts = [rollout_from_dict(record, where) for where, record in load_records(path)]
    return sorted(rollouts, key=lambda rollout: rollout.index)


def write_rollouts(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Write a round; the file appears whole or not at all."""
    write_whole(
        path, "".join(json.dumps(rollout.as_dict(), ensure_ascii=False, allow_nan=False) + "\n" for rollout in rollouts)
    )
