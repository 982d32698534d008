"""The random numbers of draws: against SplitMix64 of Python's integers, and their distribution."""

import pytest
import torch
from helpers.chi_square import assert_fits
from helpers.slow_choice import SplitMix64, slow_words

from megatron_brain.generation import noise

SEEDS = [0, 1, 2, 77, 2**62 + 5, 2**63 - 1]


def test_the_slow_generator_gives_the_published_words():
    """The first words of seed 1234567 that Rosetta Code's page of SplitMix64 lists."""
    generator = SplitMix64(1234567)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [generator.next() for _ in expected] == expected


@pytest.mark.parametrize("step", [0, 1, 4095])
def test_words_are_those_of_splitmix64(step):
    words = noise.random_words(torch.tensor(SEEDS), step, 200)
    assert [[word % 2**64 for word in row] for row in words.tolist()] == [slow_words(s, step, 200) for s in SEEDS]


def test_more_numbers_begin_with_fewer_and_rows_do_not_change_each_other():
    seeds = torch.tensor(SEEDS)
    more = noise.exponentials(seeds, 3, 500)
    assert torch.equal(noise.exponentials(seeds, 3, 130), more[:, :130])
    assert torch.equal(noise.exponentials(seeds.flip(0)[:2], 3, 500), more.flip(0)[:2])


def test_every_word_gives_a_positive_finite_number(monkeypatch):
    extremes = torch.tensor([[0, -1, 2**63 - 1, -(2**63), 1, 4095, 4096]])
    monkeypatch.setattr(noise, "random_words", lambda *_: extremes)
    numbers = noise.exponentials(torch.tensor([0]), 0, extremes.size(1))
    assert (numbers > 0).all() and (numbers < 37).all()


def _cells(numbers, parts):
    """The part of equally likely `parts` that each number of the exponential distribution is in."""
    return ((-numbers).exp() * parts).long().clamp_(max=parts - 1)


def test_numbers_are_exponential():
    numbers = noise.exponentials(torch.arange(500), 2, 400)
    counts = torch.bincount(_cells(numbers, 256).flatten(), minlength=256)
    assert_fits(counts, torch.full((256,), 1 / 256))
    # The middle of 2**-10 of the distribution nearest to 0, where the winners of races are.
    least = numbers[numbers < 2**-10].numel()
    assert abs(least - numbers.numel() * 2**-10) < 4 * (numbers.numel() * 2**-10) ** 0.5


@pytest.mark.parametrize("lag", [1, 2, 64])
@pytest.mark.parametrize("neighbours", ["seeds", "steps", "places"])
def test_neighbours_are_independent(neighbours, lag):
    seeds = torch.arange(400)
    numbers = noise.exponentials(seeds, 5, 300)
    if neighbours == "seeds":
        first, second = numbers, noise.exponentials(seeds + lag, 5, 300)
    elif neighbours == "steps":
        first, second = numbers, noise.exponentials(seeds, 5 + lag, 300)
    else:
        first, second = numbers[:, :-lag], numbers[:, lag:]
    pairs = _cells(first, 16) * 16 + _cells(second, 16)
    assert_fits(torch.bincount(pairs.flatten(), minlength=256), torch.full((256,), 1 / 256))
