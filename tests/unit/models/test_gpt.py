"""Policy and reward model of one process: shared prefixes are exact, rewards are read at the last token."""

import dataclasses

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.assets import SIZES

from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.config.stages import SamplingConfig
from megatron_brain.data.groups import Group, pack_groups
from megatron_brain.errors import RecordError
from megatron_brain.generation.sampler import Sampler
from megatron_brain.generation.seeds import sample_seeds
from megatron_brain.models.architecture import padded_vocab_size, resolve
from megatron_brain.models.attention import PackedLayout
from megatron_brain.models.provider import build_model

GROUPS = [
    Group(prompt=(1, 2, 3, 4), responses=((5, 6, 7), (8, 9), (10,))),
    Group(prompt=(11, 12, 13), responses=((5, 6, 7),)),
    Group(prompt=(11,), responses=((9, 9), (8, 7, 6, 5)), record_id="prompts.jsonl:3"),
]
POSITIONS = pytest.mark.parametrize("positions", ["rope", "learned_absolute"])


def tiny(**changes):
    # A large spread of initial weights, so that attention patterns matter.
    return resolve(ModelConfig(init_method_std=0.2, **SIZES | changes), None, "the test")


def build(parallel, head, **changes):
    [model] = build_model(tiny(**changes), ParallelConfig(), parallel, head=head, seed=1)
    return model


def output_and_gradients(model, batch, upstream):
    model.zero_grad()
    output = model(batch)
    (output * upstream).sum().backward()
    return output.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def shared_and_plain(model, groups, head):
    """Outputs and gradients of the groups with a shared prefix, and with copies of the prompt."""
    shared, plain = (pack_groups(groups, shared_prefix=is_shared) for is_shared in (True, False))
    assert shared.tokens.numel() < plain.tokens.numel()
    size = plain.targets.numel() if head == "policy" else plain.num_responses
    upstream = torch.randn(size, generator=torch.Generator().manual_seed(0))
    return zip(*(output_and_gradients(model, batch, upstream) for batch in (shared, plain)), strict=True)


def largest_relative_difference(gradients):
    return max(((g - other).norm() / other.norm()).item() for g, other in zip(*(g.values() for g in gradients)))


@POSITIONS
@pytest.mark.parametrize("key_value_heads", [4, 2])
@pytest.mark.parametrize("recompute", [None, "full", "selective"])
@pytest.mark.parametrize("head", ["policy", "reward"])
def test_shared_prefix_equals_copies_of_the_prompt_in_outputs_and_gradients(
    single, head, recompute, key_value_heads, positions
):
    model = build(
        single,
        head,
        recompute_granularity=recompute,
        num_query_groups=key_value_heads,
        position_embedding_type=positions,
    )
    outputs, gradients = shared_and_plain(model, GROUPS, head)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    assert largest_relative_difference(gradients) <= 1e-5


