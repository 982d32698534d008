"""The banner says what the run is, in numbers that are found again in the run."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers.assets import size_flags, write_assets
from helpers.reports import read_report

from megatron_brain.config.loader import load_config
from megatron_brain.stages.reward.stage import RewardStage
from megatron_brain.stages.sft.stage import SFTStage
from megatron_brain.training.banner import banner, show_banner
from megatron_brain.training.start import open_run
from megatron_brain.training.trainer import Trainer


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    write_assets(folder)
    return folder


@pytest.fixture
def start(single, assets):
    """Start a stage; returns its trainer and its banner by rows."""

    def start(stage, made, data, *flags):
        argv = ["--train-data", str(assets / data), "--tokenizer-model", str(assets / "tokenizer"), *size_flags()]
        run = open_run(load_config(stage, [*argv, "--seq-length", "64", "--no-progress", *flags]))
        trainer = Trainer(run, made(run))
        (rows,) = read_report(banner(run, trainer.stage.summary())).values()
        return trainer, rows

    return start


def test_parameters_steps_and_batches_are_those_of_the_run(start, assets):
    flags = ["--global-batch-size", "6", "--micro-batch-size", "2", "--train-epochs", "2", "--seed", "7"]
    trainer, rows = start("reward", RewardStage, "pairs.jsonl", *flags, "--valid-data", str(assets / "pairs.jsonl"))
    count = sum(parameter.numel() for chunk in trainer.gathered_chunks() for parameter in chunk.parameters())
    # 320 ids are padded to 384 rows of 32.
    assert rows["parameters"].startswith(f"{count - 64 * 32:,} with the reward head; {count:,} on the fullest rank")
    assert trainer.stage.train_iters == 14  # 2 x 40 pairs in batches of 6
    assert rows["steps"] == "14: 2.1 epochs of 40 pairs"
    assert rows["global batch"] == "6 pairs = micro-batch 2 x data 1 x 3 micro-batches"
    assert rows["processes"] == "1 = tensor 1 x data 1 x pipeline 1"
    assert rows["train data"] == rows["valid data"] == f"{assets}/pairs.jsonl: 40 records read, 40 kept"
    assert rows["learning rate"] == "1e-05, cosine to 0" and rows["seed"] == "7"
    assert f"torch {torch.__version__}" in rows["versions"] and rows["precision"] == "float32"


def test_where_files_go_and_weights_come_from_is_said(start, tmp_path):
    sft = ("sft", SFTStage, "sft.jsonl", "--train-iters", "4")
    _, rows = start(*sft)
    assert rows["weights"] == "random"
    assert rows["checkpoints"] == "none: --save is not set"
    assert rows["metrics"] == "nowhere else: neither --save nor --tensorboard-dir is set"
    trainer, rows = start(*sft, "--save", str(tmp_path / "run"), "--save-interval", "2")
    assert rows["checkpoints"] == f"{tmp_path}/run, every 2 steps and after the last"
    assert rows["metrics"].startswith(f"{tmp_path}/run: metrics.jsonl")
    trainer.save()
    iteration = f"{tmp_path}/run/iter_0000000"
    _, rows = start(*sft, "--load", str(tmp_path / "run"), "--finetune", "--tensorboard-dir", str(tmp_path / "board"))
    assert rows["weights"] == iteration and rows["metrics"].startswith(f"{tmp_path}/board: ")
    _, rows = start(*sft, "--load", str(tmp_path / "run"))
    assert rows["weights"] == f"{iteration}, resumed with its optimizer and position"


def test_options_that_are_on_are_named(start):
    flags = ["--bf16", "--use-distributed-optimizer", "--recompute-granularity", "full", "--global-batch-size", "4"]
    trainer, rows = start("sft", SFTStage, "sft.jsonl", *flags, "--fp8-format", "hybrid", "--fp8-emulate")
    assert rows["processes"].endswith("pipeline 1; distributed optimizer; full recomputation")
    assert rows["precision"] == "FP8 hybrid, recipe tensorwise, emulated"
    training = dataclasses.replace(trainer.config.training, max_tokens_per_micro_batch=512)
    run = dataclasses.replace(trainer.run, config=dataclasses.replace(trainer.config, training=training))
    (rows,) = read_report(banner(run, [])).values()
    assert rows["global batch"] == "4 sequences over 1 replicas, by length"
    assert rows["micro-batch"] == "at most 512 tokens; longer sequences are refused"


def test_ranks_that_do_not_report_print_nothing(capsys):
    show_banner(SimpleNamespace(parallel=SimpleNamespace(is_writer=False)), [])
    assert capsys.readouterr().out == ""
