"""Sequences whose members are made when they are asked for."""

import pytest

from megatron_brain.data.on_demand import OnDemand


def test_a_slice_is_what_a_list_has_there_and_makes_only_what_is_asked_for():
    made: list[int] = []
    squares = OnDemand(6, lambda place: made.append(place) or place * place)
    tail = squares[:1:-2]
    assert len(tail) == 2 and made == []
    assert list(tail) == [n * n for n in range(6)][:1:-2] == [25, 9]
    assert made == [5, 3]


def test_places_count_from_either_end_and_end_where_the_sequence_does():
    squares = OnDemand(3, lambda place: place * place)
    assert [squares[0], squares[-1]] == [0, 4]
    with pytest.raises(IndexError):
        squares[3]
