"""What a server's log-probabilities say of its weights: values made by hand, with noise of known size."""

import random

import pytest

from megatron_brain.generation.vllm.probes import Expected, mean_difference

TOKENS = 1000
LIMIT = 0.1


def values(seed, size=1.0):
    draws = random.Random(seed)
    return [[-1 + size * draws.gauss(0, 1) for _ in range(TOKENS // 2)] for _ in range(2)]


def moved(base, seed, size):
    return [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(base, centred(seed, size), strict=True)]


def centred(seed, size):
    return [[value + 1 for value in row] for row in values(seed, size)]


def expected(change, limit=LIMIT):
    before = values(1)
    new = moved(before, 2, change)
    return Expected(label="step 2", values=new, label_before="step 1", values_before=before), before, new


def test_the_mean_difference_is_per_token():
    assert mean_difference([[0.0, -1.0], [-2.0]], [[-0.5, -1.0], [-1.0]]) == pytest.approx(0.5)


@pytest.mark.parametrize("change", [0.0, 0.001, 0.02, 0.5])
def test_new_weights_with_rounding_are_taken(change):
    wanted, _, new = expected(change)
    assert all(wanted.problem(moved(new, seed, 0.03), LIMIT) is None for seed in range(10, 40))


@pytest.mark.parametrize("change", [0.0, 0.005, 0.02, 0.05])
def test_new_weights_are_taken_where_the_trainer_rounds_as_the_server_does(change):
    """In bf16 the trainer's values of before and now differ by rounding, which is part of the server's difference."""
    for seed in range(100, 300, 5):
        exact = values(seed)
        before, new = moved(exact, seed + 1, 0.05), moved(moved(exact, seed + 2, change), seed + 3, 0.05)
        server = moved(exact, seed + 2, change)
        wanted = Expected(label="step 2", values=new, label_before="step 1", values_before=before)
        assert wanted.problem(moved(server, seed + 4, 0.02), LIMIT) is None


@pytest.mark.parametrize("change", [0.02, 0.05, 0.5])
def test_old_weights_are_seen_even_where_all_differences_are_below_the_limit(change):
    wanted, before, _ = expected(change)
    for seed in range(10, 40):
        problem = wanted.problem(moved(before, seed, 0.03), LIMIT)
        assert problem is not None
        assert problem.startswith("still answers with the weights of before (step 1)")


def test_a_change_that_is_lost_in_rounding_says_nothing():
    wanted, before, _ = expected(0.002)
    assert all(wanted.problem(moved(before, seed, 0.03), LIMIT) is None for seed in range(10, 40))


def test_other_weights_are_neither_the_new_ones_nor_those_of_before():
    wanted, before, new = expected(0.5)
    assert "holds other weights than it was given (step 2)" in wanted.problem(values(9), LIMIT)
    first = Expected(label="step 0", values=new)
    assert first.problem(moved(new, 5, 0.05), LIMIT) is None
    assert "holds other weights" in first.problem(before, LIMIT)
