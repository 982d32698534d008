"""Packing of groups, worked by hand and by properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_brain.data.groups import Group, Segment, pack_groups, packed_length
from megatron_brain.errors import RecordError

PAIR = Group(
    prompt=(1, 2, 3),
    responses=((4, 5), (6, 7, 8)),
    loss_masks=((True, False), (True, True, True)),
    values={"margin": (0.5,), "reward": (1.0, -2.0)},
    record_id="pairs.jsonl:1",
)
LONE = Group(prompt=(11, 12), responses=((13, 14),), values={"margin": (3.0,), "reward": (4.0,)})

tokens = st.integers(0, 50)
token_lists = st.lists(tokens, min_size=1, max_size=5).map(tuple)


@st.composite
def random_groups(draw):
    """Groups of one to four responses, with or without loss masks."""
    groups = []
    for _ in range(draw(st.integers(1, 4))):
        responses = tuple(draw(st.lists(token_lists, min_size=1, max_size=4)))
        masks = tuple(tuple(draw(st.booleans()) for _ in response) for response in responses)
        groups.append(
            Group(prompt=draw(token_lists), responses=responses, loss_masks=masks if draw(st.booleans()) else None)
        )
    return groups


def as_lists(batch, *names):
    return [getattr(batch, name).tolist() for name in names]


def test_shared_prefix_by_hand():
    batch = pack_groups([PAIR, LONE], shared_prefix=True, length=14)
    # prompt  resp 1  resp 2   lone, one piece      padding
    # 0 1 2   3 4     5 6 7    8 9 10 11            12 13
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 11, 12]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3, 0, 1]]
    assert batch.segments == (
        Segment(start=0, length=3),
        Segment(start=3, length=2, prefix_start=0, prefix_length=3),
        Segment(start=5, length=3, prefix_start=0, prefix_length=3),
        Segment(start=8, length=4),
        Segment(start=12, length=2),
    )
    assert batch.predict_index.tolist() == [2, 3, 2, 5, 6, 9, 10]
    _expect_what_does_not_depend_on_the_prefix(batch)
    assert batch.last_index.tolist() == [4, 7, 11]


def test_without_shared_prefix_by_hand():
    batch = pack_groups([PAIR, LONE], shared_prefix=False)
    # first copy   second copy         lone
    # 0 1 2 3 4    5 6 7 8 9 10        11 12 13 14
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 11, 12, 13, 14]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]
    assert batch.segments == (Segment(0, 5), Segment(5, 6), Segment(11, 4))
    assert batch.predict_index.tolist() == [2, 3, 7, 8, 9, 12, 13]
    _expect_what_does_not_depend_on_the_prefix(batch)
    assert batch.last_index.tolist() == [4, 10, 14]


def _expect_what_does_not_depend_on_the_prefix(batch):
    assert batch.targets.tolist() == [4, 5, 6, 7, 8, 13, 14]
    assert batch.loss_mask.tolist() == [True, False, True, True, True, True, True]
    assert batch.response_index.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert batch.num_responses == 3
    assert batch.groups == (PAIR, LONE)


def test_values_are_laid_end_to_end_as_float32():
    batch = pack_groups([PAIR, LONE], shared_prefix=True)
    assert batch.values("margin").tolist() == [0.5, 3.0]
    assert batch.values("reward").tolist() == [1.0, -2.0, 4.0]
    whole_numbers = pack_groups([Group(prompt=(1,), responses=((2,),), values={"reward": (1,)})], shared_prefix=True)
    assert whole_numbers.values("reward").dtype == torch.float32


def test_sum_per_response_adds_the_counted_tokens_of_each():
    batch = pack_groups([PAIR, LONE], shared_prefix=True)
    values = torch.tensor([1.0, 100.0, 2.0, 3.0, 4.0, 5.0, 6.0], requires_grad=True)
    sums = batch.sum_per_response(values)
    assert sums.tolist() == [1.0, 9.0, 11.0]
    (sums * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert values.grad.tolist() == [1, 0, 10, 10, 10, 100, 100]


def test_split_per_response_gives_each_response_its_counted_tokens():
    groups = [Group(prompt=(1, 2), responses=((3, 4, 5), (6,))), Group(prompt=(7,), responses=((8, 9),))]
    batch = pack_groups(groups, shared_prefix=True, length=16)
    parts = batch.split_per_response(batch.targets)
    assert [part.tolist() for part in parts] == [[3, 4, 5], [6], [8, 9]]
    assert pack_groups([], shared_prefix=True, length=4).split_per_response(torch.zeros(0)) == ()


def test_sum_per_response_leaves_out_uncounted_infinities_and_adds_in_float32():
    batch = pack_groups([PAIR], shared_prefix=True)
    values = torch.tensor([256.0, -torch.inf, 256.0, 1.0, 1.0], dtype=torch.bfloat16)
    sums = batch.sum_per_response(values)
    assert sums.dtype == torch.float32
    assert sums.tolist() == [256.0, 258.0]


@given(groups=random_groups(), shared=st.booleans(), padding=st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_every_response_token_is_a_target_exactly_once_and_predicted_from_the_token_before(groups, shared, padding):
    length = packed_length(groups, shared_prefix=shared) + padding
    batch = pack_groups(groups, shared_prefix=shared, length=length)
    responses = [(index, response, group) for index, group in enumerate(groups) for response in group.responses]
    assert batch.targets.tolist() == [token for _, response, _ in responses for token in response]
    sequence = batch.tokens[0].tolist()
    predict, owner = as_lists(batch, "predict_index", "response_index")
    for number, (_, response, group) in enumerate(responses):
        mine = [place for place, of in zip(predict, owner, strict=True) if of == number]
        assert [sequence[place] for place in mine] == [group.prompt[-1], *response[:-1]]
        last = batch.last_index[number].item()
        assert sequence[last] == response[-1]
        if len(response) > 1:
            assert last == mine[-1] + 1


@given(groups=random_groups(), shared=st.booleans(), padding=st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_segments_tile_the_sequence_and_positions_continue_those_of_the_prefix(groups, shared, padding):
    length = packed_length(groups, shared_prefix=shared) + padding
    batch = pack_groups(groups, shared_prefix=shared, length=length)
    assert batch.tokens.shape == batch.position_ids.shape == (1, length)
    end = 0
    for segment in batch.segments:
        assert segment.start == end and segment.length > 0
        assert segment.prefix_start + segment.prefix_length <= segment.start
        end += segment.length
        if end <= length - padding:
            positions = batch.position_ids[0, segment.start : end].tolist()
            assert positions == list(range(segment.prefix_length, segment.prefix_length + segment.length))
    assert end == length


@given(groups=random_groups(), shared=st.booleans(), multiple=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_packed_length_is_that_of_the_packed_sequence_rounded_up(groups, shared, multiple):
    exact = pack_groups(groups, shared_prefix=shared).tokens.numel()
    rounded = packed_length(groups, shared_prefix=shared, multiple_of=multiple)
    assert rounded % multiple == 0 and 0 <= rounded - exact < multiple
    assert exact == sum(group.num_tokens(shared_prefix=shared) for group in groups)


def test_a_shared_prefix_saves_the_copies_of_the_prompt():
    group = Group(prompt=(1,) * 384, responses=((2,) * 48,) * 16)
    assert group.num_tokens(shared_prefix=False) / group.num_tokens(shared_prefix=True) == 6.0


@pytest.mark.parametrize("padding", [1, 100])
def test_padding_takes_no_positions_beyond_those_of_the_longest_group(padding):
    length = packed_length([PAIR, LONE], shared_prefix=True) + padding
    batch = pack_groups([PAIR, LONE], shared_prefix=True, length=length)
    assert batch.position_ids.max().item() == 5


@given(groups=random_groups(), shared=st.booleans(), padding=st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_padding_repeats_the_start_of_a_sequence_that_is_there(groups, shared, padding):
    """So it shows the model nothing new, and widens no scale of FP8."""
    length = packed_length(groups, shared_prefix=shared)
    batch = pack_groups(groups, shared_prefix=shared, length=length + padding)
    tokens = batch.tokens[0].tolist()
    pieces = [
        (tokens[s.start : s.start + s.length], batch.position_ids[0, s.start : s.start + s.length].tolist(), s)
        for s in batch.segments
    ]
    there = [ids for ids, _, segment in pieces if segment.start < length and not segment.prefix_length]
    for ids, positions, segment in pieces:
        if segment.start >= length:
            assert segment.prefix_length == 0 and positions == list(range(len(ids)))
            assert any(ids == sequence[: len(ids)] for sequence in there)


def test_a_micro_batch_of_padding_alone_takes_one_position():
    batch = pack_groups([], shared_prefix=True, length=5)
    assert batch.segments == (Segment(start=0, length=5),)
    assert batch.position_ids.tolist() == [[0] * 5]


def test_to_moves_every_tensor_and_keeps_the_rest():
    batch = pack_groups([PAIR, LONE], shared_prefix=True)
    moved = batch.to(torch.device("meta"))
    assert all(value.is_meta for value in vars(moved).values() if isinstance(value, torch.Tensor))
    assert moved.groups is batch.groups and moved.segments is batch.segments


def test_groups_longer_than_the_sequence_are_refused_with_both_lengths():
    with pytest.raises(AssertionError, match="groups of 12 tokens do not fit into a sequence of 11"):
        pack_groups([PAIR, LONE], shared_prefix=True, length=11)


@pytest.mark.parametrize(
    ("prompt", "responses", "message"),
    [
        ((), ((1,),), "a.jsonl:7: the prompt has no tokens"),
        ((1,), (), "a.jsonl:7: a group needs responses of at least one token"),
        ((1,), ((1,), ()), "a.jsonl:7: a group needs responses of at least one token"),
    ],
)
def test_an_empty_prompt_or_response_is_refused_with_its_place(prompt, responses, message):
    with pytest.raises(RecordError, match=message):
        Group(prompt=prompt, responses=responses, record_id="a.jsonl:7")
