"""Draws of tokens as `generation/choose.py` makes them, written in another way: with the numbers of Python, one row at
a time, and with scores that follow the Gumbel distribution around log-masses instead of a race."""

import math

BLOCK = 128


class SplitMix64:
    """Steele, Lea and Flood 2014, with Python's integers."""

    def __init__(self, state: int) -> None:
        self.state = state

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        return mixed(self.state)


def mixed(word: int) -> int:
    """The function from a state to a word."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def slow_words(seed: int, step: int, count: int) -> list[int]:
    """The first random words of a step of a seed."""
    steps = SplitMix64(mixed(seed))
    for _ in range(step):
        steps.next()
    places = SplitMix64(steps.next())
    return [places.next() for _ in range(count)]


def _gumbel(word: int) -> float:
    return -math.log(-math.log(((word >> 12 ^ 1 << 51) + 0.5) / 2**52))


def slow_choice(logits: list[float], seed: int, step: int, *, temperature: float = 1.0) -> tuple[int, float]:
    """Token that is drawn from logits, and its log-probability."""
    blocks = [logits[start : start + BLOCK] for start in range(0, len(logits), BLOCK)]
    words = slow_words(seed, step, BLOCK + len(blocks))
    scaled = [[logit / temperature for logit in block] for block in blocks]
    log_masses = [math.log(sum(map(math.exp, block))) if max(block) > -math.inf else -math.inf for block in scaled]
    number = _winner(log_masses, words[BLOCK:])
    place = _winner(scaled[number], words[:BLOCK])
    total = math.log(sum(map(math.exp, log_masses)))
    return number * BLOCK + place, scaled[number][place] - total


def _winner(log_masses: list[float], words: list[int]) -> int:
    scores = [mass + _gumbel(word) for mass, word in zip(log_masses, words, strict=False)]
    return max(range(len(scores)), key=scores.__getitem__)
