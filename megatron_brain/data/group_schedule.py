"""Plans which groups a replica trains on in one optimizer step, and in which micro-batches, in pure Python.

A piece is a whole group, or the part of a cut group that one micro-batch holds. A piece of responses `r` costs
`prompt + sum(r)` tokens where its responses share the prompt, and `sum(prompt + r)` where they do not. A micro-batch
costs the sum of its pieces, rounded up to a multiple of `round_to`. Invariants of :func:`plan_groups`:

1. every response of every group is in exactly one piece. A group that fits a micro-batch is one piece; the pieces of
   any other lie in consecutive micro-batches of one replica, one in each;
2. no micro-batch costs more than `max_tokens`;
3. all replicas have equally many micro-batches: the most that any of them needs, rounded up to a multiple of
   `count_multiple_of`. A replica that needs fewer splits its fullest micro-batches of several pieces. It gets empty
   micro-batches (at its end) only when each of the others holds a single piece;
4. no group is dropped or shortened: one that cannot be placed raises :class:`GroupDoesNotFitError`;
5. the busiest replica has at most 1.1 times the tokens of the best of longest-processing-time, in-order list
   scheduling and multifit. A replica needs at most 1.1 times the micro-batches of first-fit-decreasing, plus one
   (for the same pieces, under the restriction below);
6. the plan depends on the arguments alone. The seed decides ties, which replica gets which share, and the order of a
   replica's micro-batches, so that none of these depends on size.

Borders. Consecutive micro-batches meet at a border. A whole group crosses none, the first and the last piece of a cut
group cross one, an inner piece crosses two. Packing lets the pieces of a micro-batch cross at most two borders, so at
most two cut groups meet there: one that ends and one that begins. This is enough to put the pieces of every group in a
row, for this reason: no two pieces of a cut group fit one micro-batch together, so its two outer pieces sum to more
than the budget. If k groups met in a circle, 2k outer pieces would be in k micro-batches, which is too much. So
micro-batches that are linked by cut groups form simple paths.
"""

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from typing import NamedTuple

from megatron_brain.errors import ConfigError

# A distribution this close to the lower bound is good enough. A longer search would gain nothing.
_BALANCE_TOLERANCE = 0.01


@dataclass(frozen=True)
class GroupLengths:
    """Tokens of a group's prompt and of each of its responses, all >= 1."""

    prompt: int
    responses: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Responses of one group that share a micro-batch.

    `group` is the group's index; `responses` are indices of its responses, ascending; `num_pieces` is the number of
    pieces the group was cut into (1: the piece is the whole group).
    """

    group: int
    responses: tuple[int, ...]
    num_pieces: int


MicroBatch = tuple[Piece, ...]


class GroupDoesNotFitError(ConfigError):
    """A group, or the smallest piece that it may be cut into, is longer than a micro-batch."""


class _Placed(NamedTuple):
    """A piece with what planning needs: its place among its group's pieces, its tokens and the borders it crosses."""

    piece: Piece
    place: int
    tokens: int
    borders: int


def plan_groups(
    groups: Sequence[GroupLengths],
    *,
    replicas: int,
    max_tokens: int,
    seed: int,
    shared_prefix: bool = True,
    splittable: bool = True,
    round_to: int = 1,
    count_multiple_of: int = 1,
    labels: Sequence[str] | None = None,
) -> list[list[MicroBatch]]:
    """Spread the groups of one optimizer step over the replicas and pack them into micro-batches.

    Args:
        groups: lengths of the step's groups, in tokens, each at least 1; there is at least one group.
        replicas: data-parallel size.
        max_tokens: tokens a micro-batch may have after rounding.
        seed: decides ties and order; pass another one each step.
        shared_prefix: whether a piece holds its prompt once rather than once per response.
        splittable: whether a group may be cut; False where the loss couples the responses (preference pairs).
        round_to: a micro-batch is padded to a multiple of this (the tensor-parallel size, and what FP8 needs).
        count_multiple_of: micro-batches per replica are a multiple of this (the interleaved pipeline schedule).
        labels: names of the groups for error messages, one each.

    Returns:
        For each replica its micro-batches, each a list of pieces in the order of the groups.

    Raises:
        GroupDoesNotFitError: a group does not fit; names its index, label and tokens, and the cure.
    """
    limits = {"replicas": replicas, "max_tokens": max_tokens, "round_to": round_to}
    _check_arguments(groups, labels, **limits, count_multiple_of=count_multiple_of)
    budget = max_tokens - max_tokens % round_to  # A sum up to this stays within max_tokens when it is rounded up.
    pieces: list[list[_Placed]] = []
    for index, lengths in enumerate(groups):
        least = _whole_tokens(lengths, shared_prefix) if not splittable else lengths.prompt + max(lengths.responses)
        if least > budget:
            name = _name(index, labels)
            raise GroupDoesNotFitError(_does_not_fit(name, least, splittable, max_tokens, round_to))
        pieces.append(_cut(index, lengths, budget, shared_prefix))

    rng = random.Random(seed)
    shares = _spread([sum(placed.tokens for placed in group) for group in pieces], replicas, rng)
    packed = [_pack([placed for group in share for placed in pieces[group]], budget) for share in shares]
    count = _round_up(max(map(len, packed)), count_multiple_of)
    return [_in_order(_split_up_to(count, micro_batches), count, rng) for micro_batches in packed]


