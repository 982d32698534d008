"""A response with all that a reward function or a reward server may read of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_brain.stages.brain.rollouts import Rollout


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A response to a prompt."""

    prompt: str
    """Text of the prompt, rendered by the chat template where the record is a conversation."""
    response: str
    record: dict[str, Any]
    """`Prompt.record`: `id`, the other fields of the record, and `completion` where it has a reference."""
    record_id: str
    tokens: tuple[int, ...]
    """Ids of the prompt, as the model gets it, and of the response, EOS included."""


def answers_of(rollouts: Iterable[Rollout]) -> list[Answer]:
    """The responses of rollouts, in order."""
    return [
        Answer(
            prompt=rollout.prompt,
            response=response.text,
            record=rollout.record or {"id": rollout.id},
            record_id=rollout.id,
            tokens=(*rollout.prompt_tokens, *response.tokens),
        )
        for rollout in rollouts
        for response in rollout.responses
    ]
