"""Parameters and operations are what real models have and do."""

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.assets import SIZES
from helpers.packed import allowed_pairs
from torch.utils.flop_counter import FlopCounterMode

from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.data.groups import Group, pack_groups
from megatron_brain.models.architecture import padded_vocab_size, resolve
from megatron_brain.models.provider import build_model
from megatron_brain.planning import sizes
from megatron_brain.planning.presets import PRESETS, preset
from megatron_brain.planning.workload import Layout, SegmentLength, Workload

PARAMETERS = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "mistral-7b": 7_248_023_552,
    "smollm2-135m": 134_515_008,
}
"""Published: the numbers of elements in the models' safetensors files."""


def added_product(total, left, right, **_):
    """Operations of `addmm_`, which torch does not count."""
    return 2 * left[0] * left[1] * right[1]


def tiny(**changes):
    return resolve(ModelConfig(**SIZES | changes), None, "the test")


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_published_numbers_of_parameters(name):
    assert sizes.total_parameters(preset(name)) == PARAMETERS[name]


def test_every_preset_is_compared_but_those_of_equal_sizes():
    compared = {(preset(name).num_layers, preset(name).hidden_size, preset(name).vocab_size) for name in PARAMETERS}
    for name in PRESETS:
        assert (preset(name).num_layers, preset(name).hidden_size, preset(name).vocab_size) in compared


@pytest.mark.parametrize("head", ["policy", "reward"])
@pytest.mark.parametrize("architecture", [{}, *ARCHITECTURES.values()], ids=["llama", *ARCHITECTURES])
def test_parameters_are_those_of_the_model_that_is_built(single, architecture, head):
    model = tiny(**architecture)
    [chunk] = build_model(model, ParallelConfig(), single, head=head, seed=None)
    built = sum(parameter.numel() for parameter in chunk.parameters())
    assert sizes.pipeline_stage_parameters(model, Layout(), 0, head) == built


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("untied", [False, True])
def test_shares_of_ranks_add_up_to_the_model(tensor, untied):
    """What is not split, norms and the biases of row-split maps, is counted once; a tied embedding is there twice."""
    model = tiny(**ARCHITECTURES["gpt2"], untie_embeddings_and_output_weights=untied)
    layout = Layout(tensor=tensor, pipeline=4)
    shares = sum(sizes.pipeline_stage_parameters(model, layout, rank) for rank in range(4))
    hidden, layers = model.hidden_size, model.num_layers
    whole_on_each = layers * (2 * 2 * hidden + 2 * hidden) + 2 * hidden + model.max_position_embeddings * hidden
    padded = padded_vocab_size(model, tensor)
    unique = sizes.total_parameters(model) - whole_on_each - model.vocab_size * hidden * (2 if untied else 1)
    assert tensor * (shares - whole_on_each) == unique + 2 * padded * hidden


@pytest.mark.parametrize("architecture", [{}, *ARCHITECTURES.values()], ids=["llama", *ARCHITECTURES])
def test_operations_of_a_pass_are_those_that_torch_counts(single, architecture):
    """Matrix products of a real forward and backward pass; attention is counted apart, from its mask."""
    model = tiny(**architecture)
    [chunk] = build_model(model, ParallelConfig(), single, head="policy", seed=1)
    batch = pack_groups([Group(prompt=(1, 2, 3), responses=((4, 5), (6, 7, 8, 9)))], shared_prefix=True)
    products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product}) as counter:
        chunk(batch).sum().backward()
    counted = sum(flops for name, flops in counter.get_flop_counts()["Global"].items() if name in products)
    tokens, targets = batch.tokens.numel(), batch.targets.numel()
    layers = 3 * model.num_layers * sizes.linear_flops(model, tokens)
    # Rows that pad the vocabulary are never read.
    head = 3 * sizes.head_flops(model, targets) * model.vocab_size / padded_vocab_size(model, 1)
    assert counted == layers + head


def test_attended_pairs_are_those_of_the_mask():
    groups = [Group(prompt=(1, 2, 3, 4, 5), responses=((1, 2), (3, 4, 5, 6), (7,)))]
    for shared in (True, False):
        batch = pack_groups(groups, shared_prefix=shared)
        segments = [SegmentLength(length=s.length, prefix=s.prefix_length) for s in batch.segments]
        assert sizes.attended_pairs(segments) == allowed_pairs(batch.segments).sum()


def test_attention_is_two_products_over_the_pairs():
    model = tiny()
    query, key = torch.zeros(4, 3, 8), torch.zeros(4, 8, 3)  # 4 heads of 8 channels, 3 tokens
    with FlopCounterMode(display=False) as counter:
        (query @ key) @ torch.zeros(4, 3, 8)
    assert sizes.attention_flops(model, [SegmentLength(length=3)]) == counter.get_total_flops() * 6 / 9


def test_model_flops_of_llama_3_70b_by_hand():
    """6 for each token and parameter but the embedding's and the norms', and the causal half of attention."""
    model = preset("llama3-70b")
    workload = Workload(stage="sft", model=model, prompt_length=0, response_length=8192, seq_length=8192)
    parameters = 80 * (8192 * (8192 + 2 * 1024) + 8192 * 8192 + 3 * 8192 * 28672) + 8192 * 128256
    attention = 3 * 80 * 4 * 8192 * 8193 / 2
    per_token = sizes.model_flops(model, workload.segments, workload.sample_targets) / 8192
    assert per_token == 6 * parameters + attention
