from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_brain.data.packing import pack_by_length
from megatron_brain.errors import ConfigError

CASES = {
    "lengths": st.lists(st.integers(1, 64), max_size=120),
    "capacity": st.integers(64, 200),
    "seed": st.integers(0, 2**32),
    "window": st.integers(1, 50),
}


@settings(deadline=None)
@given(**CASES)
def test_every_index_is_in_exactly_one_bin_and_no_bin_overflows(lengths, capacity, seed, window):
    bins = pack_by_length(lengths, capacity, seed=seed, window=window)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(bins)
    assert all(sum(lengths[i] for i in b) <= capacity for b in bins)


@settings(deadline=None)
@given(**CASES)
def test_number_of_bins_is_within_the_documented_bounds(lengths, capacity, seed, window):
    bins = len(pack_by_length(lengths, capacity, seed=seed, window=window))
    windows = ceil(len(lengths) / window)
    assert ceil(sum(lengths) / capacity) <= bins <= 2 * sum(lengths) / capacity + windows


@settings(deadline=None)
@given(**CASES)
def test_same_arguments_give_the_same_bins(lengths, capacity, seed, window):
    first = pack_by_length(lengths, capacity, seed=seed, window=window)
    assert pack_by_length(tuple(lengths), capacity, seed=seed, window=window) == first


def test_another_seed_gives_another_order_of_records_and_of_long_bins():
    lengths = [1 + i % 50 for i in range(500)]
    first, second = (pack_by_length(lengths, 64, seed=seed) for seed in (1, 2))
    assert first != second
    longest_first = sorted(first, key=lambda b: -max(lengths[i] for i in b))
    assert first != longest_first


def test_records_that_fill_bins_exactly_leave_no_room():
    bins = pack_by_length([6, 4, 5, 5, 7, 3], 10, seed=0)
    assert len(bins) == 3


def test_realistic_lengths_pack_to_over_95_percent():
    lengths = [40 + (i * 7919) % 160 for i in range(5000)]
    bins = pack_by_length(lengths, 1024, seed=0)
    assert sum(lengths) / (1024 * len(bins)) > 0.95


@pytest.mark.parametrize("length", [0, 11])
def test_a_record_that_cannot_fit_is_named(length):
    with pytest.raises(ConfigError, match=rf"record 2 has {length} tokens.*10"):
        pack_by_length([1, 10, length], 10, seed=0)
