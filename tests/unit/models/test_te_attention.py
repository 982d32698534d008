"""Our calls of Transformer Engine's attention, against a stand-in that does what its documentation says.

Transformer Engine needs a GPU and was not run. `DocumentedAttention` has the arguments, the meaning and the refusals
of `transformer_engine.pytorch.DotProductAttention` as far as packed sequences need them (read in 2.9.0, 2.16.0 and
2.20.2, which agree there).
"""

import importlib.machinery
import importlib.util
import inspect
import sys
import types

import pytest
import torch
from helpers.assets import SIZES
from helpers.packed import dense_attention, random_qkv, random_segments, values_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.config.stages import SamplingConfig
from megatron_brain.data.groups import Group, Segment, pack_groups
from megatron_brain.generation.sampler import Sampler
from megatron_brain.generation.seeds import sample_seeds
from megatron_brain.models import specs
from megatron_brain.models.architecture import resolve
from megatron_brain.models.provider import build_model, transformer_config
from megatron_brain.models.te_attention import TransformerEngineAttention
from megatron_brain.runtime import transformer_engine

SCALE = 0.5
SEGMENTS = (
    Segment(0, 3),
    Segment(3, 2, 0, 3),
    Segment(5, 4, 0, 3),
    Segment(9, 2),
    Segment(11, 1, 9, 2),
    Segment(12, 3),
)
"""Two groups and padding."""


class DocumentedAttention(torch.nn.Module):
    """Softmax attention of sequences laid end to end, one after the other and densely."""

    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        sequence_parallel=False,
        tp_size=1,
        get_rng_state_tracker=None,
        tp_group=None,
        layer_number=None,
        attention_type="self",
        softmax_scale=None,
    ):
        super().__init__()
        assert attention_type in ("self", "cross")
        self.num_gqa_groups = (num_gqa_groups or num_attention_heads) // tp_group.size()
        self.attention_type, self.softmax_scale, self.calls = attention_type, softmax_scale, []

    def forward(
        self,
        query_layer,
        key_layer,
        value_layer,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        attn_mask_type=None,
    ):
        assert qkv_format == "thd" and attn_mask_type in ("padding_causal", "padding_causal_bottom_right")
        assert query_layer.dim() == key_layer.dim() == value_layer.dim() == 3
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32 and cu_seqlens_q.shape == cu_seqlens_kv.shape
        assert key_layer.shape[:-1] == value_layer.shape[:-1] and key_layer.size(1) == self.num_gqa_groups
        lengths_q, lengths_kv = cu_seqlens_q.diff().tolist(), cu_seqlens_kv.diff().tolist()
        assert (max_seqlen_q, max_seqlen_kv) == (max(lengths_q), max(lengths_kv))
        # A mask made for self-attention has the lengths of the queries on both sides.
        assert self.attention_type == "cross" or lengths_q == lengths_kv
        self.calls.append((attn_mask_type, lengths_q, lengths_kv))
        sequences = zip(
            query_layer.split(lengths_q), key_layer.split(lengths_kv), value_layer.split(lengths_kv), strict=True
        )
        return torch.cat([self._attend(*qkv, attn_mask_type.endswith("bottom_right")) for qkv in sequences]).flatten(1)

    def get_extra_state(self):
        # Every module of Transformer Engine has one, for FP8.
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        pass

    def _attend(self, query, key, value, bottom_right):
        key, value = (tensor.repeat_interleave(query.size(1) // key.size(1), dim=1) for tensor in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * self.softmax_scale
        shift = len(key) - len(query) if bottom_right else 0
        allowed = torch.ones(len(query), len(key), dtype=torch.bool).tril(shift)
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value)


def install_stand_in(monkeypatch):
    transformer_engine.problem()  # It looks once, and what it finds here must not count for other tests.
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.DotProductAttention = DocumentedAttention
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def documented(monkeypatch):
    """`transformer_engine.pytorch` is the stand-in."""
    install_stand_in(monkeypatch)


def tiny(**changes):
    return resolve(ModelConfig(init_method_std=0.2, **SIZES | changes), None, "the test")


def attention_of(single, heads, key_heads):
    model = tiny(num_attention_heads=heads, num_query_groups=key_heads, hidden_size=8 * heads)
    config = transformer_config(model, ParallelConfig())
    return TransformerEngineAttention(config, 1, None, "self", softmax_scale=SCALE, pg_collection=single.groups)


@given(segments=random_segments(), heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]))
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_are_those_of_dense_masked_attention(single, segments, heads):
    with pytest.MonkeyPatch.context() as monkeypatch:
        install_stand_in(monkeypatch)
        attention = attention_of(single, *heads)
    total = sum(segment.length for segment in segments)
    inputs = [tensor.double() for tensor in random_qkv(total, *heads)]
    upstream = random_qkv(total, *heads, seed=1)[0]
    actual = values_and_gradients(lambda *qkv: attention.attend(segments, *qkv), inputs, upstream)
    expected = values_and_gradients(lambda *qkv: dense_attention(segments, *qkv, SCALE), inputs, upstream)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_all_groups_take_two_calls(single, documented):
    attention = attention_of(single, 4, 2)
    attention.attend(SEGMENTS, *random_qkv(15))
    assert attention.to_self.calls == [("padding_causal", [3, 2, 3], [3, 2, 3])]
    assert attention.after_prefix.calls == [("padding_causal_bottom_right", [2, 4, 1], [5, 7, 3])]


