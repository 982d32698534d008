"""A plan holds every response once, keeps to the budget and the counts, is balanced, and depends on its arguments."""

import os
import subprocess
import sys
import time
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_brain.data.group_schedule import GroupDoesNotFitError, GroupLengths, Piece, plan_groups


@st.composite
def cases(draw, max_replicas=8):
    """Groups and arguments they can be planned with; budgets from one response to several groups."""
    responses = st.lists(st.integers(1, 40), min_size=1, max_size=10).map(tuple)
    group = st.builds(GroupLengths, prompt=st.integers(1, 30), responses=responses)
    groups = draw(st.lists(group, min_size=1, max_size=16)) * draw(st.integers(1, 2))
    round_to = draw(st.integers(1, 8))
    longest = max(group.prompt + max(group.responses) for group in groups)
    return groups, {
        "replicas": draw(st.integers(1, max_replicas)),
        "max_tokens": ceil(longest / round_to) * round_to + draw(st.one_of(st.integers(0, 30), st.integers(0, 500))),
        "seed": draw(st.integers(0, 2**32)),
        "shared_prefix": draw(st.booleans()),
        "round_to": round_to,
        "count_multiple_of": draw(st.integers(1, 4)),
    }


def alone(*tokens):
    """Groups of one response that take so many tokens."""
    return [GroupLengths(1, (count - 1,)) for count in tokens]


def piece_tokens(groups, piece, shared_prefix):
    prompts = 1 if shared_prefix else len(piece.responses)
    return prompts * groups[piece.group].prompt + sum(groups[piece.group].responses[i] for i in piece.responses)


def group_tokens(groups, shared_prefix):
    wholes = [Piece(index, tuple(range(len(group.responses))), 1) for index, group in enumerate(groups)]
    return [piece_tokens(groups, whole, shared_prefix) for whole in wholes]


def places_by_group(plan):
    """group: [(replica, micro-batch, piece)] in the order of the plan."""
    places = {}
    for replica, micro_batches in enumerate(plan):
        for number, micro_batch in enumerate(micro_batches):
            for piece in micro_batch:
                places.setdefault(piece.group, []).append((replica, number, piece))
    return places


def sums(plan, groups):
    """Tokens of every micro-batch, per replica."""
    return [[sum(piece_tokens(groups, p, True) for p in micro_batch) for micro_batch in share] for share in plan]


@settings(deadline=None)
@given(cases())
def test_every_response_is_in_exactly_one_piece(case):
    groups, arguments = case
    places = places_by_group(plan_groups(groups, **arguments))
    assert sorted(places) == list(range(len(groups)))
    for group, found in places.items():
        pieces = [piece for _, _, piece in found]
        assert sorted(i for p in pieces for i in p.responses) == list(range(len(groups[group].responses)))
        assert all(p.responses == tuple(sorted(p.responses)) and p.num_pieces == len(pieces) for p in pieces)


@settings(deadline=None)
@given(cases())
def test_a_group_is_whole_if_it_fits_else_in_consecutive_micro_batches_of_one_replica(case):
    groups, arguments = case
    budget = arguments["max_tokens"] // arguments["round_to"] * arguments["round_to"]
    whole = group_tokens(groups, arguments["shared_prefix"])
    for group, found in places_by_group(plan_groups(groups, **arguments)).items():
        replicas, numbers, pieces = zip(*found)
        assert len(set(replicas)) == 1
        assert list(numbers) == list(range(numbers[0], numbers[0] + len(numbers)))
        assert (len(pieces) == 1) == (whole[group] <= budget)


@settings(deadline=None)
@given(cases())
def test_no_two_pieces_of_a_group_would_fit_one_micro_batch_together(case):
    groups, arguments = case
    shared = arguments["shared_prefix"]
    for group, found in places_by_group(plan_groups(groups, **arguments)).items():
        sizes = sorted(piece_tokens(groups, piece, shared) for _, _, piece in found)
        prompt_saved = groups[group].prompt if shared else 0
        together = sum(sizes[:2]) - prompt_saved
        assert (
            len(sizes) == 1 or ceil(together / arguments["round_to"]) * arguments["round_to"] > arguments["max_tokens"]
        )


@settings(deadline=None)
@given(cases())
def test_no_micro_batch_exceeds_the_budget(case):
    groups, arguments = case
    for micro_batch in (m for share in plan_groups(groups, **arguments) for m in share):
        tokens = sum(piece_tokens(groups, piece, arguments["shared_prefix"]) for piece in micro_batch)
        assert ceil(tokens / arguments["round_to"]) * arguments["round_to"] <= arguments["max_tokens"]


