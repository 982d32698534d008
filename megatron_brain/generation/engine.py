"""What draws responses: the protocol that our own sampler and inference servers share."""

from collections.abc import Sequence
from typing import Protocol

from megatron_brain.config.stages import SamplingConfig
from megatron_brain.generation.batch import Completion
from megatron_brain.models.gpt import PolicyModel

Prompt = tuple[int, ...]

THE_PRIOR = "the prior"
"""What an engine calls the prior's weights."""


class Interrupted(Exception):  # noqa: N818 # It is no error.
    """The process was asked to stop while it waited for responses. All ranks raise it together."""


class Pending(Protocol):
    """Responses that are being drawn."""

    seconds: float
    """Seconds that it took to draw them, known when `result` has returned."""

    def result(self) -> list[list[Completion]]:
        """Wait for the responses. All ranks call it together, and a signal to stop does not end the wait."""


class Engine(Protocol):
    """Draws responses from the weights that it was given last.

    All ranks of all replicas call `take_weights` together. Each data-parallel replica samples its own prompts: all its
    ranks call `sample` with the same arguments and get the same responses.
    """

    keeps_weights: bool
    """Whether it has a copy of the weights, which need not be given again while they are the same."""
    holds: str | None
    """Label of the weights that it draws from; None before it was given any."""

    def take_weights(self, chunks: Sequence[PolicyModel], label: str) -> None:
        """Draw from this policy from now on.

        Args:
            chunks: this rank's whole weights, as `build_model` returns them.
            label: what these weights are, in words, such as `step 40`.
        """

    def sample(
        self, prompts: Sequence[Prompt], *, seeds: Sequence[Sequence[int]], sampling: SamplingConfig
    ) -> list[list[Completion]]:
        """Draw responses.

        Args:
            prompts: token ids of each prompt; none where the replica has no prompt.
            seeds: for each prompt, a seed for each of its responses (`generation.seeds.sample_seed`).
            sampling: temperature, top-p, top-k and the longest response; its samples_per_prompt is not read.

        Returns:
            as many responses to each prompt as it has seeds, in their order.

        Raises:
            Interrupted: the process was asked to stop.
        """


class BackgroundEngine(Engine, Protocol):
    """An engine that draws while the caller does something else."""

    def begin(self, prompts: Sequence[Prompt], *, seeds: Sequence[Sequence[int]], sampling: SamplingConfig) -> Pending:
        """Begin what `sample` does. Weights must not be given before the result is taken."""