def _check_arguments(groups: Sequence[GroupLengths], labels: Sequence[str] | None, **at_least_one: int) -> None:
    for name, value in at_least_one.items():
        assert value >= 1, f"{name}={value}: must be at least 1"
    assert groups, "there are no groups to plan"
    assert labels is None or len(labels) == len(groups), f"{len(labels)} labels for {len(groups)} groups"
    for index, lengths in enumerate(groups):
        assert lengths.responses, f"{_name(index, labels)} has no responses"
        assert lengths.prompt >= 1 and min(lengths.responses) >= 1, (
            f"{_name(index, labels)}: prompt and responses need at least one token each: {lengths}"
        )


def _name(index: int, labels: Sequence[str] | None) -> str:
    return f"group {index}" if labels is None else f"group {index} ({labels[index]})"


def _does_not_fit(name: str, tokens: int, splittable: bool, max_tokens: int, round_to: int) -> str:
    what = "the prompt and the longest response take" if splittable else "the whole group, which may not be cut, takes"
    rounding = f" in multiples of {round_to}" if round_to > 1 else ""
    return (
        f"{name}: {what} {tokens} tokens, more than --max-tokens-per-micro-batch {max_tokens}{rounding}; raise it to "
        f"{_round_up(tokens, round_to)} or more, or shorten or leave out the record"
    )


