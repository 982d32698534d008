"""Stages train on prepared data as on the raw records it was made of."""

import dataclasses

import pytest
from helpers.assets import size_flags, write_assets
from helpers.reading import reading_settings

from megatron_brain.config.data import DataConfig
from megatron_brain.config.loader import load_config
from megatron_brain.data.prepared.preparation import Preparation, prepare
from megatron_brain.data.prepared.read import PreparedItems
from megatron_brain.stages.answers import read_prompts
from megatron_brain.stages.reward.stage import RewardStage
from megatron_brain.stages.sft.stage import SFTStage
from megatron_brain.training.start import open_run
from megatron_brain.training.trainer import Trainer

STAGES = {"sft": (SFTStage, "sft"), "reward": (RewardStage, "pairs")}


@pytest.fixture(scope="module")
def assets(single, tmp_path_factory):
    """A folder with sft.jsonl, pairs.jsonl, prompts.jsonl, and each of them prepared as NAME.FORMAT."""
    folder = tmp_path_factory.mktemp("assets")
    write_assets(folder)
    for stage, name in (("sft", "sft"), ("reward", "pairs"), ("brain", "prompts")):
        reading = reading_settings(
            stage=stage,
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(folder / "tokenizer"),
            limits=DataConfig(seq_length=64),
            max_new_tokens=8,
        )
        job = Preparation(input=str(folder / f"{name}.jsonl"), split=None, prefix="", format="indexed", reading=reading)
        for form in ("indexed", "arrow"):
            prepare(dataclasses.replace(job, prefix=str(folder / f"{name}.{form}"), format=form))
    return folder


def flags(assets, *extra):
    return ["--seq-length", "64", "--tokenizer-model", str(assets / "tokenizer"), *size_flags(num_layers=1), *extra]


def train(stage, assets, ending, *extra):
    """Losses, gradient norms and the validation's metrics of two steps."""
    make, name = STAGES[stage]
    source = str(assets / f"{name}.{ending}")
    steps = ["--train-iters", "2", "--global-batch-size", "4", "--no-progress"]
    run = open_run(load_config(stage, flags(assets, "--train-data", source, "--valid-data", source, *steps, *extra)))
    trainer = Trainer(run, make(run))
    metrics = [trainer.step(trainer.stage.micro_batches(trainer)) for _ in range(2)]
    return [(step["loss"], step["grad_norm"]) for step in metrics], trainer.stage.validate(trainer), trainer.stage


@pytest.mark.parametrize(
    ("stage", "extra"),
    [
        ("sft", ["--micro-batch-size", "2"]),
        ("sft", ["--no-packing", "--max-tokens-per-micro-batch", "96"]),
        ("reward", ["--micro-batch-size", "2"]),
    ],
)
def test_two_steps_are_those_on_the_raw_records(stage, extra, assets):
    expected, valid, _ = train(stage, assets, "jsonl", *extra)
    assert expected[0] != expected[1]
    for form in ("indexed", "arrow"):
        steps, validation, _ = train(stage, assets, form, *extra)
        assert (steps, validation) == (expected, valid)


def test_a_run_goes_on_on_prepared_data_where_it_stopped_on_raw_records(assets):
    *_, raw = train("sft", assets, "jsonl")
    *_, prepared = train("sft", assets, "indexed")
    prepared.load_state_dict(raw.state_dict(), raw.records(None))


def test_prompts_are_read_prepared(assets):
    read = {}
    for ending in ("jsonl", "indexed"):
        chosen = flags(assets, "--prompts", str(assets / f"prompts.{ending}"), "--output", "none", "--hf-model", "none")
        chosen += ["--max-new-tokens", "8"]
        config = load_config("generate", chosen)
        run = open_run(dataclasses.replace(config, model=dataclasses.replace(config.model, hf_model=None)))
        read[ending] = read_prompts(run)
    assert list(read["indexed"]) == read["jsonl"] and isinstance(read["indexed"], PreparedItems)
