"""config.json to sizes and back, for every family; what cannot be expressed is refused by name."""

import copy
import dataclasses
import itertools
import json
import math

import pytest
import torch
from helpers.hf_models import HF_MODELS
from transformers import AutoConfig, AutoModelForCausalLM
from unit.conversion.published import GEMMA_2_2B, PUBLISHED

from megatron_brain.config.model import ModelConfig
from megatron_brain.conversion import read_hf_architecture
from megatron_brain.conversion.registry import FAMILIES, family_for_export
from megatron_brain.errors import ConfigError
from megatron_brain.models.architecture import ARCHITECTURE_FIELDS, resolve

BY_TYPE = {family.model_type: family for family in FAMILIES}


def write(directory, model_type, head="policy", /, **changes):
    """A config.json of nothing but defaults and changes."""
    family = BY_TYPE[model_type]
    named = family.policy_class if head == "policy" else family.reward_class
    (directory / "config.json").write_text(json.dumps({"architectures": [named], "model_type": model_type, **changes}))
    return directory


def read(model_type, **config):
    return resolve(ModelConfig(), BY_TYPE[model_type].architecture(config), "the test")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read_with_their_tensors(name, tmp_path):
    """At real sizes the table has the names and shapes of transformers' model, and as many parameters as published."""
    published = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(published.config))
    model = resolve(ModelConfig(), read_hf_architecture(tmp_path), name)
    assert {key: getattr(model, key) for key in published.read} == published.read
    family = family_for_export(model)
    shapes = dict(family.tensors(model, "policy"))
    assert sum(map(math.prod, shapes.values())) == published.parameters
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**published.config))
    theirs = {name: tuple(parameter.shape) for name, parameter in hf.named_parameters()}
    if model.hf_model_type == "gpt_neox":
        # transformers calls it by its old name in files alone.
        theirs["embed_out.weight"] = theirs.pop("lm_head.weight")
    assert shapes == theirs
    assert len(hf.get_submodule(family.hf_layers)) == model.num_layers
    assert isinstance(hf.get_submodule(family.hf_final_norm).weight, torch.nn.Parameter)
    assert family.prefix == f"{hf.base_model_prefix}."


@pytest.mark.parametrize("model_type", BY_TYPE)
def test_what_config_json_leaves_out_is_what_transformers_takes(model_type):
    ours = BY_TYPE[model_type].architecture({})
    assert ours == BY_TYPE[model_type].architecture(AutoConfig.for_model(model_type).to_dict())
    assert ours.keys() <= set(ARCHITECTURE_FIELDS)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000},
        {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
        {"rope_theta": 500000, "rope_scaling": None},
        {"rope_theta": 500000, "rope_scaling": {"type": "default"}},
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_rotary_base_is_read_in_the_spelling_of_transformers_4_and_5(model_type, rope):
    assert read(model_type, **rope).rotary_base == 500000.0


@pytest.mark.parametrize(
    "rope",
    [
        {"rotary_emb_base": 500000, "rotary_pct": 0.5},
        {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rotary_emb_base": 500000, "rotary_pct": 0.5, "rope_theta": 1.0, "partial_rotary_factor": 1.0},
    ],
)
def test_gpt_neox_has_rotary_names_of_its_own(rope):
    model = read("gpt_neox", **rope)
    theirs = AutoConfig.for_model("gpt_neox", **rope).rope_parameters
    assert (model.rotary_base, model.rotary_percent) == (500000.0, 0.5)
    assert (theirs["rope_theta"], theirs["partial_rotary_factor"]) == (500000.0, 0.5)


@pytest.mark.parametrize(("model_type", "name"), [("gpt_neox", "rotary_pct"), ("phi3", "partial_rotary_factor")])
def test_a_rotation_of_no_channels_is_not_taken_for_one_of_all(model_type, name):
    with pytest.raises(ConfigError, match=r"rotary_percent=0\.0: must be positive"):
        read(model_type, **{name: 0})


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 16},
        {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 16},
        {"n_head": 2, "n_embd": 32, "num_attention_heads": 8},
    ],
)
def test_gpt2_has_two_names_for_its_sizes(config):
    model, theirs = read("gpt2", **config), AutoConfig.for_model("gpt2", **config)
    ours = (model.num_layers, model.hidden_size, model.num_attention_heads, model.max_position_embeddings)
    assert ours == (theirs.n_layer, theirs.n_embd, theirs.n_head, theirs.n_positions)


