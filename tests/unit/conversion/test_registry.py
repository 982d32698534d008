"""Every family states every architecture field, and where several can express a model the registry says which wins."""

import contextlib
import dataclasses
import itertools
import json
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from helpers.hf_models import HF_MODELS

from megatron_brain.config.model import ModelConfig
from megatron_brain.conversion import read_hf_architecture, registry
from megatron_brain.conversion.config_json import UNUSED, fixed
from megatron_brain.conversion.registry import FAMILIES, UNSUPPORTED, family_for_export
from megatron_brain.models.architecture import ARCHITECTURE_FIELDS, resolve

BY_TYPE = {family.model_type: family for family in FAMILIES}
STATED = [name for name in ARCHITECTURE_FIELDS if name != "hf_model_type"]
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(model_type, **config):
    return resolve(ModelConfig(), BY_TYPE[model_type].architecture(config), "the test")


def lacking(family, fields):
    """Fields that a family says nothing about, and fields that it names but that are not in the architecture."""
    return family.rules.keys() ^ set(fields)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_family_has_a_rule_for_every_architecture_field(family):
    assert lacking(family, STATED) == set()
    assert lacking(family, [*STATED, "embedding_multiplier"]) == {"embedding_multiplier"}


VALUES = {
    "num_layers": [7],
    "hidden_size": [96],
    "ffn_hidden_size": [56],
    "num_attention_heads": [2, 8],
    "num_query_groups": [1],
    "kv_channels": [24],
    "vocab_size": [331],
    "max_position_embeddings": [128],
    "position_embedding_type": ["rope", "learned_absolute"],
    "rotary_base": [77.0],
    "rotary_percent": [0.5, 1.0],
    "rope_scaling_factor": [16.0],
    "rope_low_freq_factor": [2.0],
    "rope_high_freq_factor": [3.0],
    "rope_original_max_position_embeddings": [24],
    "window_size": [40],
    "normalization": ["RMSNorm", "LayerNorm"],
    "norm_epsilon": [1e-3],
    "qk_layernorm": [False, True],
    "hidden_act": ["silu", "gelu", "gelu_tanh"],
    "gated_linear_unit": [False, True],
    "add_bias_linear": [False, True],
    "add_qkv_bias": [False, True],
    "use_parallel_residual": [False, True],
    "untie_embeddings_and_output_weights": [False, True],
}
"""Values of each field, at least one of which each model of HF_MODELS does not have."""


def changed_models(family, name):
    """Models that differ in one field from one that the family can express; ModelConfig refuses some."""
    config = {**HF_MODELS[family.model_type]}
    if name.startswith("rope_") and family.model_type != "phi3":
        config["rope_scaling"] = {**LLAMA_3, "original_max_position_embeddings": 16}
    if name == "position_embedding_type":
        config |= {"partial_rotary_factor": 1.0, "rotary_pct": 1.0}
    model = resolve(ModelConfig(), family.architecture(config), "the test")
    for value in VALUES[name]:
        with contextlib.suppress(ValueError):
            changed = dataclasses.replace(model, **{name: value})
            if changed != model:
                yield changed


@pytest.mark.parametrize("name", STATED)
def test_another_value_of_a_field_is_written_or_refused_unless_the_family_does_not_use_the_field(name):
    tried = [(family, model) for family in FAMILIES for model in changed_models(family, name)]
    assert {family.model_type for family, _ in tried} >= {"llama", "mistral", "phi3", "qwen2"}
    for family, model in tried:
        if not family.lacks(model):
            back = resolve(ModelConfig(), family.architecture(family.hf_config(model)), "the test")
            assert family.rules[name] is UNUSED or back == model, family.name


def test_two_families_overlap_only_where_the_order_is_explained():
    """Two families cannot express the same model if they have no value in common of a field that has few values."""
    hints = get_type_hints(ModelConfig)
    kinds = {name: next(part for part in get_args(hints[name]) if part is not type(None)) for name in STATED}
    few = {name: VALUES[name] for name, kind in kinds.items() if kind is bool or get_origin(kind) is Literal}
    assert all(set(values) == {*get_args(kinds[name])} or kinds[name] is bool for name, values in few.items())

    def overlap(one, other):
        model = ModelConfig()
        return all(
            any(one.rules[name].allows(value, model) and other.rules[name].allows(value, model) for value in values)
            for name, values in few.items()
        )

    pairs = itertools.combinations(FAMILIES, 2)
    overlapping = {(one.model_type, other.model_type) for one, other in pairs if overlap(one, other)}
    assert overlapping == {("llama", "mistral"), ("llama", "phi3"), ("mistral", "phi3")}


@pytest.mark.parametrize(
    ("model_type", "config", "able"),
    [
        ("llama", {}, ["llama", "mistral", "phi3"]),
        ("llama", {"rope_scaling": LLAMA_3}, ["llama", "mistral"]),
        ("mistral", {"sliding_window": 4096}, ["mistral", "phi3"]),
        ("mistral", {"hidden_size": 100, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32,
                     "sliding_window": None}, ["mistral", "phi3"]),
        ("phi3", {"partial_rotary_factor": 0.5}, ["phi3"]),
        ("qwen2", {}, ["qwen2"]),
        ("qwen3", {}, ["qwen3"]),
        ("gpt2", {}, ["gpt2"]),
        ("gpt_neox", {}, ["gpt_neox"]),
    ],
)  # fmt: skip
def test_a_model_without_a_family_goes_to_the_first_that_can_express_it(model_type, config, able):
    model = dataclasses.replace(read(model_type, **config), hf_model_type=None)
    assert [family.model_type for family in FAMILIES if not family.lacks(model)] == able
    assert family_for_export(model).model_type == able[0]
    for named in able:
        assert family_for_export(dataclasses.replace(model, hf_model_type=named)).model_type == named


def test_no_two_families_have_a_class_or_a_model_type_in_common():
    classes = [name for family in FAMILIES for name in (family.policy_class, family.reward_class)]
    classes += [name for family in UNSUPPORTED for name in family.classes]
    assert len(classes) == len(set(classes))
    assert len(BY_TYPE) == len(FAMILIES)


def test_one_entry_of_the_registry_makes_a_family_readable_and_writable(tmp_path, monkeypatch):
    llama = BY_TYPE["llama"]
    other = dataclasses.replace(
        llama,
        model_type="other",
        policy_class="OtherForCausalLM",
        reward_class="OtherForSequenceClassification",
        rules={**llama.rules, "qk_layernorm": fixed(True), "add_qkv_bias": fixed(True)},
    )
    monkeypatch.setattr(registry, "FAMILIES", (*FAMILIES, other))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other", "architectures": ["OtherForCausalLM"]}))
    model = resolve(ModelConfig(), read_hf_architecture(tmp_path), "the test")
    assert family_for_export(dataclasses.replace(model, hf_model_type=None)) is other