@settings(deadline=None)
@given(cases())
def test_replicas_have_the_fewest_equally_many_micro_batches_that_are_the_multiple(case):
    groups, arguments = case
    multiple = arguments["count_multiple_of"]
    plan = plan_groups(groups, **arguments)
    needed = max(map(len, plan_groups(groups, **(arguments | {"count_multiple_of": 1}))))
    assert len(plan) == arguments["replicas"]
    assert {len(share) for share in plan} == {ceil(needed / multiple) * multiple}


@settings(deadline=None)
@given(cases())
def test_a_micro_batch_is_empty_only_where_no_other_could_be_split_and_at_the_end(case):
    groups, arguments = case
    for share in plan_groups(groups, **arguments):
        full = [micro_batch for micro_batch in share if micro_batch]
        assert full == share[: len(full)]
        assert len(full) == len(share) or all(len(micro_batch) == 1 for micro_batch in full)


def test_the_fullest_micro_batch_is_split_first_by_hand():
    groups = alone(5, 5, 4, 3)
    plans = {n: plan_groups(groups, replicas=1, max_tokens=10, seed=0, count_multiple_of=n) for n in (1, 3, 5)}
    assert {n: sorted(sums(plan, groups)[0]) for n, plan in plans.items()} == {
        1: [7, 10],
        3: [5, 5, 7],
        5: [0, 3, 4, 5, 5],
    }


def test_splitting_halves_a_micro_batch_by_tokens():
    groups = alone(4, 4, 2, 2)
    plan = plan_groups(groups, replicas=1, max_tokens=12, seed=0, count_multiple_of=2)
    assert sorted(sums(plan, groups)[0]) == [6, 6]


@pytest.mark.parametrize("splittable", [True, False])
@pytest.mark.parametrize("shared_prefix", [True, False])
@settings(deadline=None)
@given(case=cases())
def test_the_budget_is_refused_exactly_where_a_group_cannot_be_placed(case, splittable, shared_prefix):
    groups, arguments = case
    arguments |= {"splittable": splittable, "shared_prefix": shared_prefix}
    least = [g.prompt + max(g.responses) for g in groups] if splittable else group_tokens(groups, shared_prefix)
    round_to = arguments["round_to"]
    enough = ceil(max(least) / round_to) * round_to
    plan = plan_groups(groups, **(arguments | {"max_tokens": enough}))
    assert splittable or all(piece.num_pieces == 1 for share in plan for m in share for piece in m)
    if enough > 1:
        with pytest.raises(GroupDoesNotFitError):
            plan_groups(groups, **(arguments | {"max_tokens": enough - 1}))


def test_a_group_that_does_not_fit_is_named_with_its_tokens_and_the_cure():
    groups = [GroupLengths(4, (3, 3)), GroupLengths(6, (2, 5))]
    arguments = {"replicas": 1, "seed": 0, "labels": ["a.jsonl:1", "b.jsonl:7"]}
    with pytest.raises(GroupDoesNotFitError, match=r"group 1 \(b.jsonl:7\).* 11 tokens.* raise it to 11"):
        plan_groups(groups, max_tokens=10, **arguments)
    with pytest.raises(GroupDoesNotFitError, match=r"group 1 .* 11 tokens.*micro-batch 11 in multiples of 4.* to 12"):
        plan_groups(groups, max_tokens=11, round_to=4, **arguments)
    with pytest.raises(GroupDoesNotFitError, match=r"group 0 \(a.jsonl:1\): the whole group.*10 tokens.*batch 9;"):
        plan_groups(groups, max_tokens=9, splittable=False, **arguments)


def list_schedule(tokens, replicas):
    loads = [0] * replicas
    for count in tokens:
        loads[loads.index(min(loads))] += count
    return max(loads)


def first_fit_decreasing_fits(tokens, replicas, limit):
    room = [limit] * replicas
    for count in sorted(tokens, reverse=True):
        fitting = [i for i, free in enumerate(room) if free >= count]
        if not fitting:
            return False
        room[fitting[0]] -= count
    return True


