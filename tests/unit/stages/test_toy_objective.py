"""An objective that one file defines and one line registers works wherever those of the package do."""

import json
import random

import pytest
import torch
from distributed.matrix import drifted_rollouts
from helpers.assets import size_flags, write_assets
from helpers.toy_objective import Toy

from megatron_brain.__main__ import main
from megatron_brain.config.loader import load_config
from megatron_brain.config.objectives import OBJECTIVE_TRAITS
from megatron_brain.errors import ConfigError
from megatron_brain.objectives.registry import OBJECTIVES
from megatron_brain.stages.brain.objectives import register_objective
from megatron_brain.stages.brain.stage import BrainStage
from megatron_brain.stages.sft.stage import SFTStage
from megatron_brain.training.start import open_run
from megatron_brain.training.trainer import Trainer

COMMON = ["--train-iters", "2", "--seq-length", "64", "--global-batch-size", "4", "--lr", "1e-3", "--no-progress"]
SAMPLED = ["--train-data", "t", "--load", "c", "--finetune", "--reward-load", "r"]


@pytest.fixture
def toy():
    """Registered for one test."""
    register_objective("toy", Toy)
    yield
    del OBJECTIVES["toy"], OBJECTIVE_TRAITS["toy"]


@pytest.fixture(scope="module")
def folder(single, tmp_path_factory):
    """A policy of random weights, and groups of 2 to 4 responses whose log q' nobody knows."""
    folder = tmp_path_factory.mktemp("toy")
    write_assets(folder)
    data = ["--train-data", str(folder / "sft.jsonl"), "--tokenizer-model", str(folder / "tokenizer")]
    run = open_run(load_config("sft", [*COMMON, *data, *size_flags(num_layers=1), "--save", str(folder / "policy")]))
    Trainer(run, SFTStage(run)).save()
    records = drifted_rollouts(random.Random(5), groups=8, sizes=(2, 3, 4), longest=8)
    for response in (response for record in records for response in record["responses"]):
        del response["log_proposal"]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def trainer(folder, *flags):
    data = ["--load", str(folder / "policy"), "--rollout-data", str(folder / "rollouts.jsonl"), *flags]
    run = open_run(load_config("brain", [*COMMON, "--objective", "toy", *data]))
    return Trainer(run, BrainStage(run))


def steps(made, number=2):
    """Metrics of steps, and the weights after them."""
    metrics = [made.step(made.stage.micro_batches(made)) for _ in range(number)]
    return metrics, torch.cat([weight.flatten() for chunk in made.gathered_chunks() for weight in chunk.parameters()])


def test_two_passes_train_it_as_one_does_also_where_groups_are_cut(toy, folder):
    one, expected = steps(trainer(folder, "--finetune", "--micro-batch-size", "2"))
    assert one[0]["loss"] != one[1]["loss"] and set(Toy.mean_metrics + Toy.max_metrics) < set(one[0])
    for flags in (["--micro-batch-size", "4"], ["--micro-batch-size", "1", "--max-tokens-per-micro-batch", "30"]):
        two, weights = steps(trainer(folder, "--finetune", "--two-pass", *flags))
        for name in ("loss", "grad_norm", *Toy.mean_metrics, *Toy.max_metrics):
            assert [step[name] for step in two] == pytest.approx([step[name] for step in one], rel=1e-5), name
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


def test_a_run_resumes_in_the_middle_of_its_round(toy, folder, tmp_path):
    first = trainer(folder, "--finetune", "--save", str(tmp_path))
    steps(first, 1)
    first.save()
    [expected], _ = steps(first, 1)
    [found], _ = steps(trainer(folder, "--load", str(tmp_path)), 1)
    assert (found["loss"], found["grad_norm"]) == (expected["loss"], expected["grad_norm"])


def test_help_and_errors_name_it_as_long_as_it_is_registered(toy, capsys):
    with pytest.raises(SystemExit):
        main(["brain", "--help"])
    assert "rloo,grpo,toy}" in "".join(capsys.readouterr().out.split())
    with pytest.raises(ConfigError, match="objective='tooy' .*did you mean 'toy'"):
        load_config("brain", [*SAMPLED, "--objective", "tooy"])


def test_an_objective_that_is_not_registered_is_unknown():
    with pytest.raises(ConfigError, match="objective='toy' .command line.: expected one of brain, dpo"):
        load_config("brain", [*SAMPLED, "--objective", "toy"])


def test_the_checks_follow_from_its_class(toy):
    # It uses no log q', so that accepted responses will do, and no strength.
    load_config("brain", [*SAMPLED, "--objective", "toy", "--responses", "rso", "--no-refresh-proposal"])
    with pytest.raises(ConfigError, match="policy_strength=0.5 is not read by --objective toy: leave it out, or use"):
        load_config("brain", [*SAMPLED, "--objective", "toy", "--policy-strength", "0.5"])


def test_a_name_is_registered_once_and_constructors_take_settings_that_exist(toy):
    with pytest.raises(AssertionError, match="two objectives called dpo"):
        register_objective("dpo", Toy)

    class Stranger(Toy):
        def __init__(self, *, no_such_setting: float) -> None:
            pass

    with pytest.raises(AssertionError, match=r"Stranger takes \['no_such_setting'\], which are no settings of"):
        register_objective("stranger", Stranger)
    assert "stranger" not in OBJECTIVES
