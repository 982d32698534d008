"""Sizes of the model come from one place, and contradictions are named."""

import pytest
from helpers.architectures import ARCHITECTURES
from helpers.assets import SIZES

from megatron_brain.config.model import ModelConfig
from megatron_brain.errors import ConfigError
from megatron_brain.models.architecture import architecture, resolve


def test_flags_alone_are_filled_with_defaults():
    model = resolve(
        ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, vocab_size=100), None, ""
    )
    assert architecture(model) == {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "kv_channels": 8,
        "vocab_size": 100,
        "max_position_embeddings": 2048,
        "position_embedding_type": "rope",
        "rotary_base": 10000.0,
        "rotary_percent": 1.0,
        "rope_scaling_factor": 1.0,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_original_max_position_embeddings": 8192,
        "window_size": None,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-5,
        "qk_layernorm": False,
        "hidden_act": "silu",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "use_parallel_residual": False,
        "untie_embeddings_and_output_weights": False,
        "hf_model_type": None,
    }


def test_a_checkpoints_sizes_are_taken_and_choices_of_the_run_kept():
    found = architecture(resolve(ModelConfig(**SIZES), None, ""))
    model = resolve(ModelConfig(bf16=True, logprob_chunk_size=7), found, "ckpt")
    assert architecture(model) == found
    assert (model.bf16, model.logprob_chunk_size) == (True, 7)


def test_a_size_that_contradicts_the_checkpoint_is_named_with_both_values():
    with pytest.raises(ConfigError, match="num_layers=3 was asked for, but ckpt has num_layers=4"):
        resolve(ModelConfig(num_layers=3), {"num_layers": 4}, "ckpt")


def test_what_a_newer_version_may_have_saved_is_refused_by_name():
    found = architecture(resolve(ModelConfig(**SIZES), None, ""))
    with pytest.raises(ConfigError, match="ckpt has logit_scale, which this version of megatron_brain does not know"):
        resolve(ModelConfig(), {**found, "logit_scale": 0.5}, "ckpt")
    with pytest.raises(ConfigError, match=r"hidden_act='relu' \(ckpt\): expected .*silu"):
        resolve(ModelConfig(), {**found, "hidden_act": "relu"}, "ckpt")


def test_missing_sizes_are_all_named():
    with pytest.raises(ConfigError, match="ffn_hidden_size, vocab_size are not known: give --hf-model, --load"):
        resolve(ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4), None, "the flags")


@pytest.mark.parametrize(
    ("name", "value", "default"),
    [
        ("position_embedding_type", "learned_absolute", "rope"),
        ("hidden_act", "gelu", "silu"),
        ("window_size", 64, None),
    ],
)
def test_what_a_source_does_not_name_is_the_default_there(name, value, default):
    found = architecture(resolve(ModelConfig(**SIZES), None, ""))
    del found[name]
    assert getattr(resolve(ModelConfig(), found, "ckpt"), name) == default
    with pytest.raises(ConfigError, match=f"{name}={value} was asked for, but ckpt has {name}={default}"):
        resolve(ModelConfig(**{name: value}), found, "ckpt")


@pytest.mark.parametrize("settings", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_checkpoint_says_what_its_layers_are(settings):
    found = architecture(resolve(ModelConfig(**SIZES, **settings), None, ""))
    read = resolve(ModelConfig(), found, "ckpt")
    assert {name: getattr(read, name) for name in settings} == settings


def test_sizes_that_only_together_make_no_sense_are_named():
    with pytest.raises(ConfigError, match="rotary_percent=0.3 of kv_channels=10 are 3 channels"):
        resolve(ModelConfig(**SIZES | {"hidden_size": 40}, rotary_percent=0.3), None, "the flags")