def test_plain_sequences_take_one_call_and_no_copy(single, documented):
    attention = attention_of(single, 4, 2)
    query, key, value = random_qkv(5)
    seen = []
    attention.to_self.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs))
    attention.attend((Segment(0, 3), Segment(3, 2)), query, key, value)
    assert [given is ours for given, ours in zip(seen, (query, key, value), strict=True)] == [True] * 3
    assert attention.after_prefix.calls == []


def test_gradients_of_a_prompt_are_summed_in_float32(single, documented):
    """In bfloat16, adding 1 to 256 changes nothing."""
    responses = 400
    segments = (Segment(0, 1), *(Segment(1 + i, 1, 0, 1) for i in range(responses)))
    value = torch.zeros(1 + responses, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    query, key = torch.zeros(1 + responses, 4, 4, dtype=torch.bfloat16), torch.zeros_like(value)
    out = attention_of(single, 4, 2).attend(segments, query, key, value)
    out[1:].sum().backward()
    # Each response gives half its weight to the prompt; two query heads share a key.
    torch.testing.assert_close(value.grad[0], torch.full_like(value[0], responses), rtol=1e-2, atol=0)


def build(single, **changes):
    [model] = build_model(tiny(**changes), ParallelConfig(), single, head="policy", seed=1)
    return model


@pytest.fixture
def models(single, documented, monkeypatch):
    """The same policy with our attention and with that of Transformer Engine."""
    ours = build(single)
    monkeypatch.setattr(specs, "CoreAttention", TransformerEngineAttention)
    theirs = build(single)
    assert isinstance(theirs.decoder.layers[0].self_attention.core_attention, TransformerEngineAttention)
    return ours, theirs


def test_a_model_on_it_computes_the_same_and_has_the_same_checkpoint(models):
    groups = [
        Group(prompt=(1, 2, 3, 4), responses=((5, 6, 7), (8, 9), (10,))),
        Group(prompt=(11, 12, 13), responses=((5, 6, 7),)),
    ]
    batch = pack_groups(groups, shared_prefix=True, length=24)
    outputs, gradients = [], []
    for model in models:
        output = model(batch)
        output.sum().backward()
        outputs.append(output.detach())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    assert models[0].sharded_state_dict().keys() == models[1].sharded_state_dict().keys()


def test_sampling_prefills_by_it_and_decodes_from_the_cache(single, models):
    drawn = [
        Sampler([model], single, SamplingConfig(max_new_tokens=6), eos_id=0).generate(
            [(1, 2, 3), (4, 5, 6, 7)], seeds=sample_seeds(3, [0, 1], 2)
        )
        for model in models
    ]
    assert [[s.tokens for s in samples] for samples in drawn[1]] == [
        [s.tokens for s in samples] for samples in drawn[0]
    ]
    layers = [layer.self_attention.core_attention for layer in models[1].decoder.layers]
    assert all(layer.to_self.calls and not layer.after_prefix.calls for layer in layers)


def test_the_transformer_engine_spec_has_it_and_the_local_spec_has_not(monkeypatch):
    monkeypatch.setattr(specs, "get_gpt_layer_with_transformer_engine_spec", specs.get_gpt_layer_local_spec)
    model = resolve(ModelConfig(**SIZES), None, "the test")
    chosen = {
        impl: specs.layer_spec(impl, model).submodules.self_attention.submodules.core_attention
        for impl in ("transformer_engine", "local")
    }
    assert chosen == {"transformer_engine": TransformerEngineAttention, "local": specs.CoreAttention}


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine")
def test_the_real_attention_has_the_arguments_we_give():
    from transformer_engine.pytorch import DotProductAttention

    for function in (DotProductAttention.__init__, DotProductAttention.forward):
        ours = inspect.signature(getattr(DocumentedAttention, function.__name__)).parameters
        assert ours.keys() <= inspect.signature(function).parameters.keys()
