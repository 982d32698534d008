"""The parts that the reward of a response is the sum of: reward models, functions and servers, each with its weight."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from megatron_brain.config.addresses import require_address
from megatron_brain.errors import ConfigError

Kind = Literal["model", "function", "url"]


@dataclass(frozen=True, kw_only=True)
class RewardPart:
    """One part of the reward."""

    name: str
    """What logs, rollout files and reports call it; no other part of the run has this name."""
    kind: Kind
    source: str
    """The checkpoint, the `path/to/file.py:function`, or the address of the server."""
    weight: float

    @property
    def flag(self) -> str:
        """The flag that gives parts of this kind."""
        return _FLAGS[self.kind]


_FLAGS: dict[Kind, str] = {"model": "--reward-load", "function": "--reward-function", "url": "--reward-url"}


def reward_parts(
    models: str | None, functions: str | None, urls: str | None, weights: str | None
) -> tuple[RewardPart, ...]:
    """The parts in the order of their weights: models, then functions, then servers.

    Args:
        models: checkpoints with commas between them; None: no part of this kind.
        functions: functions `path/to/file.py:function`, as above.
        urls: addresses of servers, as above.
        weights: one number for each part, with commas between them; None: each weight is 1.

    Raises:
        ConfigError: a part is named twice or has no name, or there are not as many weights as parts.
    """
    sources: list[tuple[Kind, str]] = [
        *(("model", source) for source in _split(models, "reward_load")),
        *(("function", source) for source in _split(functions, "reward_function")),
        *(("url", source) for source in _split(urls, "reward_url")),
    ]
    for kind, source in sources:
        if kind == "function" and not all(source.rpartition(":")[::2]):
            raise ConfigError(f"reward_function={source}: give path/to/file.py:function")
        if kind == "url":
            require_address("reward_url", source, example="http://host:port/path")
    return tuple(
        RewardPart(name=name, kind=kind, source=source, weight=weight)
        for (kind, source), name, weight in zip(sources, _names(sources), _weights(weights, sources), strict=True)
    )


def describe(parts: Sequence[RewardPart]) -> str:
    """The sum of the parts in words, such as `mean of standardised (rm_a, 0.5 x rm_b) + 2 x rule`."""

    def weighted(part: RewardPart) -> str:
        return part.name if part.weight == 1 else f"{part.weight:g} x {part.name}"

    models = [weighted(part) for part in parts if part.kind == "model"]
    others = [weighted(part) for part in parts if part.kind != "model"]
    return " + ".join([*([f"mean of standardised ({', '.join(models)})"] if len(models) > 1 else models), *others])


def _split(text: str | None, key: str) -> list[str]:
    if text is None:
        return []
    sources = [source.strip() for source in text.split(",")]
    if not all(sources):
        raise ConfigError(f"{key}={text}: there is nothing between two commas, or at an end; remove a comma")
    for source, times in Counter(sources).items():
        if times > 1:
            raise ConfigError(f"{key}={text}: {source} is named twice; name it once, and give it a larger weight")
    return sources


def _weights(text: str | None, sources: Sequence[tuple[Kind, str]]) -> list[float]:
    if text is None:
        return [1.0] * len(sources)
    try:
        weights = [float(weight) for weight in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"reward_weights={text}: give numbers with commas between them ({error})") from error
    if not all(abs(weight) < float("inf") and weight for weight in weights):
        raise ConfigError(f"reward_weights={text}: each weight must be finite and not 0; leave out a part of weight 0")
    if len(weights) != len(sources):
        raise ConfigError(
            f"reward_weights={text}: {len(weights)} weights for {len(sources)} parts; give one for each, in the order "
            f"of --reward-load, --reward-function, --reward-url ({', '.join(source for _, source in sources)})"
        )
    return weights


def _names(sources: Sequence[tuple[Kind, str]]) -> list[str]:
    """Name of the checkpoint's folder, of the function, or of the server's host. A name that is taken gets a number."""
    names: list[str] = []
    for kind, source in sources:
        if kind == "model":
            name = Path(source).name or source
        elif kind == "function":
            name = source.rpartition(":")[2]
        else:
            name = urlsplit(source).hostname or source
        taken = 1
        while (unique := name if taken == 1 else f"{name}_{taken}") in names:
            taken += 1
        names.append(unique)
    return names
