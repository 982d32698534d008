"""When the loop stops early, what it still does, and what signals do to the process meanwhile."""

import os
import signal
import time
from types import SimpleNamespace

import pytest

from megatron_brain.config.training import CheckpointConfig, TrainingConfig
from megatron_brain.generation.engine import Interrupted
from megatron_brain.runtime import signals
from megatron_brain.training import trainer
from megatron_brain.training.trainer import Trainer


class Loop(Trainer):
    """The loop alone, noting what it does; `during` is called within a step."""

    def __init__(
        self, single, *, save="runs", iteration=0, validated_at=None, during=lambda iteration: None, **training
    ):
        self.config = SimpleNamespace(
            training=TrainingConfig(eval_interval=2, **training), checkpoint=CheckpointConfig(save=save)
        )
        self.parallel, self.stage, self.iteration = (
            single,
            SimpleNamespace(train_iters=6, end_reason=lambda: None),
            iteration,
        )
        self._validated_at, self._saver, self._best = validated_at, None, None
        self.done, self._during = [], during

    def _logged_step(self):
        self.iteration += 1
        self._during(self.iteration)
        self.done.append("step")
        return {}

    def _validate(self):
        self._validated_at = self.iteration
        self.done.append("validate")
        return {}

    def save(self):
        self.done.append("save")

    def finish_saving(self):
        pass


def interrupt(*numbers, at):
    """Signal this process within the step."""

    def during(iteration):
        if iteration == at:
            for number in numbers:
                os.kill(os.getpid(), number)

    return during


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_the_current_step_with_one_save_and_no_validation(single, number, caplog):
    loop = Loop(single, during=interrupt(number, number, signal.SIGTERM, at=2))
    with signals.noted():
        loop._train()
    assert loop.done == ["validate", "step", "step", "save"]
    assert f"stopping at iteration 2: {number.name} (rank 0)" in caplog.text
    assert "nothing is saved" not in caplog.text


def test_a_resumed_run_makes_up_for_the_validation_that_was_left_out_and_for_no_other(single):
    late = Loop(single, iteration=4, validated_at=2)
    late._train()
    assert late.done == ["validate", "step", "step", "validate", "save"]
    timely = Loop(single, iteration=4, validated_at=4)
    timely._train()
    assert timely.done == ["step", "step", "validate", "save"]
    ended = Loop(single, iteration=6, validated_at=6)
    ended._train()
    assert ended.done == []


def test_a_save_that_failed_in_the_background_ends_the_run_after_the_step(single):
    class Failed:
        failed = True

    class EndedError(Exception):
        pass

    loop = Loop(single, validated_at=0)
    loop._saver = Failed()

    def raise_its_error():
        raise EndedError

    loop.finish_saving = raise_its_error
    with pytest.raises(EndedError):
        loop._train()
    assert loop.done == []


def test_a_signal_during_a_validation_ends_the_run_before_another_step(single):
    class Interrupted(Loop):
        def _validate(self):
            if self.iteration == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super()._validate()

    loop = Interrupted(single, validated_at=0)
    with signals.noted():
        loop._train()
    assert loop.done == ["step", "step", "validate", "save"]


@pytest.mark.parametrize(("last", "done"), [(6, ["step", "step", "save"]), (2, ["step", "step", "save"])])
def test_a_validation_that_a_signal_cuts_short_is_made_by_the_run_that_goes_on(single, last, done):
    class Cut(Loop):
        _validate = Trainer._validate

    def validate(trainer):
        os.kill(os.getpid(), signal.SIGTERM)
        raise Interrupted

    loop = Cut(single, validated_at=0)
    loop.stage = SimpleNamespace(train_iters=last, end_reason=lambda: None, validate=validate)
    with signals.noted():
        loop._train()
    assert (loop.done, loop._validated_at) == (done, 0)
    resumed = Loop(single, iteration=2, validated_at=loop._validated_at)
    resumed._train()
    assert resumed.done[0] == "validate"


def test_a_step_that_stops_the_run_lets_a_save_in_the_background_end_first(single):
    def fail(iteration):
        raise FloatingPointError("loss nan")

    loop = Loop(single, validated_at=0, during=fail)
    loop.logger = SimpleNamespace(close=lambda: loop.done.append("close"))
    loop.finish_saving = lambda: loop.done.append("finish saving")
    with pytest.raises(FloatingPointError, match="loss nan"):
        loop.train()
    assert loop.done == ["finish saving", "close"]


def test_a_signal_before_the_loop_ends_the_run_before_its_first_step_and_saves_nothing_new(single):
    loop = Loop(single, iteration=0)
    with signals.noted():
        os.kill(os.getpid(), signal.SIGUSR1)
        loop._train()
    assert loop.done == []


def test_the_last_step_is_followed_by_its_validation_whatever_was_asked(single):
    loop = Loop(single, iteration=5, during=interrupt(signal.SIGTERM, at=6))
    with signals.noted():
        loop._train()
    assert loop.done == ["step", "validate", "save"]


def test_a_run_without_a_folder_says_that_nothing_is_saved(single, caplog):
    with signals.noted():
        Loop(single, save=None, during=interrupt(signal.SIGTERM, at=1))._train()
    assert "nothing is saved: --save is not set" in caplog.text


def test_the_time_limit_counts_from_the_start_of_the_process(single, monkeypatch, caplog):
    def started(seconds_ago):
        monkeypatch.setattr(signals, "_started", time.monotonic() - seconds_ago)

    started(seconds_ago=30)
    loop = Loop(
        single,
        iteration=2,
        validated_at=2,
        during=lambda i: i == 4 and started(seconds_ago=61),
        exit_duration_in_mins=1.0,
    )
    loop._train()
    assert loop.done == ["step", "step", "save"]
    assert "stopping at iteration 4: --exit-duration-in-mins 1 is over (rank 0)" in caplog.text


def test_handlers_are_put_back_after_training():
    before = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    with pytest.raises(RuntimeError), signals.noted():
        assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] != before
        raise RuntimeError
    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == before


def test_a_signal_of_an_earlier_run_in_the_process_does_not_stop_the_next():
    with signals.noted():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received() is signal.SIGTERM
    with signals.noted():
        assert signals.received() is None


def test_a_run_that_is_asked_to_stop_while_it_waits_for_servers_ends_as_one_that_stopped(monkeypatch, caplog):
    def make_stage(run):
        raise Interrupted("SIGTERM (rank 0) while waiting for the vLLM servers")

    monkeypatch.setattr(trainer, "check_metrics", lambda config, stage: None)
    trainer.train(SimpleNamespace(config=None), make_stage)
    assert "stopped before the first step: SIGTERM (rank 0) while waiting for the vLLM servers" in caplog.text
