"""examples/vllm/serve.sh with a stand-in for vLLM: all servers start together, answer, and end together."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from helpers.stand_in_vllm import is_alive, kill_servers, pids, two_free_ports, wait_until, write_stand_in

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "vllm" / "serve.sh"


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Starts the script; what is left of it after a test is killed."""
    model, python = write_stand_in(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    settings = {"VLLM_PYTHON": str(python), "LOGS": str(tmp_path), "URL_FILE": str(tmp_path / "url")}
    started = []

    def start(*args, **env):
        command = ["bash", str(SCRIPT), str(model), *map(str, args)]
        process = subprocess.Popen(
            command, env=os.environ | settings | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
    kill_servers(tmp_path)


def test_servers_answer_and_end_with_the_script(serve, tmp_path):
    port = two_free_ports()
    process = serve(2, 1, port, "--max-num-seqs", 7, MAX_MODEL_LEN="64", SEED="5")
    wait_until((tmp_path / "url").exists)
    url = f"http://127.0.0.1:{port},http://127.0.0.1:{port + 1}"
    assert (tmp_path / "url").read_text() == f"{url}\n"
    second = json.loads((tmp_path / f"{port + 1}.json").read_text())
    argv = " ".join(second["argv"])
    for flags in ("--logprobs-mode processed_logprobs", "--generation-config vllm", "--max-model-len 64", "--seed 6"):
        assert flags in argv
    assert argv.endswith("--max-num-seqs 7") and second["dev"] == "1"
    process.send_signal(signal.SIGTERM)
    shown, errors = process.communicate(timeout=20)
    assert (process.returncode, shown) == (0, f"{url}\n"), errors
    assert len(pids(tmp_path)) == 4 and not any(map(is_alive, pids(tmp_path)))
    assert not (tmp_path / "url").exists()


def test_a_server_that_dies_ends_the_others(serve, tmp_path):
    port = two_free_ports()
    process = serve(2, 1, port)
    wait_until((tmp_path / "url").exists)
    os.kill(json.loads((tmp_path / f"{port}.json").read_text())["pids"][0], signal.SIGKILL)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1 and f"the server at http://127.0.0.1:{port} has ended" in errors
    assert not any(map(is_alive, pids(tmp_path)))


def test_a_server_that_cannot_start_is_told_with_its_last_words(serve, tmp_path):
    process = serve(2, 1, two_free_ports(), "--broken")
    shown, errors = process.communicate(timeout=20)
    assert (process.returncode, shown) == (1, "") and "there is no room for the weights" in errors
    assert not any(map(is_alive, pids(tmp_path))) and not (tmp_path / "url").exists()


def test_servers_that_do_not_answer_in_time_are_ended(serve, tmp_path):
    process = serve(1, 1, two_free_ports(), ENGINE_HOST="127.0.0.2", START_SECONDS="0")  # it listens elsewhere
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1 and "no answer from http://127.0.0.2" in errors
    assert not any(map(is_alive, pids(tmp_path)))


def test_each_server_gets_its_own_gpus(serve, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nseq 0 7\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    port = two_free_ports()
    process = serve(2, 2, port, ENGINE_GPUS="4,5,6,7")
    wait_until((tmp_path / "url").exists)
    process.terminate()
    process.wait(timeout=20)
    assert [json.loads((tmp_path / f"{port + i}.json").read_text())["gpus"] for i in range(2)] == ["4,5", "6,7"]
    refused = serve(5, 2, port)
    _, errors = refused.communicate(timeout=20)
    assert refused.returncode == 2 and "5 servers of 2 GPUs need 10, and there are 8" in errors


def test_a_tied_model_is_refused_with_the_cure(serve, tmp_path):
    (tmp_path / "model" / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    process = serve()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 2 and "--untie" in errors
