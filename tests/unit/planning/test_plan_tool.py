"""tools/plan.py end to end."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_brain.commands import plan as plan_tool

ROOT = Path(__file__).parents[3]
EXAMPLE = (
    "--model llama3-70b --gpus 64 --gpu h100 --stage brain --samples-per-prompt 16 --prompt-length 512 "
    "--response-length 128"
)


@pytest.fixture
def run(capsys):
    """Runs the tool in this process; gives status, standard output and standard error."""

    def call(flags):
        status = plan_tool.main(flags.split())
        return status, *capsys.readouterr()

    return call


def seconds_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_example_of_the_docs_shows_plans_reasons_and_flags(tmp_path):
    before = seconds_of_children()
    command = [sys.executable, "tools/plan.py", *EXAMPLE.split(), "--json", str(tmp_path / "plan.json")]
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}
    )
    assert found.returncode == 0, found.stderr
    # Seconds of the processor, so that a busy machine does not fail it.
    assert seconds_of_children() - before < 10
    for heading in ("compute", "TP comm", "bubble", "sampling", "scoring", "KV cache", "frozen", "tokens/s/GPU"):
        assert heading in found.stdout
    assert "does not divide num_layers=80" in found.stdout
    report = json.loads((tmp_path / "plan.json").read_text())
    assert f"{report['layouts'][0]['tokens_per_second_per_gpu']:,.0f}" in found.stdout
    assert found.stdout.splitlines()[-1].split() == report["layouts"][0]["flags"]


def test_json_alone_and_flags_alone(run):
    small = "--model llama3.2-1b --gpus 2 --stage sft --prompt-length 100 --response-length 28 --global-batch-size 8"
    report = json.loads(run(f"{small} --json -")[1])
    assert report["question"]["model"] == "llama3.2-1b"
    assert run(f"{small} --print-flags")[1].split() == report["layouts"][0]["flags"]
    with pytest.raises(SystemExit, match="2"):
        run(f"{small} --json - --print-flags")


def test_servers_have_a_table_of_their_own(run):
    small = "--model llama3.2-1b --gpus 2 --stage brain --prompt-length 100 --response-length 28 --global-batch-size 8"
    _, shown, _ = run(f"{small} --engine-gpus auto --rounds-ahead 1 --storage-bandwidth 1")
    for heading in ("Servers; seconds of a round", "score + train", "sync: write", "as fast as training"):
        assert heading in shown
    assert "--engine vllm" in shown.splitlines()[-1]
    assert "Servers" not in run(small)[1]


def test_a_directory_of_a_hugging_face_model(tmp_path, run):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 256,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, shown, _ = run(f"--model {tmp_path} --gpus 2 --stage reward --prompt-length 100 --response-length 28")
    assert status == 0
    assert "layouts fit" in shown


@pytest.mark.parametrize(
    ("flags", "expected", "message"),
    [
        ("--model llama3-7b --gpus 8", 2, "did you mean 'llama3-70b' or 'llama3-8b'"),
        ("--model llama3-70b --gpus 1", 1, "no layout fits"),
        ("--model llama3-8b --gpus 8 --reserved-memory -60", 2, "no more memory than it has"),
        ("--model llama3-8b --gpus 8 --storage-bandwidth 0", 2, "0 is not above 0"),
        ("--model llama3-8b --gpus 8 --json /no/such/folder/plan.json", 2, "/no/such/folder/plan.json"),
    ],
)
def test_mistakes_are_named(flags, expected, message, run, capsys):
    try:
        status, _, errors = run(f"{flags} --stage sft --prompt-length 100 --response-length 100")
    except SystemExit as exit:
        status, errors = exit.code, capsys.readouterr().err
    assert status == expected
    assert message in errors
