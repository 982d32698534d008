"""Defaults < YAML < command line; every option round trips; every mistake is named with its cure."""

import subprocess
import sys

import pytest
import yaml

from megatron_brain.config.fields import all_fields, section_fields, section_help, stage_fields
from megatron_brain.config.loader import (
    build_parser,
    config_from_dict,
    config_to_dict,
    config_to_yaml,
    load_config,
    save_config,
)
from megatron_brain.config.stage_spec import stages
from megatron_brain.errors import ConfigError

REQUIRED = {
    "sft": {"train_data": "t.jsonl", "load": "ckpt"},
    "reward": {"train_data": "t.jsonl", "load": "ckpt"},
    "brain": {"train_data": "t.jsonl", "load": "ckpt", "reward_load": "reward", "prior_load": "sft"},
    "generate": {"load": "ckpt", "prompts": "p.jsonl", "output": "o.jsonl"},
    "evaluate": {"load": "ckpt", "prompts": "p.jsonl", "output": "o.json", "prior_load": "sft", "judge": "j.py:f"},
}

RSO = {"responses": "rso", "objective": "rso-hinge", "refresh_proposal": False}
VLLM = {"engine": "vllm", "engine_url": "http://host:8000", "engine_sync_dir": "sync"}
JUDGE = {"judge_url": "http://host:8000/v1", "judge_model": "m"}
POSTERIOR = {"posterior_samples": 8, "valid_data": "v.jsonl", "reward_load": "reward"}
FP8 = {"fp8_format": "hybrid", "bf16": True}

# Values other than the default where the generic choice below breaks a check, and what they need beside them.
SPECIAL = {
    "num_layers_per_virtual_pipeline_stage": (2, {"pipeline_model_parallel_size": 2}),
    "sequence_parallel": (True, {"tensor_model_parallel_size": 2}),
    "recompute_method": ("block", {"recompute_granularity": "full"}),
    "recompute_num_layers": (2, {"recompute_granularity": "full"}),
    "kv_channels": (16, {}),
    "rope_scaling_factor": (8.0, {}),
    "rope_high_freq_factor": (8.0, {}),
    "global_batch_size": (16, {}),
    "micro_batch_size": (4, {}),
    "eval_interval": (5, {"valid_data": "v.jsonl"}),
    "save_interval": (5, {"save": "out"}),
    "auto_resume": (True, {"save": "out"}),
    "async_save": (True, {"save": "out"}),
    "keep_latest": (2, {"save": "out"}),
    "keep_best": ("loss", {"save": "out", "valid_data": "v.jsonl"}),
    "stop_at_kl": (5.0, {"valid_data": "v.jsonl"}),
    "reward_temperature": (0.5, POSTERIOR),
    "posterior_samples": (64, POSTERIOR),
    "posterior_prompts": (50, POSTERIOR),
    "posterior_data": ("some/path with space.jsonl", POSTERIOR),
    "judge": ("j.py:score", {"valid_data": "v.jsonl"}),
    "max_prompt_length": (100, {}),
    "max_response_length": (100, {}),
    "max_new_tokens": (65, {}),
    "prompts_per_round": (32, {}),
    "rollout_data": ("r.jsonl", {"train_data": None}),
    "responses": ("given", {"alpha": "hard", "refresh_proposal": False, "reward_load": None}),
    "kl_coefficient": (0.5, {"objective": "rloo"}),
    "clip_ratio": (0.5, {"objective": "grpo"}),
    "rso_candidates": (32, RSO),
    "rso_fewer_pairs": (True, RSO),
    "engine": ("vllm", VLLM),
    "engine_url": ("http://one:8000,http://other:8000", {**VLLM}),
    "engine_sync_dir": ("other", {**VLLM}),
    "engine_request_timeout": (100.0, {}),
    "engine_timeout": (1000.0, {}),
    "rounds_ahead": (1, VLLM),
    "reward_function": ("rules.py:right,rules.py:short", {}),
    "reward_url": ("http://host:8000/rewards,https://other", {}),
    "reward_weights": ("0.5,-2", {"reward_function": "rules.py:right", "reward_load": "reward"}),
    "judge_url": ("http://host:8000/v1", {"judge_model": "m"}),
    **{name: ("a name", JUDGE) for name in ("judge_model", "judge_template", "judge_cache")},
    **{name: (64, JUDGE) for name in ("judge_max_tokens", "judge_max_verdicts", "judge_concurrency")},
    "judge_timeout": (60.0, JUDGE),
    "lr_warmup_iters": (3, {}),
    "lr_decay_iters": (30, {}),
    "min_lr": (5e-6, {}),
    "loss_spike_factor": (3.0, {}),
    "overlap_param_gather": (True, {"use_distributed_optimizer": True, "overlap_grad_reduce": True}),
    "ddp_bucket_size": (1000, {"overlap_grad_reduce": True}),
    "fp8_format": ("e4m3", {"bf16": True}),
    "fp8_recipe": ("delayed", FP8),
    "fp8_quantizer_factory": ("package.module.function", {**FP8, "fp8_recipe": "custom"}),
    "fp8_margin": (1, {**FP8, "fp8_recipe": "delayed"}),
    "fp8_amax_history_len": (16, {**FP8, "fp8_recipe": "delayed"}),
    "fp8_amax_compute_algo": ("most_recent", {**FP8, "fp8_recipe": "delayed"}),
    "fp8_param_gather": (True, {**FP8, "use_distributed_optimizer": True}),
    "first_last_layers_bf16": (True, FP8),
    "num_layers_at_start_in_bf16": (2, {**FP8, "first_last_layers_bf16": True}),
    "num_layers_at_end_in_bf16": (2, {**FP8, "first_last_layers_bf16": True}),
    "fp8_emulate": (True, FP8),
    "template_date": ("2026-11-30T12:00", {}),
}

