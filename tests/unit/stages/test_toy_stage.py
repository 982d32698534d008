"""A stage that one file defines and one line registers works wherever the stages of the package do."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import toy_stage
from helpers.assets import size_flags, write_assets

from megatron_brain.__main__ import main
from megatron_brain.commands import check_data, plan, preprocess_data
from megatron_brain.config import stage_spec
from megatron_brain.config.loader import config_from_dict, config_to_dict, load_config
from megatron_brain.errors import ConfigError


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_assets(folder)
    return folder


@pytest.fixture
def toy(monkeypatch):
    """Registered for one test."""
    monkeypatch.setattr(stage_spec, "_registered", dict(stage_spec._registered))
    stage_spec.register_stage(toy_stage.TOY)


def flags(assets, *more):
    data = ["--train-data", str(assets / "sft.jsonl"), "--tokenizer-model", str(assets / "tokenizer")]
    sizes = ["--seq-length", "64", "--train-iters", "3", "--global-batch-size", "4", "--no-progress"]
    return ["toy", *data, *size_flags(), *sizes, *more]


def test_a_stage_that_is_not_registered_is_unknown(capsys):
    assert main(["toy"]) == 2
    assert "unknown stage 'toy'" in capsys.readouterr().err


def test_help_lists_the_stage_and_its_flags(toy, capsys):
    assert main(["--help"]) == 0
    assert "  toy       supervised fine-tuning of a toy\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["toy", "--help"])
    shown = capsys.readouterr().out
    assert "--toy-weight FLOAT" in shown and "Factor of the loss. [1.0]" in shown
    assert "--multi-turn-loss" not in shown


def test_its_settings_come_from_yaml_are_checked_and_are_saved(toy, assets, tmp_path):
    file = tmp_path / "toy.yaml"
    file.write_text("toy_weight: 2.5\ntoy-suffix: ' x'\n")
    config = load_config("toy", [*flags(assets)[1:], "--config", str(file)])
    assert (config.section("toy").toy_weight, config.section("toy").toy_suffix) == (2.5, " x")
    saved = config_to_dict(config)
    assert config_from_dict("toy", {name: value for name, value in saved.items()}) == config
    with pytest.raises(ConfigError, match="toy_weight=0.0: must be positive"):
        load_config("toy", [*flags(assets)[1:], "--toy-weight", "0"])
    with pytest.raises(ConfigError, match="the sft stage does not read it; it belongs to toy"):
        load_config("sft", ["--toy-weight", "2"])


def test_a_dry_run_reads_its_records_and_reckons_its_length(toy, assets, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    epochs = ["--train-epochs", "2.5"]
    argv = [flag for flag in flags(assets, *epochs, "--dry-run") if flag not in ("--train-iters", "3")]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "toy on 2 processes: dry run" in shown and "global batch          4 toys" in shown
    assert "25: 2.5 epochs of 40 samples" in shown and "40 records read, 40 kept" in shown


def reading(assets, *more):
    return ["--stage", "toy", "--hf-model", str(assets / "tokenizer"), "--seq-length", "64", "--workers", "2", *more]


def test_the_data_tools_read_as_the_stage_does_also_in_worker_processes(toy, assets, tmp_path, capsys):
    source = str(assets / "sft.jsonl")
    assert check_data.main([*reading(assets, "--toy-suffix", " x"), "--input", source]) == 0
    for name, suffix in ("plain", []), ("longer", ["--toy-suffix", " small small"]):
        output = ["--input", source, "--output", str(tmp_path / name)]
        assert preprocess_data.main([*reading(assets, *suffix), *output]) == 0
    infos = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "longer")]
    assert [info["stage"] for info in infos] == ["toy", "toy"]
    assert infos[0]["contents"] != infos[1]["contents"]
    capsys.readouterr()
    argv = ["--stage", "sft", *reading(assets)[2:], "--toy-suffix", " x", "--input", source]
    assert check_data.main(argv) == 2
    assert "--toy-suffix: the sft stage does not read it, only toy; drop it" in capsys.readouterr().err


def test_the_planner_plans_it(toy, capsys):
    lengths = ["--prompt-length", "100", "--response-length", "28", "--global-batch-size", "8"]
    argv = ["--model", "llama3.2-1b", "--gpus", "2", "--stage", "toy", *lengths]
    assert plan.main([*argv, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["question"]["stage"] == "toy" and report["layouts"]
    assert plan.main([*argv, "--samples-per-prompt", "4"]) == 2
    assert "samples_per_prompt=4 is for --stage brain, not toy" in capsys.readouterr().err


def test_two_ranks_train_it_as_one_does(assets, tmp_path):
    losses = []
    for processes in (1, 2):
        folder = tmp_path / f"on_{processes}"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *launcher, toy_stage.__file__, *flags(assets, "--toy-weight", "2")]
        root = Path(__file__).parents[3]
        environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            [*command, "--save", str(folder)], capture_output=True, text=True, timeout=300, env=environment
        )
        assert done.returncode == 0, done.stderr
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)])
    assert len(losses[0]) == 3 and all(map(math.isfinite, losses[0]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] == pytest.approx(2 * math.log(320), rel=0.05)
