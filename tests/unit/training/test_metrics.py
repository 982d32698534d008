"""metrics.jsonl and the event file hold every iteration once, whatever interrupts the run."""

import io
import json
import logging
import math

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from megatron_brain.errors import AgreedError
from megatron_brain.runtime import quiet
from megatron_brain.training import progress
from megatron_brain.training.metrics import MetricsLogger
from megatron_brain.training.progress import shown_metrics


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch):
    """Event files are read in the order of their names, which end in a count over the process: of two made within a
    second, number 10 would come before number 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def make_logger(directory, *, resume_step=None, terminal=False, **options):
    """(logger, buffer of what it shows)."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=120)
    settings = {"total_steps": 10, "shown": ("loss",), "is_writer": True, "progress": True, "log_interval": 1} | options
    folder = None if directory is None else str(directory)
    return MetricsLogger(folder, resume_step=resume_step, console=console, **settings), shown


def log_losses(directory, steps, resume_step=None):
    logger, _ = make_logger(directory, resume_step=resume_step)
    for step in steps:
        logger.log(step, {"loss": 100.0 * (resume_step or 0) + step})
    logger.close()


def lines(directory, name="metrics.jsonl"):
    """Records of metrics.jsonl, parsed as strict JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (directory / name).read_text().splitlines()]


def events(directory):
    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return accumulator


def test_metrics_are_read_back_from_both_files(tmp_path):
    logger, _ = make_logger(tmp_path)
    logger.log(1, {"loss": 2.5, "lr": 1e-5, "validation/loss": 3.0, "records": 7})
    logger.log(2, {"loss": torch.tensor(2.25)})
    logger.close()
    assert lines(tmp_path) == [
        {"iteration": 1, "loss": 2.5, "lr": 1e-5, "validation/loss": 3.0, "records": 7},
        {"iteration": 2, "loss": 2.25},
    ]
    assert next(iter(lines(tmp_path)[0])) == "iteration"
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("loss")] == [(1, 2.5), (2, 2.25)]
    assert events(tmp_path).Scalars("validation/loss")[0].value == 3.0


def test_not_a_number_and_infinity_are_texts_float_reads(tmp_path):
    logger, _ = make_logger(tmp_path)
    logger.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    logger.close()
    (record,) = lines(tmp_path)
    assert record == {"iteration": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    assert math.isnan(float(record["a"])) and float(record["c"]) == -math.inf


def test_two_calls_of_one_iteration_make_one_line(tmp_path):
    logger, _ = make_logger(tmp_path)
    logger.log(1, {"loss": 1.0})
    logger.log(2, {"loss": 2.0, "lr": 0.5})
    logger.log(2, {"validation/loss": 3.0})
    logger.log(3, {"loss": 4.0})
    logger.close()
    assert lines(tmp_path)[1:] == [
        {"iteration": 2, "loss": 2.0, "lr": 0.5, "validation/loss": 3.0},
        {"iteration": 3, "loss": 4.0},
    ]


def test_each_line_is_on_disk_before_the_next_step(tmp_path):
    logger, _ = make_logger(tmp_path)
    logger.log(1, {"loss": 1.0})
    assert lines(tmp_path) == [{"iteration": 1, "loss": 1.0}]
    logger.close()


def test_a_resumed_run_replaces_the_iterations_it_runs_again(tmp_path):
    log_losses(tmp_path, [1, 2, 3, 4, 5])
    log_losses(tmp_path, [4, 5, 6], resume_step=3)
    assert [(record["iteration"], record["loss"]) for record in lines(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 304.0),
        (5, 305.0),
        (6, 306.0),
    ]
    scalars = [(event.step, event.value) for event in events(tmp_path).Scalars("loss")]
    assert scalars == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 304.0), (5, 305.0), (6, 306.0)]


@pytest.mark.parametrize("torn", ['{"iteration": 3, "lo', '{"iteration": 2, "loss": 2.0}'])
def test_a_line_torn_by_a_crash_is_dropped_on_resume(tmp_path, torn):
    log_losses(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)
    log_losses(tmp_path, [3], resume_step=2)
    assert [record["iteration"] for record in lines(tmp_path)] == [1, 2, 3]


def test_validation_after_a_resume_merges_into_the_line_of_its_iteration(tmp_path):
    log_losses(tmp_path, [1, 2])
    logger, _ = make_logger(tmp_path, resume_step=2)
    logger.log(2, {"validation/loss": 9.0})
    logger.close()
    assert lines(tmp_path)[-1] == {"iteration": 2, "loss": 2.0, "validation/loss": 9.0}


def test_a_new_run_in_an_old_folder_keeps_the_old_metrics_under_another_name(tmp_path):
    log_losses(tmp_path, [0, 1, 2])
    log_losses(tmp_path, [0, 1])
    log_losses(tmp_path, [0])
    assert [len(lines(tmp_path, name)) for name in ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl")] == [3, 2, 1]
    assert [event.step for event in events(tmp_path).Scalars("loss")] == [0]


def test_texts_and_the_configuration_reach_tensorboard(tmp_path):
    logger, _ = make_logger(tmp_path, resume_step=4)
    logger.log_config("lr: 1e-5")
    logger.log_text(5, "samples", "prompt -> answer")
    logger.close()
    read = events(tmp_path)
    texts = {tag: read.Tensors(tag)[0] for tag in read.Tags()["tensors"]}
    assert {tag: event.step for tag, event in texts.items()} == {"config/text_summary": 4, "samples/text_summary": 5}
    assert b"lr: 1e-5" in texts["config/text_summary"].tensor_proto.string_val[0]
    assert texts["samples/text_summary"].tensor_proto.string_val[0] == b"prompt -> answer"


def test_other_ranks_touch_no_file_and_print_nothing(tmp_path):
    logger, shown = make_logger(tmp_path / "never", is_writer=False)
    logger.log(1, {"loss": 1.0})
    logger.log_text(1, "samples", "x")
    logger.log_config("x")
    logger.close()
    assert not (tmp_path / "never").exists() and shown.getvalue() == ""


def test_without_a_folder_progress_is_shown_and_nothing_written():
    logger, shown = make_logger(None)
    logger.log(1, {"loss": 1.0})
    logger.log_text(1, "samples", "x")
    logger.close()
    assert shown.getvalue().startswith("iteration  1/10 | loss 1.000 | ")


def test_plain_lines_come_every_log_interval_with_validation_and_the_last_step():
    logger, shown = make_logger(None, log_interval=4)
    for step in range(1, 11):
        logger.log(step, {"loss": float(step)})
    logger.log(5 + 5, {"validation/loss": 1.5})
    logger.close()
    steps = [line.split()[1] for line in shown.getvalue().splitlines()]
    assert steps == ["4/10", "8/10", "10/10", "10/10"]
    assert shown.getvalue().endswith("iteration 10/10 | validation/loss 1.500\n")


def test_a_line_has_the_chosen_metrics_in_their_order_and_the_files_have_all(tmp_path):
    logger, shown = make_logger(tmp_path, shown=("reward_mean", "round", "absent", "loss", "tokens_per_second"))
    step = {"loss": 1.0, "lr": 0.5, "round": 0, "reward_mean": -0.25, "tokens_per_second": 12345.6}
    validation = {"validation/loss": 3.0, "validation/accuracy": 0.5}
    logger.log(1, step)
    logger.log(1, validation)
    logger.close()
    first, second = shown.getvalue().splitlines()
    assert (
        first.rpartition(" | ")[0] == "iteration  1/10 | reward_mean -0.2500 | round 0 | loss 1.000 | 12,346 tokens/s"
    )
    assert second == "iteration  1/10 | validation/loss 3.000"
    assert lines(tmp_path) == [{"iteration": 1, **step, **validation}]
    assert set(events(tmp_path).Tags()["scalars"]) == {*step, *validation}


def test_a_line_without_any_of_the_chosen_metrics_is_left_out():
    for terminal in (False, True):
        logger, shown = make_logger(None, shown=("accuracy",), terminal=terminal)
        logger.log(1, {"loss": 1.0, "validation/loss": 1.0})
        logger.close()
        assert "loss" not in shown.getvalue() and "iteration" not in shown.getvalue()


def test_log_metrics_chooses_by_name_or_all_and_refuses_what_no_step_has():
    usual, known = ("loss",), ("loss", "grad_norm", "lr")
    assert shown_metrics(None, usual, known) == ("loss",)
    assert shown_metrics("lr, loss", usual, known) == ["lr", "loss"]
    assert shown_metrics("all", usual, known) == known
    assert shown_metrics("validation/loss,lr", usual, known) == ["loss", "lr"]
    for wrong, name in {"loss,grad_nrom": "grad_nrom", "loss,": "", "lr,all": "all"}.items():
        with pytest.raises(AgreedError, match=f"no metric '{name}', only loss, grad_norm, lr; 'all' shows all"):
            shown_metrics(wrong, usual, known)


def test_time_left_is_the_mean_step_time_since_the_resume_times_the_steps_left(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    logger, shown = make_logger(None, resume_step=4, total_steps=1004)
    logger.log(4, {"loss": 1.0})
    clock[0] += 50.0
    logger.log(9, {"loss": 1.0})
    logger.close()
    first, second = shown.getvalue().splitlines()
    assert first.endswith(" | -:--:-- left")
    assert second.endswith(" | 2:45:50 left")  # 995 steps of 10 s


def test_a_terminal_gets_one_live_line_and_validation_above_it():
    logger, shown = make_logger(None, terminal=True, shown=("loss", "lr"))
    logger.log(3, {"loss": 1.5, "lr": 1e-5, "response_length": 12.0})
    logger.log(3, {"validation/loss": 2.5})
    logger.close()
    text = shown.getvalue()
    assert "3/10" in text and "loss 1.500 | lr 1.000e-05 | " in text and "response_length" not in text
    assert "iteration 3 | validation/loss 2.500" in text
    assert "iteration  3/10" not in text


def test_a_live_line_is_not_torn_by_the_log(monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    quiet.set_up_console()
    logger, shown = make_logger(None, terminal=True)
    logging.getLogger("megatron_brain").warning("a message")
    logger.close()
    assert "WARNING megatron_brain: a message\n" in shown.getvalue() and not capsys.readouterr().err


def test_progress_off_gives_plain_lines_on_a_terminal():
    logger, shown = make_logger(None, terminal=True, progress=False)
    logger.log(1, {"loss": 1.0})
    assert shown.getvalue().startswith("iteration  1/10 | loss 1.000 |")


def test_a_step_back_in_time_and_a_metric_called_iteration_are_errors(tmp_path):
    logger, _ = make_logger(tmp_path)
    logger.log(2, {"loss": 1.0})
    with pytest.raises(AssertionError, match="iteration 1 is logged after iteration 2"):
        logger.log(1, {"loss": 1.0})
    with pytest.raises(AssertionError, match="iteration"):
        logger.log(3, {"iteration": 3})
    logger.close()
    logger.close()