def test_the_original_length_of_llama_3_positions_is_the_whole_one_where_it_is_not_said():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = {"rope_scaling": scaling, "max_position_embeddings": 512}
    theirs = AutoConfig.for_model("llama", **json.loads(json.dumps(config))).rope_parameters
    ours = read("llama", **config).rope_original_max_position_embeddings
    assert ours == theirs["original_max_position_embeddings"] == 512


_LLAMA_3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SETTINGS = {
    "rope_theta": (None, 77.0),
    "rotary_emb_base": (None, 88.0),
    "rotary_pct": (None, 0.5),
    "partial_rotary_factor": (None, 0.75),
    "original_max_position_embeddings": (None, 64),
    "rope_scaling": (None, _LLAMA_3, {"rope_type": "default", "rope_theta": 99.0}),
    "rope_parameters": (
        None,
        {**_LLAMA_3, "rope_theta": 55.0, "original_max_position_embeddings": 16},
        {"rope_theta": 66.0},
    ),
}


@pytest.mark.parametrize("model_type", sorted(BY_TYPE.keys() - {"gpt2"}))
def test_of_rotary_settings_in_several_places_those_count_that_transformers_takes(model_type):
    compared = 0
    for values in itertools.product(*SETTINGS.values()):
        config = {key: value for key, value in zip(SETTINGS, values, strict=True) if value is not None}
        try:
            ours = read(model_type, **copy.deepcopy(config))
        except ConfigError:
            continue
        theirs = AutoConfig.for_model(model_type, **copy.deepcopy(config)).rope_parameters
        found = (ours.rotary_base, ours.rotary_percent, ours.rope_scaling_factor)
        assert found == (theirs["rope_theta"], theirs.get("partial_rotary_factor", 1.0), theirs.get("factor", 1.0))
        if ours.rope_scaling_factor != 1.0:
            assert ours.rope_original_max_position_embeddings == theirs["original_max_position_embeddings"]
        compared += 1
    assert compared >= 48


VARIANTS = {
    **{name: {} for name in HF_MODELS},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0, "head_dim": 12},
    "gpt_neox": {"tie_word_embeddings": True, "rope_scaling": {**HF_MODELS["llama3"]["rope_parameters"]}},
    "gpt2": {"tie_word_embeddings": False, "n_inner": None, "activation_function": "gelu"},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("spelling", ["ours", "transformers' own", "transformers 4"])
def test_config_json_that_is_written_is_read_back_equal(name, spelling):
    config = {**HF_MODELS[name], **VARIANTS[name]}
    model = read(**config)
    family = BY_TYPE[config["model_type"]]
    written = family.hf_config(model)
    if spelling == "transformers' own":
        written = AutoConfig.for_model(**written).to_dict()
    elif spelling == "transformers 4":
        written.pop("rope_parameters", None)
    assert read(**written) == model
    assert family_for_export(model) is family


