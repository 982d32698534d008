"""Random weights follow from the seed and the architecture alone."""

import math

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.assets import SIZES

from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.models.architecture import resolve
from megatron_brain.models.provider import build_model

ROWS = SIZES["vocab_size"]


def weights(parallel, *, seed=1, head="policy", **changes):
    model = resolve(ModelConfig(**SIZES | changes), None, "the test")
    [built] = build_model(model, ParallelConfig(), parallel, head=head, seed=seed)
    return {name: parameter.detach() for name, parameter in built.named_parameters()}


def test_weights_follow_from_the_seed_whatever_was_drawn_before(single):
    first = weights(single)
    torch.randn(100)
    second, other = weights(single), weights(single, seed=2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == ("norm" in name) for name in first)


def test_building_a_model_leaves_the_random_generator_where_it_was(single):
    before = torch.get_rng_state()
    weights(single)
    assert torch.equal(torch.get_rng_state(), before)


def test_vocabulary_padding_changes_no_weight_and_is_zero(single):
    tight, padded = (
        weights(single, make_vocab_size_divisible_by=multiple, untie_embeddings_and_output_weights=True)
        for multiple in (1, 512)
    )
    for name, weight in tight.items():
        assert torch.equal(padded[name][: len(weight)], weight), name
        assert not padded[name][len(weight) :].any()
    assert len(padded["output_layer.weight"]) == 512 and len(tight["output_layer.weight"]) == ROWS


def test_policy_and_reward_model_start_from_one_trunk(single):
    policy, reward = weights(single), weights(single, head="reward")
    assert reward.pop("reward_head.weight").any()
    assert all(torch.equal(policy[name], weight) for name, weight in reward.items())


def test_learned_positions_are_drawn_too_and_are_all_that_is_added(single):
    rotary, learned = weights(single), weights(single, position_embedding_type="learned_absolute")
    positions = learned.pop("embedding.position_embeddings.weight")
    assert positions.shape == (SIZES["max_position_embeddings"], SIZES["hidden_size"])
    assert positions.std().item() == pytest.approx(0.02, rel=0.1)
    assert rotary.keys() == learned.keys() and all(torch.equal(rotary[name], learned[name]) for name in rotary)
    in_bfloat16 = weights(single, position_embedding_type="learned_absolute", bf16=True)
    assert {weight.dtype for weight in in_bfloat16.values()} == {torch.bfloat16}


@pytest.mark.parametrize("settings", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_biases_start_at_zero_those_of_norms_too_and_norms_at_one(single, settings):
    found = weights(single, **settings)
    vectors = {name: weight for name, weight in found.items() if weight.dim() == 1}
    assert any(name.endswith("bias") for name in vectors) and any("norm" in name for name in vectors)
    for name, weight in vectors.items():
        assert torch.equal(weight, torch.full_like(weight, 0.0 if name.endswith("bias") else 1.0)), name
    assert all(weight.any() for weight in found.values() if weight.dim() == 2)


def test_no_two_matrices_are_equal(single):
    found = weights(single, untie_embeddings_and_output_weights=True)
    matrices = [weight.flatten()[:50] for weight in found.values() if weight.dim() == 2]
    pairs = [(i, j) for i in range(len(matrices)) for j in range(i)]
    assert len(matrices) == 2 + 4 * SIZES["num_layers"]
    assert not any(torch.equal(matrices[i], matrices[j]) for i, j in pairs)
    halves = found["decoder.layers.0.mlp.linear_fc1.weight"].chunk(2)
    assert not torch.equal(*halves)


def test_spread_is_the_asked_one_and_smaller_where_layers_add_to_the_residual_stream(single):
    for name, weight in weights(single, init_method_std=0.5).items():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
            continue
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        expected = 0.5 / math.sqrt(2 * SIZES["num_layers"]) if residual else 0.5
        assert weight[:ROWS].std().item() == pytest.approx(expected, rel=0.1), name
        assert weight[:ROWS].mean().abs().item() < 0.1 * expected