def _round_up(value: int, multiple_of: int) -> int:
    return -(-value // multiple_of) * multiple_of


def _whole_tokens(lengths: GroupLengths, shared_prefix: bool) -> int:
    prompts = 1 if shared_prefix else len(lengths.responses)
    return prompts * lengths.prompt + sum(lengths.responses)


def _cut(index: int, lengths: GroupLengths, budget: int, shared_prefix: bool) -> list[_Placed]:
    """The whole group, or its pieces in the order of their micro-batches; no two of them fit one micro-batch."""
    whole = _whole_tokens(lengths, shared_prefix)
    if whole <= budget:
        return [_Placed(Piece(index, tuple(range(len(lengths.responses))), num_pieces=1), 0, whole, borders=0)]
    once, each = (lengths.prompt, 0) if shared_prefix else (0, lengths.prompt)
    sizes = [each + response for response in lengths.responses]
    pieces = _best_fit_decreasing(sizes, [0] * len(sizes), budget - once)
    tokens = {place: once + sum(sizes[i] for i in piece) for place, piece in enumerate(pieces)}
    # The two smallest become the outer pieces: only these can share a micro-batch with another cut group.
    first, last, *inner = sorted(tokens, key=tokens.__getitem__)
    return [
        _Placed(Piece(index, tuple(sorted(pieces[i])), len(pieces)), place, tokens[i], 1 if i in (first, last) else 2)
        for place, i in enumerate([first, *inner, last])
    ]


def _best_fit_decreasing(sizes: Sequence[int], borders: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack indices into bins of size `capacity` and two borders: largest first, each into the bin it fills most.

    This takes O(n log n) comparisons. First fit would look at every bin.
    """
    smallest = min(sizes, default=0)
    bins: list[list[int]] = []
    rooms: list[list[tuple[int, int]]] = [[], [], []]  # [borders left]: (room, bin), ascending
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = []
        for left in range(borders[index], 3):
            place = bisect_left(rooms[left], (sizes[index],))
            if place < len(rooms[left]):
                fits.append((rooms[left][place], left, place))
        if fits:
            (room, number), left, place = min(fits)
            del rooms[left][place]
        else:
            room, number, left = capacity, len(bins), 2
            bins.append([])
        bins[number].append(index)
        room -= sizes[index]
        if room >= smallest:
            insort(rooms[left - borders[index]], (room, number))
    return bins


def _spread(loads: Sequence[int], replicas: int, rng: random.Random) -> list[list[int]]:
    """The groups of each replica, chosen so that the largest sum of `loads` on a replica is small.

    Longest-processing-time is near the lower bound unless groups are few and large. Then other greedy methods may beat
    it by more than 10 %, so the best of them is taken.
    """
    largest_first = list(range(len(loads)))
    rng.shuffle(largest_first)
    largest_first.sort(key=lambda group: -loads[group])
    bound = max(max(loads), -(-sum(loads) // replicas))

    def busiest(shares: list[list[int]]) -> int:
        return max(sum(loads[group] for group in share) for share in shares)

    best = _list_schedule(largest_first, loads, replicas)
    if busiest(best) > bound * (1 + _BALANCE_TOLERANCE):
        best = min(best, _list_schedule(range(len(loads)), loads, replicas), key=busiest)
        best = _multifit(largest_first, loads, replicas, bound, busiest(best)) or best
    rng.shuffle(best)
    return best


def _list_schedule(order: Sequence[int], loads: Sequence[int], replicas: int) -> list[list[int]]:
    """Give each group in turn to the replica with the smallest load. Largest first, this is longest-processing-time."""
    shares: list[list[int]] = [[] for _ in range(replicas)]
    heap = [(0, replica) for replica in range(replicas)]
    for group in order:
        load, replica = heap[0]
        shares[replica].append(group)
        heapreplace(heap, (load + loads[group], replica))
    return shares


def _multifit(
    largest_first: Sequence[int], loads: Sequence[int], replicas: int, low: int, high: int
) -> list[list[int]] | None:
    """The shares for the least limit in [low, high) that first fit keeps with `replicas` replicas, found by bisection.

    Returns None where no such limit was found (Coffman, Garey and Johnson 1978).
    """
    best = None
    while high - low > low * _BALANCE_TOLERANCE:
        limit = (low + high) // 2
        shares = _first_fit(largest_first, loads, replicas, limit)
        if shares is None:
            low = limit + 1
        else:
            best, high = shares, limit
    return best


def _first_fit(order: Sequence[int], loads: Sequence[int], replicas: int, limit: int) -> list[list[int]] | None:
    """Give each group in turn to the first replica that stays within `limit`; None where a group finds none."""
    shares: list[list[int]] = [[] for _ in range(replicas)]
    room = [limit] * replicas
    for group in order:
        load = loads[group]
        replica = next((r for r, free in enumerate(room) if free >= load), None)
        if replica is None:
            return None
        shares[replica].append(group)
        room[replica] -= load
    return shares


def _pack(pieces: Sequence[_Placed], budget: int) -> list[list[_Placed]]:
    """Pack pieces into as few micro-batches as best fit finds. Their order is not decided yet."""
    bins = _best_fit_decreasing([placed.tokens for placed in pieces], [placed.borders for placed in pieces], budget)
    return [[pieces[index] for index in indices] for indices in bins]


def _split_up_to(count: int, micro_batches: list[list[_Placed]]) -> list[list[_Placed]]:
    """Halve the fullest micro-batch of several pieces until there are `count`, or none is left to halve.

    Any division is valid: after it, only groups that shared a micro-batch before can share one.
    """
    done = [pieces for pieces in micro_batches if len(pieces) == 1]
    # The number keeps the heap from comparing pieces.
    heap = [(-_tokens(pieces), number, pieces) for number, pieces in enumerate(micro_batches) if len(pieces) > 1]
    heapify(heap)
    number = len(micro_batches)
    while heap and len(done) + len(heap) < count:
        halves: tuple[list[_Placed], list[_Placed]] = ([], [])
        for placed in sorted(heappop(heap)[2], key=lambda placed: -placed.tokens):
            min(halves, key=_tokens).append(placed)
        for half in halves:
            if len(half) == 1:
                done.append(half)
            else:
                heappush(heap, (-_tokens(half), number, half))
                number += 1
    return done + [pieces for _, _, pieces in heap]


def _tokens(pieces: Sequence[_Placed]) -> int:
    return sum(placed.tokens for placed in pieces)


def _in_order(micro_batches: list[list[_Placed]], count: int, rng: random.Random) -> list[MicroBatch]:
    """The micro-batches in random order, those linked by a cut group in a row; then empty ones up to `count`."""
    places: dict[int, dict[int, int]] = {}  # {group: {place of the piece: micro-batch}}
    for number, pieces in enumerate(micro_batches):
        for placed in pieces:
            places.setdefault(placed.piece.group, {})[placed.place] = number
    links: list[list[int]] = [[] for _ in micro_batches]
    for numbers in places.values():
        for place in range(1, len(numbers)):
            links[numbers[place - 1]].append(numbers[place])
            links[numbers[place]].append(numbers[place - 1])

    # Linked micro-batches form paths. Each is walked from the end that comes first in a random order.
    starts = [number for number, linked in enumerate(links) if len(linked) < 2]
    rng.shuffle(starts)
    paths: list[list[int]] = []
    seen: set[int] = set()
    for start in starts:
        path = []
        step = [] if start in seen else [start]
        while step:
            path.append(step[0])
            seen.add(step[0])
            step = [number for number in links[step[0]] if number not in seen]
        paths.append(path)
    rng.shuffle(paths)  # Paths with two ends tend to come early, so all are shuffled once more.
    order = [number for path in paths for number in path]
    assert len(order) == len(micro_batches), "cut groups meet in a circle"
    planned = [tuple(sorted((placed.piece for placed in micro_batches[n]), key=lambda p: p.group)) for n in order]
    return planned + [()] * (count - len(planned))
