"""Choosing tokens: the distribution against enumeration, the draws against a slow reference, and what noise changes."""

import itertools
import math

import pytest
import torch
from helpers.chi_square import assert_fits
from helpers.slow_choice import slow_choice

from megatron_brain.generation.choose import choose_tokens
from megatron_brain.generation.seeds import draw_uniforms, sample_seed

SMALL = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2]).log()


def _logits(*shape, scale=2.0, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def _draw(logits, *, seeds=None, step=0, temperature=1.0, top_k=0, top_p=1.0):
    """Tokens and log-probabilities of rows of logits `[B, V]`, with the seeds 0 to B - 1 if none are given."""
    seeds = torch.arange(len(logits)) if seeds is None else torch.as_tensor(seeds)
    return choose_tokens(logits.clone(), seeds, step, temperature=temperature, top_k=top_k, top_p=top_p)


def _enumerate(logits, *, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities `[V]` float64 by sorting everything."""
    probs = (logits.double() / temperature).softmax(0)
    order = probs.argsort(descending=True)
    kept = probs[order]
    if top_k:
        kept[top_k:] = 0
    kept /= kept.sum()
    kept[kept.cumsum(0) - kept >= top_p] = 0
    return torch.zeros_like(probs).scatter_(0, order, kept / kept.sum())


OPTIONS = {
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 40},
    "top-p": {"top_p": 0.8},
    "all": {"temperature": 1.3, "top_k": 60, "top_p": 0.9},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("vocabulary", [100, 300, 1024])
def test_tokens_have_the_probabilities_of_an_enumeration_and_say_them(vocabulary, options):
    logits = _logits(vocabulary)
    expected = _enumerate(logits, **options)
    tokens, logprobs = _draw(logits.expand(20000, -1), **options)
    assert_fits(torch.bincount(tokens, minlength=vocabulary), expected)
    torch.testing.assert_close(logprobs, expected.log()[tokens], atol=2e-6, rtol=0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sequences_of_three_steps_have_the_probabilities_of_an_enumeration(options):
    """Each token decides the next logits. Four ids, two in one block and two in another, are possible."""
    ids = torch.tensor([3, 60, 200, 255])
    first, second, third = _logits(4), _logits(4, 4, seed=1), _logits(4, 4, 4, seed=2)

    def widen(logits):
        return torch.full((*logits.shape[:-1], 256), -torch.inf).index_copy_(-1, ids, logits)

    options = options | {"top_k": min(3, options.get("top_k", 0))}
    a = torch.searchsorted(ids, _draw(widen(first).expand(20000, -1), step=0, **options)[0])
    b = torch.searchsorted(ids, _draw(widen(second)[a], step=1, **options)[0])
    c = torch.searchsorted(ids, _draw(widen(third)[a, b], step=2, **options)[0])
    expected = torch.zeros(4, 4, 4, dtype=torch.float64)
    for x, y in itertools.product(range(4), repeat=2):
        sequence = _enumerate(first, **options)[x] * _enumerate(second[x], **options)[y]
        expected[x, y] = sequence * _enumerate(third[x, y], **options)
    assert_fits(torch.bincount(16 * a + 4 * b + c, minlength=64), expected)


@pytest.mark.parametrize("apart", [1, 2, 2**32])
def test_neighbouring_seeds_draw_independently(apart):
    logits = _logits(300, scale=6.0)
    seeds = torch.arange(20000) * 3
    first, second = (_draw(logits.expand(20000, -1), seeds=seeds + shift, step=7)[0] for shift in (0, apart))
    probs = _enumerate(logits)
    assert_fits(torch.bincount(300 * first + second, minlength=300 * 300), torch.outer(probs, probs))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("vocabulary", [7, 300, 1024])
def test_draws_are_those_of_gumbels_of_blocks_and_then_of_tokens(vocabulary, temperature):
    logits = _logits(60, vocabulary, seed=3)
    logits[:, 1::9] = -torch.inf
    seeds = [sample_seed(1, 2, row) for row in range(60)]
    tokens, logprobs = _draw(logits, seeds=seeds, step=5, temperature=temperature)
    for row, values in enumerate(logits.tolist()):
        token, logprob = slow_choice(values, seeds[row], 5, temperature=temperature)
        assert tokens[row] == token
        assert logprobs[row].item() == pytest.approx(logprob, abs=1e-6)
    assert len(set(tokens.tolist())) > 5


def test_a_draw_does_not_depend_on_other_rows_or_on_padding():
    logits, seeds = _logits(50, 300), torch.arange(50) + 9
    expected = _draw(logits, seeds=seeds, step=2, top_p=0.9)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(4))[:20]
    some = _draw(logits[order], seeds=seeds[order], step=2, top_p=0.9)
    assert torch.equal(some[0], expected[0][order]) and torch.equal(some[1], expected[1][order])
    padded = torch.nn.functional.pad(logits, (0, 724), value=-torch.inf)
    wider = _draw(padded, seeds=seeds, step=2, top_p=0.9)
    assert torch.equal(wider[0], expected[0]) and torch.equal(wider[1], expected[1])


def _zipf(rows, vocabulary, seed):
    """Logits of rank r at -1.1 log r, in another order in each row, with noise: alike to those of a language model."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(rows, vocabulary, generator=generator).argsort(dim=1) + 1
    return ranks.float().log() * -1.1 + torch.randn(rows, vocabulary, generator=generator) * 0.5


def _inverse_cdf(logits, uniforms):
    """A draw in the way that moves all borders, for comparison."""
    cumulative = logits.double().softmax(1).cumsum(1)
    return torch.searchsorted(cumulative, uniforms[:, None]).squeeze(1)


@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
def test_noise_of_logits_changes_as_many_draws_as_their_distributions_differ(options):
    """Of a race, at most 2 d of the draws differ where the distributions differ by d (total variation); here two races
    follow each other. The inverse of the cumulative distribution changes many times as many."""
    rows, noise = 2000, 1e-2
    logits = _zipf(rows, 1024, seed=5)
    moved = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(6)) * noise
    variation = sum(
        0.5 * float((_enumerate(a, **options) - _enumerate(b, **options)).abs().sum())
        for a, b in zip(logits[:200], moved[:200], strict=True)
    ) * (rows / 200)
    assert variation > 5
    changed = int((_draw(logits, **options)[0] != _draw(moved, **options)[0]).sum())
    assert changed < 4 * variation + 4 * (4 * variation) ** 0.5
    uniforms = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    if not options:
        assert int((_inverse_cdf(logits, uniforms) != _inverse_cdf(moved, uniforms)).sum()) > 8 * variation


def test_rounding_of_logits_changes_no_draw():
    logits = _zipf(2000, 1024, seed=8)
    moved = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(9)) * 1e-6
    for options in OPTIONS.values():
        assert torch.equal(_draw(logits, **options)[0], _draw(moved, **options)[0])


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((3000, 512), -torch.inf)
    logits[:, 255:258] = 0.0
    tokens, logprobs = _draw(logits)
    assert set(tokens.tolist()) == {255, 256, 257}
    torch.testing.assert_close(logprobs.exp(), torch.full((3000,), 1 / 3, dtype=torch.float64))


