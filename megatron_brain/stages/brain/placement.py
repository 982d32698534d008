"""Decides to which replica, step and micro-batch each rollout of a round belongs.

A group stays on its replica from scoring to the last step, so that alpha and beta need no communication. There are two
ways:

- `--micro-batch-size`: group i belongs to replica `(i mod global batch) // micro-batch mod replicas`. This is known
  before sampling, so each replica samples its own groups.
- `--max-tokens-per-micro-batch`: the lengths decide (`data.group_schedule`). So replicas sample equal shares and
  exchange the tokens before scoring. A group larger than a micro-batch is cut into parts in consecutive micro-batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_brain.config.run import RunConfig
from megatron_brain.config.training import TrainingConfig
from megatron_brain.data.group_schedule import GroupLengths, plan_groups
from megatron_brain.data.groups import Group
from megatron_brain.data.order import Item, replica_share
from megatron_brain.runtime.parallel import Parallel
from megatron_brain.stages.brain.rollouts import Rollout
from megatron_brain.training.schedule import plan_step


@dataclass(frozen=True)
class Part:
    """Responses of a rollout that are computed together: all of them, or a part of a group that is cut."""

    rollout: Rollout
    responses: tuple[int, ...]
    is_whole: bool = True

    @property
    def leads(self) -> bool:
        """Whether this is the one part that stands for its group where groups are counted."""
        return 0 in self.responses

    def group(self) -> Group:
        """The part as a group, with the numbers that are known so far."""
        return self.rollout.group(self.responses)


Step = list[list[Part]]
"""The micro-batches of one optimizer step on this replica."""


class Placement:
    """Places the rollouts of rounds.

    Args:
        training: batch sizes and seed.
        parallel: the layout.
        interleaved: whether the number of micro-batches must be a multiple of the pipeline-parallel size.
        round_to: lengths of packed sequences are multiples of this; None: of the tensor-parallel size.
    """

    def __init__(
        self, training: TrainingConfig, parallel: Parallel, *, interleaved: bool, round_to: int | None = None
    ) -> None:
        self._training, self._parallel = training, parallel
        self._interleaved, self._round_to = interleaved, round_to or parallel.tp_size

    @classmethod
    def of(cls, config: RunConfig, parallel: Parallel) -> "Placement":
        """The placement of a run's settings."""
        return cls(
            config.training,
            parallel,
            interleaved=config.parallel.num_layers_per_virtual_pipeline_stage is not None,
            round_to=config.fp8.packed_multiple(config.parallel),
        )

    @property
    def _budget(self) -> int | None:
        return self._training.max_tokens_per_micro_batch

    def deal(self, items: Sequence[Item]) -> list[Item]:
        """The prompts of a round that this replica samples."""
        if self._budget is not None:
            return list(items[self._parallel.dp_rank :: self._parallel.dp_size])
        settings, parallel = self._training, self._parallel
        batch = settings.global_batch_size
        return [
            item
            for start in range(0, len(items), batch)
            for micro_batch in replica_share(
                items[start : start + batch],
                micro_batch_size=settings.micro_batch_size,
                dp_rank=parallel.dp_rank,
                dp_size=parallel.dp_size,
            )
            for item in micro_batch
        ]

    def steps(self, mine: Sequence[Rollout]) -> list[Step]:
        """Place a round.

        Args:
            mine: the rollouts that `deal` gave this replica, each with its `index` in the round.

        Returns:
            this replica's micro-batches of every step. With a token budget, other replicas may have drawn the rollouts.

        Raises:
            GroupDoesNotFitError: a group does not fit the token budget even when it is cut.
        """
        return self._fixed_steps(mine) if self._budget is None else self._planned_steps(mine)

    def alone(self, rollout: Rollout, *, at_once: int) -> Step:
        """Micro-batches that score one rollout on this replica, for any number of responses. Each has `at_once`
        responses, or as many as fit the token budget.

        Raises:
            GroupDoesNotFitError: the prompt and one response do not fit the token budget.
        """
        settings, count = self._training, len(rollout.responses)
        if self._budget is None:
            shares = [range(start, min(start + at_once, count)) for start in range(0, count, at_once)]
        else:
            [pieces] = plan_groups(
                [GroupLengths(len(rollout.prompt_tokens), tuple(len(each.tokens) for each in rollout.responses))],
                replicas=1,
                max_tokens=self._budget,
                seed=settings.seed,
                shared_prefix=settings.shared_prefix,
                round_to=self._round_to,
                labels=[rollout.id],
            )
            shares = [piece.responses for [piece] in pieces]
        return [[Part(rollout, tuple(share), len(shares) == 1)] for share in shares]

    def _fixed_steps(self, mine: Sequence[Rollout]) -> list[Step]:
        settings, parallel = self._training, self._parallel
        size = settings.micro_batch_size
        for rollout in mine:
            owner = rollout.index % settings.global_batch_size // size % parallel.dp_size
            assert owner == parallel.dp_rank, (
                f"group {rollout.index} of replica {owner} is on replica {parallel.dp_rank}"
            )
        parts = [Part(rollout, tuple(range(len(rollout.responses)))) for rollout in mine]
        micro_batches = [parts[start : start + size] for start in range(0, len(parts), size)]
        per_step = settings.global_batch_size // (size * parallel.dp_size)
        return [micro_batches[start : start + per_step] for start in range(0, len(micro_batches), per_step)]

    def _planned_steps(self, mine: Sequence[Rollout]) -> list[Step]:
        replicas = self._parallel.gather_over_data_parallel(list(mine))
        everything = sorted((rollout for replica in replicas for rollout in replica), key=lambda r: r.index)
        batch = self._training.global_batch_size
        return [
            self._plan(everything[start : start + batch], number)
            for number, start in enumerate(range(0, len(everything), batch))
        ]

    def _plan(self, rollouts: Sequence[Rollout], number: int) -> Step:
        plan = plan_step(
            [rollout.group() for rollout in rollouts],
            self._training,
            self._parallel,
            interleaved=self._interleaved,
            round_to=self._round_to,
            step=number,
            splittable=True,
        )
        return [
            [Part(rollouts[piece.group], piece.responses, piece.num_pieces == 1) for piece in micro_batch]
            for micro_batch in plan
        ]


def rollouts_in(steps: Sequence[Step]) -> list[Rollout]:
    """The rollouts of this replica, in the order of the round.

    Raises:
        AssertionError: some responses of a group are not on this replica.
    """
    found: dict[int, Rollout] = {}
    present: dict[int, set[int]] = {}
    for step in steps:
        for micro_batch in step:
            for part in micro_batch:
                found[part.rollout.index] = part.rollout
                present.setdefault(part.rollout.index, set()).update(part.responses)
    for index, rollout in found.items():
        assert len(present[index]) == len(rollout.responses), f"group {index} is not whole on this replica"
    return [found[index] for index in sorted(found)]