ROPE = {"rope_theta": 1e4, "factor": 2.0}
REFUSED = [
    *((model_type, {"rope_scaling": {"rope_type": rope_type, **ROPE}}, f"rope_type='{rope_type}'")
      for rope_type in ("linear", "dynamic", "yarn", "longrope")
      for model_type in ("llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox")),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "by layer type"),
    ("llama", {"rope_theta": None}, "rope_theta=null"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "without low_freq_factor, high_freq_factor"),
    ("phi3", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type='llama3'"),
    *((model_type, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5")
      for model_type in ("llama", "mistral", "qwen2", "qwen3")),
    *((model_type, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config") for model_type in BY_TYPE),
    *((model_type, {"is_causal": False}, "is_causal=false") for model_type in BY_TYPE),
    ("llama", {"per_layer_config": {"0": {"num_key_value_heads": 2}}}, "per_layer_config"),
    ("llama", {"transformers_weights": "other.safetensors"}, "transformers_weights"),
    ("gpt_neox", {"head_dim": 32}, "head_dim=32"),
    *((model_type, {"hidden_act": "relu"}, "hidden_act='relu'") for model_type in BY_TYPE if model_type != "gpt2"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("gpt2", {"activation_function": "relu"}, "hidden_act='relu'"),
    ("llama", {"attention_bias": True}, "attention_bias=true"),
    ("llama", {"mlp_bias": True}, "mlp_bias=true"),
    ("qwen3", {"attention_bias": True}, "attention_bias=true"),
    ("gpt_neox", {"attention_bias": False}, "attention_bias=false"),
    ("llama", {"sliding_window": 4096}, "sliding_window=4096"),
    ("qwen2", {"use_sliding_window": True}, "sliding_window=4096 in 4 of 32 layers"),
    ("qwen3", {"use_sliding_window": True, "num_hidden_layers": 2,
               "layer_types": ["full_attention", "sliding_attention"]}, "in 1 of 2 layers"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=false"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true"),
    ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=true"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention=true"),
    *((model_type, {"vocab_size": None}, "no vocab_size") for model_type in BY_TYPE),
    ("llama", {"hidden_size": "4096"}, "hidden_size='4096', which must be of type int"),
    ("llama", {"hidden_size": 4096.0}, "hidden_size=4096.0, which must be of type int"),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads=0: must be positive"),
    ("llama", {"rope_scaling": "yarn"}, "'yarn' as rope_scaling or rope_parameters, which must be an object"),
    ("gpt_neox", {"use_parallel_residual": "false"}, "use_parallel_residual='false', which must be of type bool"),
    ("llama", {"rope_theta": None, "rope_scaling": {"rope_theta": "x"}}, "rope_theta='x', which must be a number"),
    ("llama", {"rope_scaling": {**_LLAMA_3, "factor": [8.0]}}, "factor=[8.0], which must be a number"),
    ("qwen2", {"use_sliding_window": True, "layer_types": 5}, "layer_types=5"),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": None}, "max_window_layers=None"),
    ("llama", {"architectures": [{}]}, "architectures=[{}] is not supported"),
    ("llama", {"model_type": None}, "model_type=None"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "changes", "named"), REFUSED)
def test_what_cannot_be_expressed_is_refused_by_name(model_type, changes, named, tmp_path):
    with pytest.raises(ConfigError) as error:
        read_hf_architecture(write(tmp_path, model_type, **changes))
    assert named in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"use_sliding_window": False, "sliding_window": 16}, None),
        ({"use_sliding_window": True, "sliding_window": None}, None),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, 16),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 32}, None),
        ({"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention"] * 32}, 16),
        ({"use_sliding_window": True, "sliding_window": 16, "max_position_embeddings": 16}, None),
    ],
)
def test_a_window_that_all_layers_have_is_kept_and_one_that_never_matters_is_not(changes, window):
    for model_type in ("qwen2", "qwen3"):
        assert read(model_type, **changes).window_size == window


@pytest.mark.parametrize("model_type", BY_TYPE)
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, "2 labels"),
        (
            {"id2label": {"0": "LABEL_0"}, "pad_token_id": 2, "eos_token_id": [3, 2]},
            "pad_token_id is 2, which ends a text",
        ),
        ({"num_labels": 1, "pad_token_id": -1}, "pad_token_id=-1 is not one of the"),
        ({"num_labels": 1, "pad_token_id": 2**20}, "pad_token_id=1048576 is not one of the"),
        ({"id2label": 5}, "2 labels"),
    ],
)
def test_a_classifier_that_is_no_reward_model_is_refused(model_type, changes, named, tmp_path):
    with pytest.raises(ConfigError, match=named):
        read_hf_architecture(write(tmp_path, model_type, "reward", **changes))


