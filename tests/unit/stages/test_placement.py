"""Every group of a round is whole on one replica, whatever sizes micro-batches."""

from types import SimpleNamespace

import pytest

from megatron_brain.config.training import TrainingConfig
from megatron_brain.data.group_schedule import GroupDoesNotFitError
from megatron_brain.stages.brain.placement import Part, Placement, rollouts_in
from megatron_brain.stages.brain.rollouts import Response, Rollout


def rollout(index, prompt=6, responses=(3, 4, 5)):
    return Rollout(
        id=f"prompts:{index}",
        index=index,
        prompt_tokens=tuple(range(1, prompt + 1)),
        responses=[
            Response(tokens=tuple(range(1, n + 1)), log_proposal=-1.0 * i, reward=10.0 * index + i, log_prior=-2.0)
            for i, n in enumerate(responses)
        ],
    )


def place(rollouts, *, replicas, interleaved=False, pp_size=1, **training):
    """Each replica's steps of a round all of them deal out among themselves."""
    settings = TrainingConfig(**training)
    layouts = [SimpleNamespace(dp_rank=rank, dp_size=replicas, tp_size=1, pp_size=pp_size) for rank in range(replicas)]
    placements = [Placement(settings, layout, interleaved=interleaved) for layout in layouts]
    mine = [placement.deal(rollouts) for placement in placements]
    for layout in layouts:
        layout.gather_over_data_parallel = lambda item: mine
    return [placement.steps(share) for placement, share in zip(placements, mine, strict=True)]


def indices(steps):
    return [[[part.rollout.index for part in micro_batch] for micro_batch in step] for step in steps]


def test_a_fixed_micro_batch_size_deals_groups_by_their_index():
    first, second = place([rollout(i) for i in range(8)], replicas=2, global_batch_size=4, micro_batch_size=1)
    assert indices(first) == [[[0], [2]], [[4], [6]]]
    assert indices(second) == [[[1], [3]], [[5], [7]]]


def test_a_group_on_another_replica_breaks_the_invariant():
    layout = SimpleNamespace(dp_rank=1, dp_size=2, tp_size=1, pp_size=1)
    placement = Placement(TrainingConfig(global_batch_size=4), layout, interleaved=False)
    with pytest.raises(AssertionError, match="group 0 of replica 0 is on replica 1"):
        placement.steps([rollout(0)])


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("budget", [14, 20, 40, 1000])
def test_a_token_budget_places_every_response_once_and_each_group_on_one_replica(replicas, budget):
    rollouts = [rollout(i, responses=(3, 1 + i % 5, 8)[: 2 + i % 2]) for i in range(12)]
    everyone = place(rollouts, replicas=replicas, global_batch_size=6, max_tokens_per_micro_batch=budget)
    owners = [[r.index for r in rollouts_in(steps)] for steps in everyone]
    assert sorted(index for owned in owners for index in owned) == list(range(12))
    for number in range(2):
        assert len({len(steps[number]) for steps in everyone}) == 1, "as many micro-batches on all replicas"
        placed = [
            (part.rollout.index, response)
            for steps in everyone
            for micro_batch in steps[number]
            for part in micro_batch
            for response in part.responses
        ]
        expected = [(r.index, i) for r in rollouts[6 * number : 6 * number + 6] for i in range(len(r.responses))]
        assert sorted(placed) == expected, "a step holds the groups of its batch"
    for micro_batch in (micro_batch for steps in everyone for step in steps for micro_batch in step):
        assert sum(part.group().num_tokens(shared_prefix=True) for part in micro_batch) <= budget


def test_one_part_of_a_cut_group_leads_and_each_carries_the_numbers_of_its_responses():
    [[step]] = place([rollout(3)], replicas=1, global_batch_size=1, max_tokens_per_micro_batch=11)
    parts = [part for micro_batch in step for part in micro_batch]
    assert len(parts) == 3 and not any(part.is_whole for part in parts)
    assert [part.leads for part in parts].count(True) == 1
    for part in parts:
        group = part.group()
        assert group.values["reward"] == tuple(30.0 + i for i in part.responses)
        assert [len(tokens) for tokens in group.responses] == [3 + i for i in part.responses]


def test_the_interleaved_schedule_gets_whole_rounds_of_micro_batches():
    [steps] = place(
        [rollout(i) for i in range(3)],
        replicas=1,
        interleaved=True,
        pp_size=2,
        global_batch_size=3,
        max_tokens_per_micro_batch=18,
    )
    assert len(steps[0]) == 4


def test_a_group_no_micro_batch_can_hold_is_named():
    with pytest.raises(GroupDoesNotFitError, match="prompts:5"):
        place([rollout(5)], replicas=1, global_batch_size=1, max_tokens_per_micro_batch=10)


def test_a_group_that_is_not_whole_on_a_replica_is_found():
    with pytest.raises(AssertionError, match="group 2 is not whole"):
        rollouts_in([[[Part(rollout(2), (0, 2), is_whole=False)]]])


def test_a_token_budget_counts_tokens_as_they_are_padded():
    """A micro-batch of 2 x 18 tokens would be 48 long."""
    layout = SimpleNamespace(dp_rank=0, dp_size=1, tp_size=1, pp_size=1)
    settings = TrainingConfig(global_batch_size=2, max_tokens_per_micro_batch=40)
    rollouts = [rollout(0), rollout(1)]
    layout.gather_over_data_parallel = lambda item: [rollouts]
    apart, together = (
        indices(Placement(settings, layout, interleaved=False, round_to=round_to).steps(rollouts))
        for round_to in (16, 1)
    )
    assert sorted(apart[0]) == [[0], [1]] and sorted(together[0][0]) == [0, 1]


def alone(rollout, **training):
    """The responses of each micro-batch that a rollout is scored in."""
    layout = SimpleNamespace(dp_rank=1, dp_size=2, tp_size=1, pp_size=1)
    steps = Placement(TrainingConfig(**training), layout, interleaved=False).alone(rollout, at_once=2)
    assert all(len(micro_batch) == 1 for micro_batch in steps)
    return [micro_batch[0].responses for micro_batch in steps]


def test_a_rollout_is_scored_alone_so_many_responses_at_one_time_or_within_the_token_budget():
    many = rollout(0, responses=(3, 4, 5, 3, 1))
    assert alone(many) == [(0, 1), (2, 3), (4,)]
    # With the prompt of 6: what fits 14 tokens.
    parts = alone(many, max_tokens_per_micro_batch=14)
    assert sorted(i for part in parts for i in part) == [0, 1, 2, 3, 4]
    assert all(6 + sum((3, 4, 5, 3, 1)[i] for i in part) <= 14 for part in parts)
    with pytest.raises(GroupDoesNotFitError, match="prompts:0"):
        alone(many, max_tokens_per_micro_batch=10)