def test_top_k_keeps_the_k_likeliest_and_renormalises():
    _, logprobs = _draw(SMALL.expand(2000, -1), top_k=2)
    assert set(logprobs.exp().mul(1e4).round().tolist()) == {6154.0, 3846.0}  # 0.4 and 0.25 of 0.65


def test_top_p_keeps_the_token_that_reaches_the_share_and_no_more():
    tokens, _ = _draw(SMALL.expand(2000, -1), top_p=0.7)
    assert set(tokens.tolist()) == {1, 3, 4}


def test_top_p_applies_to_what_top_k_left():
    # Of the three likeliest the first holds 0.47 and the first two 0.76.
    tokens, _ = _draw(SMALL.expand(2000, -1), top_k=3, top_p=0.6)
    assert set(tokens.tolist()) == {1, 3}


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.5}])
def test_ties_of_the_last_token_that_is_kept_are_kept(options):
    logits = torch.tensor([0.4, 0.2, 0.2, 0.2]).log()
    tokens, logprobs = _draw(logits.expand(2000, -1), **options)
    assert set(tokens.tolist()) == {0, 1, 2, 3}
    torch.testing.assert_close(logprobs.exp(), logits.double().exp()[tokens], atol=1e-6, rtol=0)


def test_top_p_of_a_flat_distribution_looks_beyond_the_first_candidates():
    logits = _logits(3000, scale=0.01, seed=1)
    tokens, logprobs = _draw(logits.expand(2000, -1), top_p=0.9)
    expected = _enumerate(logits, top_p=0.9)
    assert int((expected > 0).sum()) > 2600 and len(set(tokens.tolist())) > 1024
    torch.testing.assert_close(logprobs, expected.log()[tokens], atol=2e-6, rtol=0)


def test_greedy_takes_the_likeliest_with_certainty_and_of_several_the_first():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, -1.0, 4.0], [0.0, 2.0, 2.0]])
    tokens, logprobs = _draw(logits, temperature=0.0)
    assert tokens.tolist() == [1, 0, 1]
    assert logprobs.tolist() == [0.0, 0.0, 0.0]


def test_uniforms_depend_on_seed_key_and_sample_and_continue():
    first = draw_uniforms(sample_seed(1, 2, 3), 5)
    assert (draw_uniforms(sample_seed(1, 2, 3), 9)[:5] == first).all()
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (12, 3, 3)):
        assert (draw_uniforms(sample_seed(*other), 5) != first).all()


@pytest.mark.parametrize("settings", [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 5, 0.9), (1.0, 3, 1.0)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_get_no_token_and_the_others_theirs(bad, settings):
    options = dict(zip(("temperature", "top_k", "top_p"), settings, strict=True))
    logits = _logits(4, 50, scale=1.0, seed=1)
    expected, logprobs = _draw(logits, **options)
    broken = logits.clone()
    broken[1, 7] = bad
    broken[3] = bad
    tokens, found = _draw(broken, **options)
    assert tokens.tolist() == [expected[0], -1, expected[2], -1]
    assert torch.equal(found[::2], logprobs[::2])


def test_a_row_without_any_possible_token_gets_none():
    logits = torch.full((2, 200), -torch.inf)
    logits[0, 150] = 0.0
    for temperature in (0.0, 1.0):
        assert _draw(logits, temperature=temperature)[0].tolist() == [150, -1]
