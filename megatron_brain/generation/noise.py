"""The random numbers of draws. Each depends on the seed of its sample, the step and its place alone.

They are words of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators",
doi:10.1145/2660193.2660195). Its n-th word is a function of n, so all words of all rows are computed at one time. The
function consists of int64 operations that wrap around, so CPU and CUDA give the same words.
"""

import torch
from torch import Tensor


def _signed(word: int) -> int:
    """The int64 that has the bits of an unsigned word."""
    return word - 2**64 if word >= 2**63 else word


_GAMMA = 0x9E3779B97F4A7C15
_FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def exponentials(seeds: Tensor, step: int, count: int) -> Tensor:
    """Independent draws from the exponential distribution of mean 1.

    Args:
        seeds: `[B]` int64, the seed of each row.
        step: number of the step, from 0. Other steps give unrelated draws.
        count: number of draws of each row.

    Returns:
        `[B, count]` float64, positive and below 37. A larger count begins with the draws of a smaller one.
    """
    # The uppermost 52 bits, as the middle of one of 2**52 equal parts of (0, 1). All operations but the logarithm are
    # exact, so the result is never 0 or 1.
    words = random_words(seeds, step, count)
    return (words >> 12).double().mul_(2.0**-52).add_(0.5 + 2.0**-53).log_().neg_()


def random_words(seeds: Tensor, step: int, count: int) -> Tensor:
    """`[B, count]` int64 of 64 random bits each. The arguments are those of `exponentials`.

    A seed, mixed, is the state of a generator. Each of its words is the state of the generator of one step.
    """
    states = _mix(_mix(seeds.clone()).add_(_signed(_GAMMA * (step + 1) % 2**64)))
    counter = torch.arange(1, count + 1, device=seeds.device).mul_(_signed(_GAMMA))
    return _mix(states[:, None] + counter)


def _mix(words: Tensor) -> Tensor:
    """SplitMix64's bijection of words, in place."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        words = _xor_shifted(words, shift).mul_(factor)
    return _xor_shifted(words, 31)


def _xor_shifted(words: Tensor, shift: int) -> Tensor:
    # int64 shifts copies of the sign in; the mask removes them.
    return words.bitwise_xor_((words >> shift).bitwise_and_(2 ** (64 - shift) - 1))
