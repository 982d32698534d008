"""What does not fit with FP8 is refused before start, and the message says what would."""

import dataclasses

import pytest

from megatron_brain.config.checks import require, validate_layout
from megatron_brain.config.fp8 import Fp8Config
from megatron_brain.config.fp8_checks import validate_fp8_device
from megatron_brain.config.loader import config_from_dict, load_config
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.config.stage_spec import stages
from megatron_brain.errors import ConfigError

START = {
    "sft": {"train_data": "t.jsonl", "load": "ckpt"},
    "reward": {"train_data": "t.jsonl", "load": "ckpt"},
    "brain": {"train_data": "t.jsonl", "load": "ckpt", "reward_load": "reward", "prior_load": "sft"},
    "generate": {"load": "ckpt", "prompts": "p.jsonl", "output": "o.jsonl"},
    "evaluate": {"load": "ckpt", "prompts": "p.jsonl", "output": "o.json", "prior_load": "sft", "judge": "j.py:f"},
}
ON = {"fp8_format": "hybrid", "bf16": True}
DELAYED = {**ON, "fp8_recipe": "delayed"}
CUSTOM = {**ON, "fp8_recipe": "custom", "fp8_quantizer_factory": "package.module.function"}
FIRST_LAST = {**ON, "first_last_layers_bf16": True}
GATHERED = {"fp8_param_gather": True, "use_distributed_optimizer": True}
EMULATED = {"fp8_format": "hybrid", "fp8_emulate": True}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}

