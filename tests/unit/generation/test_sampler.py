"""The sampler on one process: against a loop without cache, against the policy's own log-probs, and itself."""

import itertools
import math

import pytest
import torch
from helpers.chi_square import assert_fits
from helpers.slow_choice import slow_choice

from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.config.stages import SamplingConfig
from megatron_brain.data.groups import Group, Segment, pack_groups
from megatron_brain.errors import ConfigError
from megatron_brain.generation.sampler import Sampler
from megatron_brain.generation.seeds import sample_seed, sample_seeds
from megatron_brain.models.architecture import resolve
from megatron_brain.models.attention import PackedLayout
from megatron_brain.models.provider import build_model
from megatron_brain.training.validation import outputs_of_groups, score_groups

VOCABULARY = 300
NO_EOS = 10_000
PROMPTS = [(5, 17, 99), (250, 3, 3, 8, 41, 77, 12), (9,), (5, 17, 99, 4)]


@pytest.fixture(scope="module")
def model(single):
    # Weights so large that the model is sure of some tokens and attention is far from even.
    return _build(single, untie_embeddings_and_output_weights=True, init_method_std=0.2)


def _build(parallel, **changes):
    sizes = ModelConfig(
        num_layers=3,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        rotary_base=10000,
        norm_epsilon=1e-5,
        **changes,
    )
    config = resolve(sizes, None, "the test")
    [chunk] = build_model(config, ParallelConfig(), parallel, head="policy", seed=3)
    return chunk


def _generate(model, parallel, prompts=PROMPTS, *, n=4, eos=NO_EOS, keys=None, seed=7, **sampling):
    sampler = Sampler([model], parallel, SamplingConfig(**{"max_new_tokens": 12} | sampling), eos_id=eos)
    return sampler.generate(prompts, seeds=sample_seeds(seed, range(len(prompts)) if keys is None else keys, n))


@torch.no_grad()
def _next_logits(model, sequence):
    """Logits `[V]` after a sequence, from a forward pass over all of it."""
    tokens = torch.tensor([sequence])
    layout = PackedLayout(segments=(Segment(0, len(sequence)),))
    hidden = model.trunk(tokens, torch.arange(len(sequence))[None], layout)
    return (hidden[-1, 0] @ model.output_weight.t())[:VOCABULARY]


def _greedy_without_cache(model, prompt, count):
    sequence = list(prompt)
    for _ in range(count):
        sequence.append(int(_next_logits(model, sequence).argmax()))
    return tuple(sequence[len(prompt) :])


def _tokens(results):
    return [[sample.tokens for sample in samples] for samples in results]


def _commonest_token(results):
    return int(torch.tensor([t for samples in results for sample in samples for t in sample.tokens]).mode().values)


def test_greedy_equals_a_loop_without_cache(model, single):
    results = _generate(model, single, n=2, temperature=0.0)
    expected = [_greedy_without_cache(model, prompt, 12) for prompt in PROMPTS]
    assert len(set(expected)) > 1
    assert _tokens(results) == [[tokens] * 2 for tokens in expected]
    assert all(sample.logprob == 0 and not sample.finished for samples in results for sample in samples)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprob_is_the_policys_own_and_counts_eos(model, single, temperature):
    eos = _commonest_token(_generate(model, single, temperature=temperature))
    results = _generate(model, single, temperature=temperature, eos=eos)
    assert any(sample.finished for samples in results for sample in samples)
    groups = [Group(prompt=p, responses=tuple(s.tokens for s in r)) for p, r in zip(PROMPTS, results, strict=True)]
    [scored] = score_groups([model], [groups], single, head="policy", shared_prefix=True, temperature=temperature)
    expected = torch.cat(scored)
    sampled = torch.tensor([sample.logprob for samples in results for sample in samples])
    torch.testing.assert_close(sampled, expected, atol=1e-5, rtol=1e-6)
    [(batch, output)] = outputs_of_groups([model], [groups], single, shared_prefix=True, temperature=temperature)
    drawn = [sample for samples in results for sample in samples]
    for sample, of_tokens in zip(drawn, batch.split_per_response(output), strict=True):
        assert len(sample.token_logprobs) == len(sample.tokens)
        torch.testing.assert_close(torch.tensor(sample.token_logprobs), of_tokens, atol=1e-5, rtol=1e-6)


def test_logprob_counts_temperature_top_k_and_top_p(model, single):
    settings = {"temperature": 1.3, "top_k": 20, "top_p": 0.8}
    for prompt, samples in zip(PROMPTS, _generate(model, single, n=2, **settings), strict=True):
        for sample in samples:
            total = 0.0
            for place, token in enumerate(sample.tokens):
                logits = _next_logits(model, prompt + sample.tokens[:place]).double() / 1.3
                probs, order = logits.softmax(0).sort(descending=True)
                probs[20:] = 0.0
                probs /= probs.sum()
                probs[probs.cumsum(0) - probs >= 0.8] = 0.0
                total += float((probs / probs.sum())[order == token].log())
            assert sample.logprob == pytest.approx(total, abs=1e-4)


def test_first_tokens_follow_the_models_distribution(model, single):
    [samples] = _generate(model, single, PROMPTS[:1], n=4000, max_new_tokens=1)
    probs = _next_logits(model, PROMPTS[0]).double().softmax(0)
    assert_fits(torch.bincount(torch.tensor([s.tokens[0] for s in samples]), minlength=VOCABULARY), probs)


