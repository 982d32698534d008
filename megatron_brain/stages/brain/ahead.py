"""Rounds ahead: while the policy trains on one round, the engine draws the next one from the weights at its start.

q' of round r + 1 is then the policy at the start of round r. Importance weights make these samples exact, because
log q' is that of the weights that drew: the engine says it, or the trainer computes it with a copy of these weights.
The result does not depend on who is faster: round r + 1 is always waited for, and nothing of it is dropped.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_brain.data.records import Prompt
from megatron_brain.generation.engine import BackgroundEngine, Pending
from megatron_brain.models.offload import WeightsCopy
from megatron_brain.models.provider import Chunk
from megatron_brain.stages.brain.placement import Placement
from megatron_brain.stages.brain.proposals import Asked, SampledResponses
from megatron_brain.stages.brain.rollouts import Rollout
from megatron_brain.training.frozen import FrozenModel
from megatron_brain.training.run import Run
from megatron_brain.training.trainer import Trainer


@dataclass(kw_only=True)
class _UnderWay:
    """A round that the engine is drawing."""

    asked: Asked
    responses: Pending
    seconds_sync: float


class DrawnAhead(SampledResponses):
    """Samples of a policy that is one round old; those of round 0 are samples of the policy at its start."""

    def __init__(
        self,
        run: Run,
        placement: Placement,
        prior: FrozenModel,
        engine: BackgroundEngine,
        prompts: Sequence[Prompt],
    ) -> None:
        super().__init__(run, placement, prior, engine, prompts)
        self._background = engine
        self._under_way: _UnderWay | None = None
        self._copy: WeightsCopy | None = None
        self._ready: tuple[int, list[Rollout]] | None = None

    def rollouts(self, trainer: Trainer, number: int) -> list[Rollout]:
        """Take this replica's samples of a round that was begun before, or draw them now."""
        if self._ready is None and self._under_way is None:
            return super().rollouts(trainer, number)
        found, rollouts = self.finish()
        assert found == number, f"round {found} was drawn ahead, and round {number} is wanted"
        self._ready = None
        return rollouts

    def begin(self, trainer: Trainer, number: int) -> None:
        """Begin to draw a round from the policy as it is now."""
        asked = self._asked(number, self._run.config.sampling.samples_per_prompt)
        start = time.perf_counter()
        self._hand_over(trainer, trainer.gathered_chunks())
        seconds = time.perf_counter() - start
        responses = self._background.begin(
            [prompt.tokens for prompt in asked.prompts], seeds=asked.seeds, sampling=self._run.config.sampling
        )
        self._under_way = _UnderWay(asked=asked, responses=responses, seconds_sync=seconds)

    def keep_weights(self, trainer: Trainer) -> None:
        """Keep a copy of the policy, from which the round that was begun is drawn. Nothing is left of an older copy."""
        chunks = trainer.gathered_chunks()
        if self._copy is None:
            self._copy = WeightsCopy(chunks)
        self._copy.take()

    @contextlib.contextmanager
    def weights_that_drew(self, trainer: Trainer) -> Iterator[Sequence[Chunk]]:
        """The policy with the weights that drew the finished round: the copy, or its own if there is none yet."""
        with contextlib.nullcontext() if self._copy is None else self._copy.in_place():
            yield trainer.gathered_chunks()

    def finish(self) -> tuple[int, list[Rollout]] | None:
        """Wait for the round that was begun. Returns its number and this replica's rollouts; None if there is none."""
        if self._under_way is not None:
            under_way, start = self._under_way, time.perf_counter()
            drawn = under_way.responses.result()
            self._measure(
                sync=under_way.seconds_sync,
                drawing=under_way.responses.seconds,
                waiting=time.perf_counter() - start,
            )
            self._under_way = None
            self._ready = under_way.asked.number, self._as_rollouts(under_way.asked, drawn)
        return self._ready

    def take_up(self, number: int, rollouts: list[Rollout]) -> None:
        """Go on from a round that an earlier run had finished; its rollouts have log q'."""
        self._ready = number, rollouts
