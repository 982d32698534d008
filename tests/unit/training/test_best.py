"""The best checkpoint of a run: which one it is, that it is saved at its validation, kept, and remembered."""

import json
import logging

import pytest
from helpers.assets import size_flags, write_assets

from megatron_brain.checkpointing import read_info
from megatron_brain.config.loader import load_config
from megatron_brain.config.run import RunConfig
from megatron_brain.errors import AgreedError, ConfigError
from megatron_brain.stages.brain.stage import BrainStage
from megatron_brain.stages.reward.stage import RewardStage
from megatron_brain.stages.sft.stage import SFTStage
from megatron_brain.training.best import BestCheckpoint
from megatron_brain.training.start import open_run
from megatron_brain.training.trainer import Trainer, best_checkpoint

KNOWN = {"loss": "lowest", "accuracy": "highest"}


def seen(metric, *values, best=None):
    """The iteration of the best checkpoint after each of the validations at iterations 0, 10, 20, ..."""
    best = best or BestCheckpoint(metric, KNOWN)
    found = []
    for number, value in enumerate(values):
        best.see(10 * number, {f"validation/{metric}": value})
        found.append(best.iteration)
    return found


def test_lower_or_higher_is_better_as_the_metric_says_and_an_equal_value_is_not():
    assert seen("loss", 9.0, 3.0, 2.0, 2.0, 2.5, 1.0) == [None, 10, 20, 20, 20, 50]
    assert seen("accuracy", 0.1, 0.3, 0.2, 0.3, 0.4) == [None, 10, 10, 10, 40]


def test_the_weights_that_a_run_starts_from_do_not_count():
    assert seen("loss", 0.5, 3.0, 2.0) == [None, 10, 20]


def test_what_is_no_number_is_never_the_best():
    assert seen("loss", 9.0, float("nan"), 3.0, float("nan"), 2.0) == [None, None, 20, 20, 40]


def test_the_prefix_of_the_files_may_be_written_or_not():
    assert BestCheckpoint("validation/loss", KNOWN).metric == BestCheckpoint("loss", KNOWN).metric == "loss"


def test_an_unknown_metric_is_refused_with_those_that_there_are():
    with pytest.raises(
        AgreedError, match=r"keep_best='validation/accurate'.*only loss \(lowest\), accuracy \(highest\)"
    ):
        BestCheckpoint("validation/accurate", KNOWN)


def test_every_stage_that_validates_says_which_values_are_better():
    config = RunConfig(stage="brain")
    config.data.valid_data, config.scoring.reward_load = "v", "r"
    for stage, metric, direction in (
        (SFTStage, "loss", "lowest"),
        (RewardStage, "accuracy", "highest"),
        (BrainStage, "win_rate_reward", "highest"),
        (BrainStage, "kl_to_prior", "lowest"),
    ):
        assert stage.best_metrics(config)[metric] == direction
        assert set(stage.best_metrics(config)) <= {"loss", *stage.metric_names(config)}
    config.checkpoint.keep_best = "validation/win_rate_judge"
    with pytest.raises(AgreedError, match="no metric 'win_rate_judge'"):
        best_checkpoint(config, BrainStage)


def test_a_resumed_comparison_goes_on_and_one_of_another_metric_begins_anew():
    first = BestCheckpoint("loss", KNOWN)
    assert seen("loss", 9.0, 3.0, 2.0, best=first) == [None, 10, 20]
    here, elsewhere, other = (BestCheckpoint(metric, KNOWN) for metric in ("loss", "loss", "accuracy"))
    here.load_state_dict(json.loads(json.dumps(first.state_dict())), same_folder=True)
    elsewhere.load_state_dict(first.state_dict(), same_folder=False)
    other.load_state_dict(first.state_dict(), same_folder=True)
    assert (here.iteration, elsewhere.iteration, other.iteration) == (20, None, None)
    for resumed in (here, elsewhere):
        resumed.see(30, {"validation/loss": 2.5})
        assert resumed.iteration != 30, "2.5 is no better than 2 of before"
        resumed.see(40, {"validation/loss": 1.5})
        assert resumed.iteration == 40
    other.see(30, {"validation/accuracy": 0.0})
    assert other.iteration == 30