@pytest.mark.parametrize("named", [["MambaForCausalLM"], None])
def test_an_unknown_architecture_is_answered_with_those_that_are_supported(named, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": named}))
    with pytest.raises(ConfigError, match="GPT2LMHeadModel.*LlamaForCausalLM, .*Qwen3ForSequenceClassification"):
        read_hf_architecture(tmp_path)


def test_an_architecture_under_another_model_type_is_refused(tmp_path):
    """transformers would run another network, with scaled scores and logits, on weights of the same names."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "granite", "attention_multiplier": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is Llama, but model_type='granite', by which .* not 'llama'"):
        read_hf_architecture(tmp_path)


def test_gemma_2_is_refused_with_what_is_missing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GEMMA_2_2B))
    with pytest.raises(ConfigError) as error:
        read_hf_architecture(tmp_path)
    for missing in ("Gemma 2", "attn_logit_softcapping", "final_logit_softcapping", "norms after", "around zero"):
        assert missing in str(error.value)


def test_a_directory_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_hf_architecture(tmp_path)
    with pytest.raises(ConfigError, match="not a directory"):
        read_hf_architecture(tmp_path / "elsewhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_hf_architecture(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("llama", {"qk_layernorm": True}, "Llama cannot have qk_layernorm=True: .* can: qwen3"),
        ("llama", {"add_qkv_bias": True}, "Llama cannot have add_qkv_bias=True: .* can: qwen2"),
        ("llama", {"window_size": 8}, "Llama cannot have window_size=8: .* can: mistral, phi3"),
        ("llama", {"position_embedding_type": "learned_absolute"}, "position_embedding_type=learned.*: no other"),
        ("llama", {"num_attention_heads": 3, "kv_channels": 16, "num_query_groups": 1}, "multiple of .*: mistral"),
        ("mistral", {"rotary_percent": 0.5}, "Mistral cannot have rotary_percent=0.5: .* can: phi3"),
        ("phi3", {"rope_scaling_factor": 8.0}, "rope_scaling_factor=8.0: .* can: llama, mistral"),
        ("qwen3", {"qk_layernorm": False}, "Qwen3 cannot have qk_layernorm=False: .* can: llama"),
        ("gpt2", {"num_query_groups": 2}, "GPT-2 cannot have num_query_groups=2 for 12 heads: no other"),
        ("gpt2", {"position_embedding_type": "rope"}, "GPT-2 cannot have position_.*: .* can: gpt_neox"),
        ("gpt_neox", {"kv_channels": 32}, "GPT-NeoX cannot have kv_channels=32"),
        ("gpt_neox", {"add_bias_linear": False}, "GPT-NeoX cannot have add_bias_linear=False: no other"),
        ("gpt_neox", {"hidden_act": "silu"}, "GPT-NeoX cannot have hidden_act=silu"),
    ],
)
def test_what_a_family_cannot_have_is_not_exported_and_the_families_that_can_are_named(model_type, changes, message):
    model = dataclasses.replace(read(model_type), **changes)
    with pytest.raises(ConfigError, match=message):
        family_for_export(model)
    with pytest.raises(ConfigError, match=next(iter(changes))):
        BY_TYPE[model_type].hf_config(model)


def test_a_model_of_no_family_is_not_exported():
    model = dataclasses.replace(read("qwen3"), add_qkv_bias=True, hf_model_type=None)
    with pytest.raises(ConfigError, match=r"no family .*Qwen2: qk_layernorm=True; Qwen3: add_qkv_bias=True"):
        family_for_export(model)
    with pytest.raises(ConfigError, match="hf_model_type=mamba is not supported; supported are gpt2, gpt_neox, llama"):
        family_for_export(dataclasses.replace(model, hf_model_type="mamba"))
