"""The order of samples is a function of seed and place alone, and replicas partition every step."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_brain.data.order import SampleOrder, replica_share


@given(num_samples=st.integers(1, 40), seed=st.integers(0, 2**31), epochs=st.integers(1, 4))
def test_every_epoch_holds_every_sample_once(num_samples, seed, epochs):
    order = SampleOrder(num_samples, seed=seed)
    for epoch in range(epochs):
        places = range(epoch * num_samples, (epoch + 1) * num_samples)
        assert sorted(order[place] for place in places) == list(range(num_samples))


@given(num_samples=st.integers(1, 20), batch_size=st.integers(1, 12))
def test_steps_run_through_the_stream_without_loss_across_epochs(num_samples, batch_size):
    order = SampleOrder(num_samples, seed=0)
    steps = [order.step(iteration, batch_size) for iteration in range(num_samples)]
    assert all(len(step) == batch_size for step in steps)
    # So many steps are exactly `batch_size` epochs.
    assert sorted(itertools.chain(*steps)) == sorted(list(range(num_samples)) * batch_size)


@given(places=st.lists(st.integers(0, 200), max_size=30))
def test_a_place_holds_the_same_sample_whatever_was_read_before(places):
    fresh = [SampleOrder(17, seed=5)[place] for place in places]
    order = SampleOrder(17, seed=5)
    assert [order[place] for place in places] == fresh


def test_resuming_at_any_step_goes_on_as_if_never_stopped():
    whole = [SampleOrder(10, seed=3).step(iteration, 4) for iteration in range(12)]
    for start in range(12):
        resumed = SampleOrder(10, seed=3)
        assert [resumed.step(iteration, 4) for iteration in range(start, 12)] == whole[start:]


def test_epochs_and_seeds_shuffle_differently():
    order, other = SampleOrder(50, seed=1), SampleOrder(50, seed=2)
    first, second = ([order[place] for place in range(start, start + 50)] for start in (0, 50))
    assert first != second
    assert first != [other[place] for place in range(50)]
    assert first != sorted(first)


def test_no_samples_are_refused():
    with pytest.raises(AssertionError, match="no samples"):
        SampleOrder(0, seed=0)


def test_micro_batches_are_dealt_in_turn_by_hand():
    shares = [replica_share("abcdefgh", micro_batch_size=2, dp_rank=rank, dp_size=2) for rank in range(2)]
    assert shares == [[["a", "b"], ["e", "f"]], [["c", "d"], ["g", "h"]]]


@given(micro_batch_size=st.integers(1, 4), dp_size=st.integers(1, 4), turns=st.integers(0, 4))
def test_replicas_share_the_batch_out_equally_without_loss(micro_batch_size, dp_size, turns):
    items = list(range(micro_batch_size * dp_size * turns))
    shares = [
        replica_share(items, micro_batch_size=micro_batch_size, dp_rank=rank, dp_size=dp_size)
        for rank in range(dp_size)
    ]
    assert all(len(share) == turns for share in shares)
    assert all(len(micro_batch) == micro_batch_size for share in shares for micro_batch in share)
    # Read turn by turn over the replicas, the micro-batches are those of one replica.
    dealt = [share[turn] for turn in range(turns) for share in shares]
    assert dealt == replica_share(items, micro_batch_size=micro_batch_size, dp_rank=0, dp_size=1)
    assert list(itertools.chain(*dealt)) == items


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers():
    with pytest.raises(AssertionError, match=r"global batch of 10 .* replicas = 4"):
        replica_share(range(10), micro_batch_size=2, dp_rank=0, dp_size=2)