@POSITIONS
@pytest.mark.parametrize("head", ["policy", "reward"])
def test_shared_prefix_equals_copies_of_the_prompt_at_the_lengths_of_real_responses(single, head, positions):
    model = build(single, head, position_embedding_type=positions, max_position_embeddings=512)
    tokens = torch.randint(1, SIZES["vocab_size"], (900,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = [
        Group(prompt=tuple(tokens[:150]), responses=tuple(tuple(tokens[i : 9 * i]) for i in range(1, 40, 6))),
        Group(prompt=tuple(tokens[200:210]), responses=(tuple(tokens[300:600]), tuple(tokens[600:]))),
    ]
    outputs, gradients = shared_and_plain(model, groups, head)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    assert largest_relative_difference(gradients) <= 1e-5


@POSITIONS
@pytest.mark.parametrize("head", ["policy", "reward"])
def test_in_bfloat16_shared_prefix_and_copies_are_as_close_to_each_other_as_to_float32(single, head, positions):
    """Both round, at other places. Measured: outputs 0.03 apart and gradients of a weight 3.5%, from float32 5%."""
    rounded = build(single, head, position_embedding_type=positions, bf16=True)
    exact = build(single, head, position_embedding_type=positions)
    with torch.no_grad():
        for weight, same in zip(exact.parameters(), rounded.parameters(), strict=True):
            assert same.dtype == torch.bfloat16
            weight.copy_(same)
    outputs, gradients = shared_and_plain(rounded, GROUPS, head)
    exact_outputs, exact_gradients = shared_and_plain(exact, GROUPS, head)
    gradients = [{name: gradient.float() for name, gradient in found.items()} for found in gradients]
    assert outputs[0].dtype == torch.float32
    for pair in ((outputs[0], outputs[1]), (outputs[0], exact_outputs[0])):
        assert (pair[0] - pair[1]).abs().max() <= 0.08
    for pair in (gradients, (gradients[0], exact_gradients[0])):
        assert largest_relative_difference(pair) <= 0.08


@pytest.mark.parametrize("head", ["policy", "reward"])
def test_outputs_do_not_depend_on_neighbours_or_padding(single, head):
    model = build(single, head)
    packed = model(pack_groups(GROUPS, shared_prefix=True, length=40))
    alone = torch.cat([model(pack_groups([group], shared_prefix=True)) for group in GROUPS])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@POSITIONS
def test_padding_longer_than_the_models_positions_is_harmless(single, positions):
    model = build(single, "policy", max_position_embeddings=8, position_embedding_type=positions)
    padded = model(pack_groups(GROUPS, shared_prefix=True, length=64))
    torch.testing.assert_close(padded, model(pack_groups(GROUPS, shared_prefix=True)), rtol=1e-5, atol=1e-5)


@POSITIONS
@pytest.mark.parametrize("shared_prefix", [True, False])
def test_a_sequence_longer_than_the_models_positions_is_an_error_that_says_which(single, positions, shared_prefix):
    batch = pack_groups(GROUPS, shared_prefix=shared_prefix)
    build(single, "policy", max_position_embeddings=7, position_embedding_type=positions)(batch)
    model = build(single, "policy", max_position_embeddings=4, position_embedding_type=positions)
    last = pack_groups(GROUPS[2:], shared_prefix=shared_prefix)
    with pytest.raises(
        RecordError, match="prompts.jsonl:3: prompt and response of 5 tokens .*max_position_embeddings=4"
    ):
        model(last)


def test_a_sequence_longer_than_the_attentions_window_is_an_error_that_says_which(single):
    batch = pack_groups(GROUPS[2:], shared_prefix=True)
    build(single, "policy", window_size=5)(batch)
    with pytest.raises(RecordError, match=r"prompts.jsonl:3: .* 5 tokens are more than window_size=4 \(attention over"):
        build(single, "policy", window_size=4)(batch)


@POSITIONS
def test_the_same_tokens_elsewhere_in_the_sequence_are_at_other_positions(single, positions):
    model = build(single, "policy", position_embedding_type=positions)
    near, far = (
        model(pack_groups([Group(prompt=prompt, responses=((5, 6, 7),))], shared_prefix=True))
        for prompt in ((3, 3), (3, 3, 3))
    )
    assert not torch.allclose(near, far, atol=1e-3)


@pytest.mark.parametrize("settings", [{}, *ARCHITECTURES.values()], ids=["llama", *ARCHITECTURES])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_sampler_gives_a_token_the_probability_that_scoring_gives_it(single, settings, temperature):
    model = build(single, "policy", **settings)
    sampler = Sampler([model], single, SamplingConfig(max_new_tokens=8, temperature=temperature), eos_id=0)
    prompts = [(1, 2, 3, 4, 5), (6, 7)]
    drawn = sampler.generate(prompts, seeds=sample_seeds(1, [0, 1], 3))
    groups = [
        Group(prompt=prompt, responses=tuple(sample.tokens for sample in samples))
        for prompt, samples in zip(prompts, drawn, strict=True)
    ]
    batch = pack_groups(groups, shared_prefix=True)
    with torch.no_grad():
        scored = model(batch)
    if temperature:
        expected = torch.tensor([sample.logprob for samples in drawn for sample in samples])
        torch.testing.assert_close(batch.sum_per_response(scored), expected, rtol=1e-4, atol=1e-4)
    else:
        hidden = model.trunk(batch.tokens, batch.position_ids, PackedLayout(segments=batch.segments))
        logits = hidden[:, 0][batch.predict_index] @ model.output_weight[: SIZES["vocab_size"]].t()
        assert torch.equal(logits.argmax(1), batch.targets)


def test_log_probabilities_of_all_next_tokens_sum_to_one(single):
    model = build(single, "policy")
    group = Group(prompt=(1, 2, 3), responses=tuple((token,) for token in range(SIZES["vocab_size"])))
    assert model(pack_groups([group], shared_prefix=True)).exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_temperature_divides_the_logits(single):
    model = build(single, "policy")
    hidden = torch.randn(5, SIZES["hidden_size"], generator=torch.Generator().manual_seed(0))
    targets = torch.arange(5)
    actual = model.token_logprobs(hidden, targets, temperature=0.5)
    logits = hidden @ model.output_weight[: SIZES["vocab_size"]].t()
    torch.testing.assert_close(actual, torch.log_softmax(logits / 0.5, 1).diagonal(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_rewards_are_the_head_at_each_responses_last_token(single, shared_prefix):
    model = build(single, "reward")
    batch = pack_groups(GROUPS, shared_prefix=shared_prefix)
    seen = []
    model.decoder.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    rewards = model(batch)
    last = batch.last_index.tolist()
    assert [batch.tokens[0, place].item() for place in last] == [r[-1] for g in GROUPS for r in g.responses]
    expected = torch.stack([seen[0][place, 0] for place in last]) @ model.reward_head.weight[0]
    torch.testing.assert_close(rewards, expected)
    assert rewards.dtype == torch.float32


def test_a_reward_depends_on_its_whole_response_and_on_no_other(single):
    model = build(single, "reward")
    before = model(pack_groups(GROUPS[:1], shared_prefix=True))
    for place in range(3):
        first = list(GROUPS[0].responses[0])
        first[place] = 50
        changed = dataclasses.replace(GROUPS[0], responses=(tuple(first), *GROUPS[0].responses[1:]))
        after = model(pack_groups([changed], shared_prefix=True))
        assert after[0] != before[0]
        torch.testing.assert_close(after[1:], before[1:])


@pytest.mark.parametrize("untied", [False, True])
def test_a_reward_model_is_the_policys_trunk_with_a_scalar_for_a_vocabulary(single, untied):
    policy, reward = (build(single, head, untie_embeddings_and_output_weights=untied) for head in ("policy", "reward"))
    shapes, reward_shapes = ({n: p.shape for n, p in model.named_parameters()} for model in (policy, reward))
    assert reward_shapes.pop("reward_head.weight") == (1, SIZES["hidden_size"])
    assert (shapes.pop("output_layer.weight", None) is not None) == untied
    assert reward_shapes == shapes
    assert not any("output_layer" in key for key in reward.sharded_state_dict())


def test_the_vocabulary_is_padded_to_the_multiple_times_the_tensor_parallel_size():
    model = tiny(make_vocab_size_divisible_by=128)
    assert [padded_vocab_size(model, size) for size in (1, 2, 4)] == [384, 512, 512]
    assert padded_vocab_size(tiny(make_vocab_size_divisible_by=1), 3) == 321