def assert_balanced(plan, groups, shared_prefix):
    tokens = [0] * len(groups)  # The pieces' sum: a cut group repeats its prompt.
    for group, found in places_by_group(plan).items():
        tokens[group] = sum(piece_tokens(groups, piece, shared_prefix) for _, _, piece in found)
    busiest = max(sum(piece_tokens(groups, p, shared_prefix) for m in share for p in m) for share in plan)
    assert busiest <= 1.1 * list_schedule(tokens, len(plan))
    assert busiest <= 1.1 * list_schedule(sorted(tokens, reverse=True), len(plan))
    limit = max(max(tokens), ceil(sum(tokens) / len(plan)))
    while 1.1 * limit < busiest:
        assert not first_fit_decreasing_fits(tokens, len(plan), limit)
        limit += 1


@settings(deadline=None)
@given(cases(max_replicas=5))
def test_the_busiest_replica_is_near_the_best_greedy_spreading(case):
    groups, arguments = case
    assert_balanced(plan_groups(groups, **arguments), groups, arguments["shared_prefix"])


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(2, 60), min_size=3, max_size=14), st.integers(2, 5), st.integers(0, 2**32))
def test_few_large_groups_are_near_the_best_greedy_spreading(tokens, replicas, seed):
    groups = alone(*tokens)
    assert_balanced(plan_groups(groups, replicas=replicas, max_tokens=100, seed=seed), groups, True)


@pytest.mark.parametrize(
    ("tokens", "replicas", "best", "why"),
    [
        ((3, 3, 2, 2, 2), 2, 6, "longest-processing-time gives 7, multifit 6"),
        ((6, 10, 9, 6, 4, 7, 5, 4), 3, 17, "longest-processing-time and multifit give 19, in-order scheduling 17"),
        ((2, 3, 2, 3, 10), 2, 10, "in-order scheduling gives 14, the others 10"),
    ],
)
def test_the_best_of_the_greedy_spreadings_is_taken(tokens, replicas, best, why):
    groups = alone(*tokens)
    plan = plan_groups(groups, replicas=replicas, max_tokens=20, seed=0)
    assert max(map(sum, sums(plan, groups))) == best, why


def first_fit_micro_batches(pieces, budget):
    """Micro-batches of (tokens, outer, inner) pieces: beside whole groups at most two outer or one inner each."""
    bins = []
    for tokens, outer, inner in sorted(pieces, reverse=True):
        for b in bins:
            if b[0] + tokens <= budget and b[1] + b[2] * 2 + outer + 2 * inner <= 2:
                break
        else:
            b = [0, 0, 0]
            bins.append(b)
        b[0], b[1], b[2] = b[0] + tokens, b[1] + outer, b[2] + inner
    return len(bins)


@settings(deadline=None, max_examples=300)
@given(cases(max_replicas=3))
def test_micro_batches_are_nearly_as_few_as_first_fit_decreasing(case):
    groups, arguments = case
    arguments |= {"count_multiple_of": 1}
    budget = arguments["max_tokens"] // arguments["round_to"] * arguments["round_to"]
    plan = plan_groups(groups, **arguments)
    pieces = [[] for _ in plan]
    for found in places_by_group(plan).values():
        sizes = sorted(piece_tokens(groups, piece, arguments["shared_prefix"]) for _, _, piece in found)
        outer = [(size, int(len(sizes) > 1), 0) for size in sizes[:2]]
        pieces[found[0][0]] += outer + [(size, 0, 1) for size in sizes[2:]]
    assert len(plan[0]) <= 1.1 * max(first_fit_micro_batches(share, budget) for share in pieces) + 1


@settings(deadline=None)
@given(st.lists(st.integers(2, 100), min_size=30, max_size=120), st.integers(0, 2**32))
def test_many_whole_groups_take_nearly_as_few_micro_batches_as_first_fit_decreasing(tokens, seed):
    (share,) = plan_groups(alone(*tokens), replicas=1, max_tokens=100, seed=seed)
    assert len(share) <= 1.1 * first_fit_micro_batches([(count, 0, 0) for count in tokens], 100) + 1


def test_leftovers_of_two_cut_groups_and_a_whole_group_share_a_micro_batch_by_hand():
    groups = [GroupLengths(2, (8, 1)), GroupLengths(2, (1, 8)), *alone(4)]
    for seed in range(10):
        plan = plan_groups(groups, replicas=1, max_tokens=10, seed=seed)
        assert sums(plan, groups) == [[10, 3 + 3 + 4, 10]]
        assert plan[0][1] == (Piece(0, (1,), 2), Piece(1, (0,), 2), Piece(2, (0,), 1))