LOSSES = {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.2, 5: 1.0, 6: 1.5}
"""The losses of validations, by iteration."""


class Scripted(SFTStage):
    """Validates every step with the losses of a table."""

    def validate(self, trainer):
        return {"loss": LOSSES.get(trainer.iteration, 9.0)}


@pytest.fixture(scope="module")
def assets(single, tmp_path_factory):
    folder = tmp_path_factory.mktemp("best")
    write_assets(folder)
    return folder


def train(assets, save, *flags, last=4, stage=Scripted):
    data = [flag for name in ("train", "valid") for flag in (f"--{name}-data", str(assets / "sft.jsonl"))]
    common = ["--seq-length", "32", "--eval-interval", "1", "--no-progress", "--global-batch-size", "4"]
    model = ["--tokenizer-model", str(assets / "tokenizer"), *size_flags(num_layers=1)]
    keep = ["--save", str(save), "--keep-best", "validation/loss", "--train-iters", str(last), "--lr-decay-iters", "9"]
    run = open_run(load_config("sft", [*data, *common, *model, *keep, *flags]))
    trainer = Trainer(run, stage(run))
    trainer.train()
    return trainer


def names(save):
    return sorted(path.name for path in save.glob("iter_*"))


@pytest.mark.parametrize("extra", [(), ("--async-save",)])
def test_the_best_is_saved_at_its_validation_and_outlives_pruning_and_a_resume(assets, tmp_path, extra):
    save = tmp_path / "run"
    train(assets, save, "--keep-latest", "1", *extra)
    assert names(save) == ["iter_0000002", "iter_0000004"]
    assert read_info(save / "best").iteration == 2 and read_info(save).iteration == 4
    resumed = train(assets, save, "--keep-latest", "1", "--auto-resume", *extra, last=6)
    assert names(save) == ["iter_0000005", "iter_0000006"], "2.0 of iteration 2 was remembered, and 1.0 was better"
    assert read_info(save / "best").iteration == 5
    assert resumed._best.state_dict() == {"metric": "loss", "value": 1.0, "iteration": 5}


def test_a_resumed_run_compares_with_the_best_of_before(assets, tmp_path, monkeypatch):
    monkeypatch.setitem(LOSSES, 5, 2.1)
    monkeypatch.setitem(LOSSES, 6, 2.2)
    save = tmp_path / "run"
    train(assets, save, "--keep-latest", "1")
    resumed = train(assets, save, "--keep-latest", "1", "--auto-resume", last=6)
    assert resumed._best.iteration == 2
    assert names(save) == ["iter_0000002", "iter_0000006"] and read_info(save / "best").iteration == 2


def test_without_keep_best_nothing_else_is_saved(assets, tmp_path):
    train(assets, tmp_path / "run", "--keep-best", "null")
    assert names(tmp_path / "run") == ["iter_0000004"] and not (tmp_path / "run" / "best").exists()


def test_a_folder_in_the_way_of_the_link_is_refused_at_the_start(assets, tmp_path):
    (tmp_path / "best").mkdir()
    with pytest.raises(ConfigError, match="best is no link"):
        train(assets, tmp_path)


class Ending(Scripted):
    """Ends after the validation of iteration 2."""

    def validate(self, trainer):
        self.ended = trainer.iteration >= 2
        return super().validate(trainer)

    def end_reason(self):
        return "it is enough" if getattr(self, "ended", False) else None


def test_a_validation_ends_the_run_with_a_checkpoint_and_says_why(assets, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        ended = train(assets, tmp_path / "run", stage=Ending)
    assert ended.iteration == 2 and read_info(tmp_path / "run").iteration == 2
    assert "ending at iteration 2 of 4: it is enough" in caplog.text