# Sections are shared, yet these have one value in a stage.
_FIXED = {("brain", "hidden_dropout"), ("brain", "attention_dropout")}
_FIXED |= {("generate", "fp8_param_gather"), ("evaluate", "fp8_param_gather")}
STAGE_AND_KEY = [(stage, key) for stage in stages() for key in stage_fields(stage) if (stage, key) not in _FIXED]


def another_value(key):
    """(a valid value that is not the default, the settings it needs)."""
    if key in SPECIAL:
        return SPECIAL[key]
    spec = all_fields()[key]
    if spec.choices:
        return next(choice for choice in spec.choices if choice != spec.default), {}
    if spec.kind is bool:
        return not spec.default, {}
    if spec.kind is int:
        return (spec.default or 0) + 3, {}
    if spec.kind is float:
        return (spec.default or 0.5) / 2, {}
    return "some/path with space", {}


def argv_of(values):
    """Command line of the values."""
    argv = []
    for key, value in values.items():
        dashed = key.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{dashed}" if value else f"--no-{dashed}")
        else:
            argv += [f"--{dashed}", "null" if value is None else str(value)]
    return argv


def read(config, key):
    return getattr(getattr(config, all_fields()[key].section), key)


def write(tmp_path, text, name="run.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def fails(stage, *argv):
    """Message of the error."""
    with pytest.raises(ConfigError) as caught:
        load_config(stage, argv)
    return str(caught.value)


@pytest.mark.parametrize(("stage", "key"), STAGE_AND_KEY)
def test_every_option_round_trips_through_the_command_line_yaml_and_the_saved_file(stage, key, tmp_path):
    value, needs = another_value(key)
    given = REQUIRED[stage] | needs | {key: value}

    from_flags = load_config(stage, argv_of(given))
    from_yaml = load_config(stage, ["--config", write(tmp_path, yaml.safe_dump(given))])
    save_config(from_flags, str(tmp_path / "saved.yaml"))
    from_saved = load_config(stage, ["--config", str(tmp_path / "saved.yaml")])

    assert read(from_flags, key) == value
    assert type(read(from_flags, key)) is type(value)
    assert value != all_fields()[key].default
    assert from_yaml == from_flags
    assert from_saved == from_flags
    assert config_from_dict(stage, config_to_dict(from_flags)) == from_flags


def test_yaml_overrides_defaults_and_the_command_line_overrides_yaml(tmp_path):
    path = write(tmp_path, "train-data: t.jsonl\nload: ckpt\nlr: 1e-4\nmicro_batch_size: 4\npacking: false\n")
    config = load_config("sft", ["--lr", "3e-4", "--config", path, "--packing"])
    assert (config.optimizer.lr, config.training.micro_batch_size, config.sft.packing) == (3e-4, 4, True)
    assert config.optimizer.weight_decay == 0.0


def test_underscores_dashes_and_equals_signs_mean_the_same():
    required = argv_of(REQUIRED["sft"])
    dashes = load_config("sft", [*required, "--micro-batch-size", "2", "--no-save-optim", "--save=my_out-dir"])
    underscores = load_config("sft", [*required, "--micro_batch_size=2", "--no_save_optim", "--save", "my_out-dir"])
    assert dashes == underscores
    assert dashes.checkpoint.save == "my_out-dir"


def test_null_unsets_an_optional_value_of_the_file(tmp_path):
    path = write(tmp_path, "train_data: t\nload: c\ntrain_iters: 100\nsave:\nvalid_data: ~\n")
    config = load_config("sft", ["--config", path, "--train-iters", "null", "--train-epochs", "2"])
    assert (config.training.train_iters, config.training.train_epochs) == (None, 2.0)
    assert (config.checkpoint.save, config.data.valid_data) == (None, None)


@pytest.mark.parametrize("text", ["1e-5", "'1e-5'", "1.0e-05", "0.00001"])
def test_a_float_is_read_in_any_notation_yaml_takes_for_text_or_number(tmp_path, text):
    path = write(tmp_path, f"train_data: t\nload: c\nlr: {text}\n")
    assert load_config("sft", ["--config", path]).optimizer.lr == 1e-5


def test_text_fields_keep_what_yaml_would_turn_into_something_else(tmp_path):
    path = write(tmp_path, "train_data: 2024\nload: no\nsave: 'null'\ntensorboard_dir: 1:30\n")
    config = load_config("sft", ["--config", path])
    assert (config.data.train_data, config.checkpoint.load) == ("2024", "no")
    assert (config.checkpoint.save, config.logging.tensorboard_dir) == ("null", "1:30")
    assert config_from_dict("sft", yaml.safe_load(config_to_yaml(config))) == config


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("micro_batch_size", "1.5", "an integer"),
        ("micro_batch_size", "yes", "an integer"),
        ("micro_batch_size", "true", "an integer"),
        ("train_iters", "1e3", "an integer (or null)"),
        ("lr", "fast", "a number"),
        ("lr", "nan", "a number"),
        ("clip_grad", "inf", "a number"),
        ("lr", "true", "a number"),
        ("train_split", "''", "non-empty text"),
    ],
)
def test_a_wrong_type_names_key_value_expected_type_and_place(tmp_path, key, text, expected):
    path = write(tmp_path, f"load: c\n\n{key}: {text}\n")
    value = text.strip("'")
    assert fails("sft", "--config", path) == f"{key}={value!r} ({path} line 3): expected {expected}"
    flag = "--" + key.replace("_", "-")
    assert fails("sft", f"{flag}={value}") == f"{key}={value!r} (command line): expected {expected}"