ACCEPTED = [
    {},
    ON,
    {**ON, "fp8_format": "e4m3"},
    {**ON, "transformer_impl": "transformer_engine"},
    *({**ON, "fp8_recipe": recipe} for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8")),
    {**DELAYED, "fp8_margin": 2, "fp8_amax_history_len": 16, "fp8_amax_compute_algo": "most_recent"},
    CUSTOM,
    FIRST_LAST,
    {**FIRST_LAST, "fp8_recipe": "mxfp8", "num_layers_at_start_in_bf16": 0, "num_layers_at_end_in_bf16": 2},
    EMULATED,
    {**EMULATED, "bf16": True, "fp8_format": "e4m3", "transformer_impl": "local", "seq_length": 100},
    {**EMULATED, "first_last_layers_bf16": True},
    {**ON, **TP2_SP, "seq_length": 1024 + 32},
    {**ON, "fp8_recipe": "blockwise", "seq_length": 1024 + 128},
]

REFUSED = {
    # Without FP8 nothing of it is read.
    "fp8_recipe=delayed does nothing without fp8_format: add --fp8-format": {"fp8_recipe": "delayed"},
    "fp8_margin=1 does nothing without fp8_format": {"fp8_margin": 1},
    "fp8_emulate=true does nothing without fp8_format": {"fp8_emulate": True},
    "first_last_layers_bf16=true does nothing without fp8_format": {"first_last_layers_bf16": True},
    "num_layers_at_end_in_bf16=0 does nothing without fp8_format": {"num_layers_at_end_in_bf16": 0},
    # Of a recipe alone.
    "fp8_margin=1 is read by fp8_recipe=delayed alone, it is tensorwise": {**ON, "fp8_margin": 1},
    "fp8_amax_history_len=4 is read by fp8_recipe=delayed alone, it is custom": {**CUSTOM, "fp8_amax_history_len": 4},
    "fp8_amax_compute_algo=max is read by fp8_recipe=delayed alone, it is mxfp8": {
        **ON,
        "fp8_recipe": "mxfp8",
        "fp8_amax_compute_algo": "max",
    },
    "fp8_margin=-1: a scale": {**DELAYED, "fp8_margin": -1},
    "fp8_amax_history_len=0: must be at least 1": {**DELAYED, "fp8_amax_history_len": 0},
    "which needs one; add --fp8-quantizer-factory": {**ON, "fp8_recipe": "custom"},
    "a factory goes with custom alone, which needs one; drop it": {**CUSTOM, "fp8_recipe": "tensorwise"},
    "fp8_quantizer_factory='function': expected package.module.function": {
        **CUSTOM,
        "fp8_quantizer_factory": "function",
    },
    "fp8_quantizer_factory='package/module.py:f': expected": {**CUSTOM, "fp8_quantizer_factory": "package/module.py:f"},
    "fp8_format=e4m3 is not told to the factory": {**CUSTOM, "fp8_format": "e4m3"},
    # Layers in bfloat16.
    "first_last_layers_bf16=true: fp8_recipe=delayed updates": {**DELAYED, "first_last_layers_bf16": True},
    "num_layers_at_start_in_bf16=1 needs first_last_layers_bf16": {**ON, "num_layers_at_start_in_bf16": 1},
    "num_layers_at_end_in_bf16=-1: must not be negative": {**FIRST_LAST, "num_layers_at_end_in_bf16": -1},
    "first_last_layers_bf16=true leaves out no layer": {
        **FIRST_LAST,
        "num_layers_at_start_in_bf16": 0,
        "num_layers_at_end_in_bf16": 0,
    },
    # Other sections.
    "fp8_format=hybrid needs bf16 for everything": {"fp8_format": "hybrid"},
    "the layers of transformer_impl=local have no FP8": {**ON, "transformer_impl": "local"},
    "seq_length=1000 is not a multiple of the 16 rows that fp8_recipe=tensorwise needs: use a multiple of 16, such as "
    "1008": {**ON, "seq_length": 1000},
    "seq_length=1040 is not a multiple of the 32 rows that fp8_recipe=mxfp8": {
        **ON,
        "fp8_recipe": "mxfp8",
        "seq_length": 1040,
    },
    "seq_length=1056 is not a multiple of the 128 rows that fp8_recipe=blockwise": {
        **ON,
        "fp8_recipe": "blockwise",
        "seq_length": 1056,
    },
    "x tensor_model_parallel_size=2, over which sequence_parallel splits it: use a multiple of 32, such as 1056": {
        **ON,
        **TP2_SP,
        "seq_length": 1040,
    },
    # An emulation.
    "fp8_emulate=true needs fp8_recipe=tensorwise, it is mxfp8": {**EMULATED, "fp8_recipe": "mxfp8"},
    "fp8_emulate=true rounds in the local layers": {**EMULATED, "transformer_impl": "transformer_engine"},
    # Weights in FP8 alone.
    "fp8_param_gather=true: an emulation has no weights in FP8": {**EMULATED, "fp8_param_gather": True},
    "fp8_param_gather=true is for fp8_recipe=tensorwise or blockwise, it is custom": CUSTOM | GATHERED,
    "fp8_param_gather=true is for fp8_recipe=tensorwise or blockwise, it is mxfp8": {
        **ON,
        **GATHERED,
        "fp8_recipe": "mxfp8",
    },
    "fp8_param_gather=true is for fp8_recipe=tensorwise or blockwise, it is delayed": DELAYED | GATHERED,
    "fp8_param_gather=true: checkpoints take whole weights from the optimizer": {**ON, **GATHERED, "save_optim": False},
    "fp8_param_gather=true: without use_distributed_optimizer there is nothing to gather": {
        **ON,
        "fp8_param_gather": True,
    },
}


def load(stage, settings):
    return config_from_dict(stage, START[stage] | settings)


@pytest.mark.parametrize("stage", list(stages()))
@pytest.mark.parametrize("settings", ACCEPTED, ids=str)
def test_settings_that_fit_together_are_accepted(stage, settings):
    require(load(stage, settings))


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_something_would_ignore_are_refused(message):
    with pytest.raises(ConfigError) as caught:
        require(load("sft", REFUSED[message]))
    assert message in str(caught.value)


@pytest.mark.parametrize("stage", list(stages()))
@pytest.mark.parametrize("settings", [{"fp8_margin": 1}, {"fp8_format": "hybrid"}, {**ON, "seq_length": 1000}], ids=str)
def test_no_stage_is_left_out(stage, settings):
    with pytest.raises(ConfigError, match="fp8"):
        require(load(stage, settings))


@pytest.mark.parametrize("settings", [ON, FIRST_LAST], ids=str)
def test_weights_in_fp8_alone_are_for_stages_that_train(settings):
    require(load("brain", settings | GATHERED))
    with pytest.raises(ConfigError, match="fp8_param_gather=true: the generate stage updates no weights"):
        require(load("generate", settings | {"fp8_param_gather": True}))


def test_the_command_line_says_where_a_value_came_from(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train_data: t\nload: c\nbf16: true\nfp8_format: hybrid\nfp8_margin: 1\n")
    with pytest.raises(ConfigError, match=r"fp8_margin from .*run.yaml line 5"):
        load_config("sft", ["--config", str(path), "--fp8-recipe", "mxfp8"])


SIZES = {
    "num_layers": 8,
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "vocab_size": 1001,
    "max_position_embeddings": 2048,
}
SIZES_ACCEPTED = [
    {},
    {"tensor_model_parallel_size": 8, "kv_channels": 32},
    {"fp8_recipe": "mxfp8", "tensor_model_parallel_size": 4},
    {"fp8_recipe": "blockwise", "ffn_hidden_size": 528},
    {**EMULATED, "hidden_size": 40, "ffn_hidden_size": 24},
    {"first_last_layers_bf16": True, "pipeline_model_parallel_size": 8},
    {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 4, "num_layers_at_end_in_bf16": 3},
]
SIZES_REFUSED = {
    "hidden_size=264 is not a multiple of 16, as fp8_recipe=tensorwise needs: drop fp8_format": {"hidden_size": 264},
    "num_attention_heads=8 x kv_channels=10 is not a multiple of 32, as fp8_recipe=mxfp8": {
        "kv_channels": 10,
        "fp8_recipe": "mxfp8",
    },
    "num_attention_heads=8 x kv_channels=8 / tensor_model_parallel_size=8 = 8 is not a multiple of 16": {
        "kv_channels": 8,
        "tensor_model_parallel_size": 8,
    },
    "(num_attention_heads=8 + 2 x num_query_groups=1) x kv_channels=20 / tensor_model_parallel_size=2 = 100 is not": {
        "kv_channels": 20,
        "num_query_groups": 1,
        "tensor_model_parallel_size": 2,
    },
    "ffn_hidden_size=528 / tensor_model_parallel_size=2 = 264 is not a multiple of 16, as fp8_recipe=tensorwise needs: "
    "lower tensor_model_parallel_size or drop fp8_format": {"ffn_hidden_size": 528, "tensor_model_parallel_size": 2},
    "num_layers_at_start_in_bf16=2 exceeds the 1 layers of a pipeline stage (num_layers=8 / "
    "pipeline_model_parallel_size=8): use 1 or less": {
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 2,
        "pipeline_model_parallel_size": 8,
    },
    "num_layers_at_end_in_bf16=9 exceeds the 8 layers": {
        **EMULATED,
        "first_last_layers_bf16": True,
        "num_layers_at_end_in_bf16": 9,
    },
    "leave none of num_layers=8 in FP8": {
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 4,
        "num_layers_at_end_in_bf16": 4,
    },
}


def lay_out(settings, stage="sft"):
    config = load(stage, ON | SIZES | settings)
    size = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    validate_layout(config, size, config.model)


@pytest.mark.parametrize("settings", SIZES_ACCEPTED, ids=str)
def test_sizes_that_fp8_kernels_take_are_accepted(settings):
    lay_out(settings)


@pytest.mark.parametrize("message", SIZES_REFUSED)
def test_sizes_that_fp8_kernels_do_not_take_are_refused(message):
    with pytest.raises(ConfigError) as caught:
        lay_out(SIZES_REFUSED[message])
    assert message in str(caught.value)


H100, ADA, A100, BLACKWELL, RTX50 = (9, 0), (8, 9), (8, 0), (10, 0), (12, 0)
RUNS_ON = {
    "delayed": {ADA, H100, BLACKWELL, RTX50},
    "tensorwise": {ADA, H100, BLACKWELL, RTX50},
    "custom": {ADA, H100, BLACKWELL, RTX50},
    "blockwise": {H100, BLACKWELL, RTX50},
    "mxfp8": {BLACKWELL},
}


def recipe(name, **changes):
    return Fp8Config(
        fp8_format="hybrid",
        fp8_recipe=name,
        fp8_quantizer_factory="package.module.function" if name == "custom" else None,
        **changes,
    )


@pytest.mark.parametrize("capability", [H100, ADA, A100, BLACKWELL, RTX50])
@pytest.mark.parametrize("name", RUNS_ON)
def test_a_recipe_needs_a_device_that_has_it(name, capability):
    if capability in RUNS_ON[name]:
        validate_fp8_device(recipe(name), capability, cuda=(13, 0))
        return
    with pytest.raises(ConfigError) as caught:
        validate_fp8_device(recipe(name), capability, cuda=(13, 0))
    assert f"fp8_recipe={name}" in str(caught.value) and ".".join(map(str, capability)) in str(caught.value)
    assert ("use --fp8-recipe tensorwise" if capability in RUNS_ON["tensorwise"] else "drop fp8_format") in str(
        caught.value
    )


def test_blockwise_needs_a_recent_cuda():
    validate_fp8_device(recipe("blockwise"), H100, cuda=(12, 9))
    validate_fp8_device(recipe("tensorwise"), H100, cuda=(12, 8))
    with pytest.raises(ConfigError, match=r"blockwise needs CUDA 12.9 or newer, torch was built for 12.8"):
        validate_fp8_device(recipe("blockwise"), H100, cuda=(12, 8))


def test_what_is_not_known_of_the_device_is_not_checked():
    for name in RUNS_ON:
        validate_fp8_device(recipe(name), None, cuda=None)


def test_without_fp8_and_with_an_emulation_any_device_will_do():
    for fp8 in (Fp8Config(), recipe("tensorwise", fp8_emulate=True)):
        validate_fp8_device(fp8, (7, 0), cuda=(11, 8))


def test_sequences_are_padded_to_what_the_recipes_kernels_take():
    multiples = {name: recipe(name).sequence_multiple for name in RUNS_ON}
    assert multiples == {"delayed": 16, "tensorwise": 16, "custom": 16, "mxfp8": 32, "blockwise": 128}
    assert Fp8Config().sequence_multiple == recipe("tensorwise", fp8_emulate=True).sequence_multiple == 1


def test_layers_in_bf16_are_one_at_either_end_unless_said_otherwise():
    on = recipe("tensorwise", first_last_layers_bf16=True)
    assert on.layers_in_bf16 == (1, 1)
    assert dataclasses.replace(on, num_layers_at_start_in_bf16=0).layers_in_bf16 == (0, 1)
    assert recipe("tensorwise").layers_in_bf16 == (0, 0)


@pytest.mark.parametrize(
    ("recipe", "tensor_parallel", "sequence_parallel", "expected"),
    [
        (None, 3, False, 3),
        ("tensorwise", 1, False, 16),
        ("tensorwise", 4, False, 16),
        ("tensorwise", 3, False, 48),
        ("tensorwise", 4, True, 64),
        ("blockwise", 2, True, 256),
    ],
)
def test_every_process_gets_as_many_rows_as_its_products_take(recipe, tensor_parallel, sequence_parallel, expected):
    fp8 = Fp8Config() if recipe is None else Fp8Config(fp8_format="e4m3", fp8_recipe=recipe)
    layout = ParallelConfig(tensor_model_parallel_size=tensor_parallel, sequence_parallel=sequence_parallel)
    assert fp8.packed_multiple(layout) == expected