def test_leftovers_of_three_cut_groups_do_not_share_a_micro_batch():
    groups = [GroupLengths(1, (9, 1))] * 3
    plan = plan_groups(groups, replicas=1, max_tokens=10, seed=0)
    assert sorted(sums(plan, groups)[0]) == [2, 4, 10, 10, 10]


def test_inner_pieces_share_a_micro_batch_with_whole_groups_only():
    inner = [GroupLengths(1, (5, 5, 5))]  # Pieces of 6, 6 and 6 tokens
    cut = [GroupLengths(1, (9, 2))] * 3  # and of 10 and 3.
    plan = plan_groups(inner + cut, replicas=1, max_tokens=10, seed=0)
    assert sorted(sums(plan, inner + cut)[0]) == [3, 6, 6 + 3, 6 + 3, 10, 10, 10]
    whole = alone(3, 3, 3)
    plan = plan_groups(inner + whole, replicas=1, max_tokens=10, seed=0)
    assert sums(plan, inner + whole) == [[6 + 3] * 3]


@settings(deadline=None)
@given(cases())
def test_same_arguments_give_the_same_plan(case):
    groups, arguments = case
    assert plan_groups(tuple(groups), **arguments) == plan_groups(groups, **arguments)


def test_seeds_change_replicas_and_order_which_do_not_go_by_size():
    groups = [GroupLengths(20, tuple(range(5 + i, 25 + i, 2))) for i in range(60)]
    plans = [plan_groups(groups, replicas=4, max_tokens=800, seed=seed) for seed in range(20)]
    assert len({repr(plan) for plan in plans}) == 20
    assert {places_by_group(plan)[59][0][0] for plan in plans} == {0, 1, 2, 3}
    orders = [tokens for plan in plans for tokens in sums(plan, groups)]
    assert sum(tokens in (sorted(tokens), sorted(tokens, reverse=True)) for tokens in orders) < len(orders) / 4


def test_seeds_change_who_meets_whom_among_groups_of_equal_size():
    plans = [plan_groups(alone(*[10] * 12), replicas=3, max_tokens=40, seed=seed) for seed in range(20)]
    assert len({frozenset(p.group for m in share for p in m) for plan in plans for share in plan}) > 20


def test_the_plan_does_not_depend_on_the_process_and_needs_no_torch():
    program = (
        "import sys; from megatron_brain.data.group_schedule import GroupLengths, plan_groups\n"
        "groups = [GroupLengths(5, tuple(range(1, 2 + i))) for i in range(30)]\n"
        "print(plan_groups(groups, replicas=3, max_tokens=64, seed=1), 'torch' in sys.modules)"
    )

    def output(hash_seed):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    assert output("1") == output("2")
    assert output("1").endswith(" False\n")


def test_a_large_step_is_planned_quickly():
    groups = [GroupLengths(50 + i % 700, tuple(20 + i * j * 7919 % 650 for j in range(32))) for i in range(4096)]
    for replicas, max_tokens in [(64, 8192), (64, 1600), (1, 1600)]:
        start = time.process_time()
        plan_groups(groups, replicas=replicas, max_tokens=max_tokens, seed=0, round_to=8, count_multiple_of=4)
        assert time.process_time() - start < 3  # About 0.5 s at most.


@pytest.mark.parametrize("name", ["replicas", "max_tokens", "round_to", "count_multiple_of"])
def test_arguments_below_one_are_refused_by_name(name):
    with pytest.raises(AssertionError, match=f"{name}=0: must be at least 1"):
        plan_groups(alone(2), **({"replicas": 1, "max_tokens": 8, "seed": 0} | {name: 0}))


@pytest.mark.parametrize(
    ("groups", "labels", "message"),
    [
        ([], None, "no groups to plan"),
        (alone(2, 2), ["a"], "1 labels for 2 groups"),
        ([*alone(2), GroupLengths(1, ())], ["a", "b"], r"group 1 \(b\) has no responses"),
        ([*alone(2), GroupLengths(0, (1,))], None, "group 1: .*at least one token.*prompt=0"),
        ([*alone(2), GroupLengths(1, (1, 0))], None, r"group 1: .*at least one token.*\(1, 0\)"),
    ],
)
def test_groups_that_are_none_are_refused_with_their_name(groups, labels, message):
    with pytest.raises(AssertionError, match=message):
        plan_groups(groups, replicas=1, max_tokens=8, seed=0, labels=labels)