def test_first_two_tokens_follow_the_models_distribution(model, single):
    """With one prompt and a low temperature, so that pairs of tokens are drawn often."""
    settings = {"temperature": 0.3, "top_k": 6, "top_p": 0.95}
    [samples] = _generate(model, single, PROMPTS[:1], n=4000, max_new_tokens=2, **settings)

    def probs_after(sequence):
        probs, order = (_next_logits(model, sequence).double() / 0.3).softmax(0).topk(6)
        probs /= probs.sum()
        probs[probs.cumsum(0) - probs >= 0.95] = 0
        return torch.zeros(VOCABULARY, dtype=torch.float64).scatter_(0, order, probs / probs.sum())

    expected = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
    first = probs_after(PROMPTS[0])
    for token in first.nonzero().flatten().tolist():
        expected[token] = first[token] * probs_after((*PROMPTS[0], token))
    pairs = torch.tensor([VOCABULARY * s.tokens[0] + s.tokens[1] for s in samples])
    assert_fits(torch.bincount(pairs, minlength=VOCABULARY**2), expected)


def test_samples_do_not_depend_on_batch_or_order(model, single):
    together = _tokens(_generate(model, single))
    assert len({tokens for samples in together for tokens in samples}) == 16
    assert _tokens(_generate(model, single, sampling_batch_size=4)) == together
    assert _tokens(_generate(model, single, sampling_batch_size=8)) == together
    backwards = _generate(model, single, PROMPTS[::-1], keys=[3, 2, 1, 0])
    assert _tokens(backwards) == together[::-1]
    for index, prompt in enumerate(PROMPTS):
        assert _tokens(_generate(model, single, [prompt], keys=[index])) == [together[index]]


def test_fewer_samples_are_the_first_of_more(model, single):
    more, fewer = _tokens(_generate(model, single, n=5)), _tokens(_generate(model, single, n=2))
    assert [samples[:2] for samples in more] == fewer


def test_shared_prompt_equals_separate_prompts(model, single):
    """Every sample is what its draws give on a prompt of its own, computed without cache."""
    [samples] = _generate(model, single, PROMPTS[1:2], n=3, keys=[42], max_new_tokens=6)
    for index, sample in enumerate(samples):
        sequence = list(PROMPTS[1])
        for step in range(6):
            logits = _next_logits(model, sequence).tolist()
            sequence.append(slow_choice(logits, sample_seed(7, 42, index), step)[0])
        assert sample.tokens == tuple(sequence[len(PROMPTS[1]) :])


@pytest.mark.parametrize(("prompts", "n"), [(PROMPTS, 6), (PROMPTS[1:2], 12)], ids=["prompts", "one prompt"])
def test_samples_stop_at_eos_whatever_is_dropped_from_the_batch(model, single, prompts, n):
    free = _generate(model, single, prompts, n=n, max_new_tokens=20)
    eos, free = _commonest_token(free), _tokens(free)
    results = _generate(model, single, prompts, n=n, max_new_tokens=20, eos=eos)
    for with_eos, without in zip(itertools.chain(*results), itertools.chain(*free), strict=True):
        end = without.index(eos) + 1 if eos in without else len(without)
        assert with_eos.tokens == without[:end]
        assert with_eos.finished == (eos in without)
    assert len({len(sample.tokens) for samples in results for sample in samples}) > 4


def test_progress_counts_samples_and_tokens(model, single):
    calls = []
    sampler = Sampler(
        [model],
        single,
        SamplingConfig(max_new_tokens=5, sampling_batch_size=4),
        eos_id=NO_EOS,
        progress=lambda samples, tokens: calls.append((samples, tokens)),
    )
    sampler.generate(PROMPTS, seeds=sample_seeds(0, range(4), 2))
    assert calls == [(0, 4), (0, 8), (0, 12), (0, 16), (4, 20), (4, 24), (4, 28), (4, 32), (4, 36), (8, 40)]


def test_training_goes_on_after_sampling(model, single):
    model.train()
    _generate(model, single)
    assert model.training and all(module.training for module in model.modules())
    model(pack_groups([Group(prompt=(1, 2), responses=((3,),))], shared_prefix=True)).sum().backward()
    assert model.output_weight.grad.abs().sum() > 0
    model.zero_grad(set_to_none=True)


def test_bfloat16_samples_score_as_the_policy_scores_them(single):
    chunk = _build(single, untie_embeddings_and_output_weights=False, bf16=True)
    results = _generate(chunk, single)
    groups = [Group(prompt=p, responses=tuple(s.tokens for s in r)) for p, r in zip(PROMPTS, results, strict=True)]
    with torch.no_grad():
        batch = pack_groups(groups, shared_prefix=True)
        expected = batch.sum_per_response(chunk(batch))
    sampled = torch.tensor([sample.logprob for samples in results for sample in samples])
    torch.testing.assert_close(sampled, expected, atol=0.05, rtol=0)


def test_a_prompt_without_room_is_refused_with_its_number_and_the_cure(model, single):
    with pytest.raises(ConfigError, match=r"prompt 1 has 60 tokens.*max_position_embeddings=64.*to 52 tokens"):
        _generate(model, single, [(1, 2), (1,) * 60])
    with pytest.raises(ConfigError, match=r"prompt 0 has 9 tokens.*window_size=20 \(attention over .*to 8 tokens"):
        _generate(_build(single, window_size=20), single, [(1,) * 9])


def test_empty_prompts_and_missing_seeds_are_refused(model, single):
    with pytest.raises(AssertionError, match="prompt 1 has no tokens"):
        _generate(model, single, [(1, 2), ()])
    with pytest.raises(AssertionError, match="4 prompts need the seeds of as many, not of 1"):
        _generate(model, single, keys=[0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_end_the_run_in_words(single, temperature):
    model = _build(single)
    with torch.no_grad():
        model.output_weight[5] = math.nan
    with pytest.raises(FloatingPointError, match="logits of token 1 of a response are not finite: the model's weights"):
        _generate(model, single, temperature=temperature)