@pytest.mark.parametrize("text", ["yes", "on", "1", "~"])
def test_a_bool_is_only_true_or_false(tmp_path, text):
    message = fails("sft", "--config", write(tmp_path, f"bf16: {text}\n"))
    assert message.startswith("bf16=") and message.endswith("line 1): expected true or false")


def test_a_bool_flag_takes_no_value():
    message = fails("sft", "--bf16", "true", "--lr", "1")
    assert "'true' after --bf16: write --bf16 or --no-bf16 without a value" in message
    assert "--bf16" in fails("sft", "--bf16=true")


def test_a_choice_names_the_choices_and_the_nearest():
    message = fails("sft", "--lr-decay-style", "cosin")
    assert "lr_decay_style='cosin'" in message and "'cosine'" in message and "inverse-square-root" in message


@pytest.mark.parametrize(("text", "found"), [("[1, 2]", "a list"), ("{a: 1}", "a mapping")])
def test_a_list_or_mapping_is_no_value(tmp_path, text, found):
    message = fails("sft", "--config", write(tmp_path, f"train_iters: {text}\n"))
    assert "train_iters" in message and "line 1" in message and f"found {found}" in message


def test_an_unknown_key_names_value_place_and_the_nearest_known_keys(tmp_path):
    path = write(tmp_path, "load: c\nmicro_batchsize: 4\n")
    message = fails("sft", "--config", path)
    assert message.startswith(f"micro_batchsize='4' ({path} line 2): unknown key; did you mean 'micro_batch_size'")
    message = fails("sft", "--tensor-parallel-size", "2")
    assert message.startswith("tensor_parallel_size='2' (command line): unknown key; did you mean 'tensor_model_par")
    assert "--help" in fails("sft", "--xyzzy=3")


def test_an_abbreviated_flag_is_unknown():
    assert fails("sft", "--micro-batch", "2").startswith("micro_batch='2' (command line): unknown key")


