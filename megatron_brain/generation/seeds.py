"""Seeds of samples: one number says everything random about a sample, whichever engine draws it."""

import hashlib
from collections.abc import Sequence

import numpy


def sample_seed(seed: int, key: int, sample: int) -> int:
    """Seed of one sample, 0 to 2**63 - 1. Neighbouring arguments give unrelated seeds.

    Args:
        seed: of the run.
        key: place of the prompt, which stays the same from call to call.
        sample: number of the sample among those of the prompt.
    """
    digest = hashlib.sha256(f"{seed}:{key}:{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample_seeds(seed: int, keys: Sequence[int], samples: int) -> list[list[int]]:
    """The seeds of so many samples of each prompt."""
    return [[sample_seed(seed, key, sample) for sample in range(samples)] for key in keys]


def held_out_seeds(seed: int, places: Sequence[int]) -> list[list[int]]:
    """A seed for one sample of each held-out prompt, given the prompts' places. No sample that a run trains on has it,
    because the keys of those are not negative."""
    return sample_seeds(seed, [-1 - place for place in places], 1)


def posterior_seeds(seed: int, places: Sequence[int], samples: int) -> list[list[int]]:
    """Seeds of samples of the prior to held-out prompts, given the prompts' places. No other sample has them: the first
    of each key is the prompt's in `held_out_seeds`."""
    return [of_prompt[1:] for of_prompt in sample_seeds(seed, [-1 - place for place in places], samples + 1)]


def draw_uniforms(seed: int, count: int) -> numpy.ndarray:
    """`[count]` float64 in [0, 1) from a seed. A larger count begins with the draws of a smaller one."""
    return numpy.random.Generator(numpy.random.Philox(key=seed)).random(count)
