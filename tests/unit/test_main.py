"""The command line as a user meets it: exit codes, messages and --help."""

import subprocess
import sys

import pytest

from megatron_brain import __main__ as command
from megatron_brain.config.stage_spec import stages


def run(*args):
    return subprocess.run(
        [sys.executable, "-m", "megatron_brain", *args], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("stage", list(stages()))
def test_help_of_every_stage_prints_its_flags_and_exits_0(stage, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main([stage, "--help"])
    assert stopped.value.code == 0
    assert "--seq-length" in capsys.readouterr().out


def test_help_answers_without_loading_torch():
    code = (
        "import sys; sys.argv[1:] = ['brain', '--help']\n"
        "import runpy\n"
        "try: runpy.run_module('megatron_brain', run_name='__main__')\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "--reward-temperature" in result.stdout


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_without_a_stage_lists_the_stages(flag, capsys):
    assert command.main([flag]) == 0
    shown = capsys.readouterr()
    assert all(f"\n  {stage} " in shown.out for stage in stages())
    assert not shown.err


def test_an_unknown_or_missing_stage_is_a_user_error_that_lists_the_stages(capsys):
    assert command.main(["sfd", "--config", "x.yaml"]) == 2
    shown = capsys.readouterr()
    assert "unknown stage 'sfd'" in shown.err and "brain" in shown.err
    assert not shown.out
    assert command.main([]) == 2
    assert "usage:" in capsys.readouterr().err


def test_a_user_error_ends_the_process_with_2_and_one_message_on_stderr():
    result = run("sft", "--micro-batch-sise", "3")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "micro_batch_size" in result.stderr
    assert "Traceback" not in result.stderr and not result.stdout


@pytest.mark.parametrize(
    ("started", "message"), [(False, ""), (True, "rank 1: error: micro_batch_sise='3' (command line): unknown key")]
)
def test_a_mistake_all_ranks_make_is_reported_once_and_later_ones_by_every_rank(monkeypatch, capsys, started, message):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: started)
    assert command.main(["sft", "--micro-batch-sise", "3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and bool(error) == started


def test_a_value_error_that_nobody_raised_on_purpose_is_not_taken_for_a_users_mistake(monkeypatch):
    monkeypatch.setattr("megatron_brain.config.loader.load_config", lambda stage, flags: int("not a number"))
    with pytest.raises(ValueError, match="invalid literal"):
        command.main(["sft"])


def test_a_user_error_of_any_kind_is_reported(monkeypatch, capsys):
    from megatron_brain.data.groups import Group

    monkeypatch.setattr(
        "megatron_brain.config.loader.load_config",
        lambda stage, flags: Group(prompt=(), responses=((1,),), record_id="a.jsonl:7"),
    )
    assert command.main(["sft"]) == 2
    assert capsys.readouterr().err == "error: a.jsonl:7: the prompt has no tokens\n"