@pytest.mark.parametrize("stage", list(stages()))
def test_a_key_of_another_stage_says_which(tmp_path, stage):
    foreign = [spec for name, spec in all_fields().items() if name not in stage_fields(stage)]
    assert foreign
    for spec in foreign:
        owners = ", ".join(name for name, other in stages().items() if spec.section in other.all_sections)
        path = write(tmp_path, f"{spec.name}: 1\n")
        assert f"the {stage} stage does not read it; it belongs to {owners}" in fails(stage, "--config", path)
        if spec.kind is not bool:
            assert f"belongs to {owners}" in fails(stage, spec.flag, "1")


def test_a_section_used_as_a_key_is_explained(tmp_path):
    assert "keys are flat" in fails("sft", "--config", write(tmp_path, "model:\n  num_layers: 2\n"))


def test_a_duplicate_key_is_an_error_in_either_spelling(tmp_path):
    path = write(tmp_path, "train_iters: 4\nload: c\ntrain-iters: 5\n")
    assert fails("sft", "--config", path) == f"train_iters ({path} line 3): duplicate key, already set in {path} line 1"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "found none"),
        ("# nothing\n", "found none"),
        ("- 1\n", "found none"),
        ("a: [\n", "not valid YAML"),
        ("a: 1\n\tb: 2\n", "line 2"),
    ],
)
def test_a_file_that_is_no_flat_yaml_is_named(tmp_path, text, part):
    path = write(tmp_path, text)
    message = fails("sft", "--config", path)
    assert path in message and part in message


def test_a_missing_file_a_folder_and_binary_content_are_named(tmp_path):
    assert "No such file" in fails("sft", "--config", str(tmp_path / "none.yaml"))
    assert "directory" in fails("sft", "--config", str(tmp_path))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert str(tmp_path / "binary") in fails("sft", "--config", str(tmp_path / "binary"))


def test_two_config_files_a_missing_value_and_a_stray_word_are_errors(tmp_path):
    path = write(tmp_path, "load: c\n")
    assert "--config is given 2 times" in fails("sft", "--config", path, "--config", path)
    assert "--lr" in fails("sft", "--lr", "--bf16")
    assert "'oops' does not follow a flag" in fails("sft", "oops")


def test_a_check_of_a_dataclass_says_where_the_value_came_from(tmp_path):
    path = write(tmp_path, "lr: 1e-5\n")
    message = fails("sft", "--config", path, "--min-lr", "1e-4")
    assert message == f"min_lr=0.0001: must lie in [0, lr=1e-05] (lr from {path} line 1, min_lr from command line)"


def test_a_file_saved_by_one_stage_is_refused_by_another(tmp_path):
    config = load_config("sft", argv_of(REQUIRED["sft"]))
    save_config(config, str(tmp_path / "c.yaml"))
    message = fails("reward", "--config", str(tmp_path / "c.yaml"))
    assert "stage='sft'" in message and "'reward'" in message


def test_an_unknown_stage_names_the_stages():
    assert "expected one of sft, reward, brain" in fails("rewards") and "'reward'" in fails("rewards")


def test_saved_values_must_have_their_types():
    with pytest.raises(ConfigError, match="train_iters=2.5"):
        config_from_dict("sft", {"train_iters": 2.5})
    with pytest.raises(ConfigError, match="seed=True"):
        config_from_dict("sft", {"seed": True})
    with pytest.raises(ConfigError, match="load=3"):
        config_from_dict("sft", {"load": 3})
    assert config_from_dict("sft", {"lr": 1}).optimizer.lr == 1.0


@pytest.mark.parametrize("stage", list(stages()))
def test_help_is_grouped_and_shows_every_flag_its_text_default_and_choices(stage, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = build_parser(stage).format_help()
    words = " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100
    for section in stages()[stage].all_sections:
        assert f"\n{section}:\n" in text
        assert " ".join(section_help(section).split()) in words
        for spec in section_fields(section):
            assert spec.flag in words
            assert spec.help and " ".join(spec.help.split()) in words
            assert "{" + ",".join(spec.choices) + "}" in words or not spec.choices
    foreign = [spec.flag for name, spec in all_fields().items() if name not in stage_fields(stage)]
    assert not {flag for flag in foreign if f" {flag} " in words.partition("logging:")[2]}
    assert "[1e-05]" in words or stage in ("generate", "evaluate")


def test_help_is_printed_without_importing_torch():
    code = (
        "import sys\nfrom megatron_brain.config.loader import load_config\n"
        "try:\n    load_config('brain', ['--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--samples-per-prompt" in done.stdout
