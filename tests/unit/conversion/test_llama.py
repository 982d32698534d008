"""config.json to sizes and back; what cannot be expressed is refused by name."""

import json

import pytest
import torch
from helpers.assets import SIZES
from transformers import LlamaConfig

from megatron_brain.config.errors import ConfigError
from megatron_brain.config.model import ModelConfig
from megatron_brain.conversion import read_hf_architecture
from megatron_brain.conversion.family import GATE_UP, QKV
from megatron_brain.conversion.llama import LLAMA
from megatron_brain.models.architecture import ARCHITECTURE_FIELDS, resolve

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


def write(tmp_path, **changes):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B | changes))
    return tmp_path


def test_what_config_json_leaves_out_is_what_transformers_takes(tmp_path):
    ours, theirs = read_hf_architecture(write(tmp_path)), LlamaConfig()
    assert tuple(sorted(ours)) == tuple(sorted(ARCHITECTURE_FIELDS))
    assert ours["num_query_groups"] == 32
    assert ours["kv_channels"] == theirs.head_dim == 128
    assert ours["norm_epsilon"] == theirs.rms_norm_eps
    assert ours["max_position_embeddings"] == theirs.max_position_embeddings
    assert ours["rotary_base"] == theirs.rope_parameters["rope_theta"]
    assert ours["untie_embeddings_and_output_weights"] is not theirs.tie_word_embeddings


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000},
        {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
        {"rope_theta": 500000, "rope_scaling": None},
        {"rope_theta": 500000, "rope_scaling": {"type": "default"}},
    ],
)
def test_rotary_base_is_read_in_the_spelling_of_transformers_4_and_5(tmp_path, rope):
    assert read_hf_architecture(write(tmp_path, **rope))["rotary_base"] == 500000.0


def test_sizes_written_to_config_json_are_read_back_equal():
    sizes = {
        "num_layers": 3,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 12,
        "vocab_size": 330,
        "max_position_embeddings": 64,
        "position_embedding_type": "rope",
        "rotary_base": 1e5,
        "norm_epsilon": 1e-5,
        "untie_embeddings_and_output_weights": True,
    }
    config = LLAMA.hf_config(ModelConfig(**sizes))
    assert LLAMA.architecture(config) == sizes
    assert LLAMA.architecture(LlamaConfig(**config).to_dict()) == sizes


def test_learned_positions_are_refused_and_not_dropped():
    model = resolve(ModelConfig(**SIZES, position_embedding_type="learned_absolute"), None, "the test")
    with pytest.raises(ConfigError, match="position_embedding_type=learned_absolute"):
        LLAMA.hf_config(model)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type='llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "by layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"architectures": ["MambaForCausalLM"]}, "LlamaForCausalLM, LlamaForSequenceClassification"),
        ({"architectures": None}, "LlamaForCausalLM, LlamaForSequenceClassification"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "2 labels"),
        (
            {
                "architectures": ["LlamaForSequenceClassification"],
                "id2label": {"0": "LABEL_0"},
                "pad_token_id": 2,
                "eos_token_id": [3, 2],
            },
            "pad_token_id",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path, changes, named):
    with pytest.raises(ConfigError) as error:
        read_hf_architecture(write(tmp_path, **changes))
    assert named in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_directory_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_hf_architecture(tmp_path)
    with pytest.raises(ConfigError, match="not a directory"):
        read_hf_architecture(tmp_path / "elsewhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_hf_architecture(tmp_path)


def test_sizes_that_transformers_does_not_allow_are_not_exported():
    model = ModelConfig(num_attention_heads=3, hidden_size=32, kv_channels=16)
    with pytest.raises(ConfigError, match="hidden_size=32 is not a multiple of num_attention_heads=3"):
        LLAMA.hf_config(model)


def test_fused_qkv_has_each_groups_query_heads_then_its_key_and_value():
    model = ModelConfig(num_attention_heads=4, num_query_groups=2, kv_channels=1, hidden_size=4)
    query, key, value = (torch.tensor(rows)[:, None] for rows in ([0, 1, 2, 3], [10, 11], [20, 21]))
    fused = QKV.join([query, key, value], model)
    assert fused.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    for part, back in zip((query, key, value), QKV.split(fused, model), strict=True):
        assert torch.equal(part, back)


def test_gate_stands_before_up():
    model = ModelConfig()
    fused = GATE_UP.join([torch.tensor([[1.0]]), torch.tensor([[2.0]])], model)
    assert fused.flatten().tolist() == [1.0, 2.0]
    assert [part.item() for part in GATE_UP.split(fused, model)] == [1.0, 2.0]
