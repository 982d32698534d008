"""Real vLLM servers, which the Python of VLLM_PYTHON runs, and their greedy answers over plain HTTP."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

SERVE = Path(__file__).parents[2] / "examples" / "vllm" / "serve.sh"
_START_SECONDS = 900


@contextmanager
def served(model: Path, work: Path, *, tokenizer: Path, dtype: str = "float32", longest: int = 512) -> Iterator[str]:
    """The address of a server, started as examples/vllm says, that ends with the block.

    Args:
        work: where its log goes.
        tokenizer: a folder with tokenizer files, which a folder of weights for engines lacks.
        longest: most tokens of a prompt and its response together.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = work / f"url_{port}"
    settings = {"LOGS": work, "URL_FILE": file, "DTYPE": dtype, "MAX_MODEL_LEN": longest, "VLLM_CPU_KVCACHE_SPACE": 1}
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    script = subprocess.Popen(
        ["bash", SERVE, model, "1", "1", str(port), "--tokenizer", tokenizer],
        env=env | {name: str(value) for name, value in settings.items()},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + _START_SECONDS
        while not file.exists():
            assert script.poll() is None, script.stderr.read()
            assert time.monotonic() < end, f"no server after {_START_SECONDS} s: {work}/vllm-{port}.log"
            time.sleep(0.2)
        yield file.read_text().strip()
    finally:
        script.send_signal(signal.SIGTERM)
        script.communicate(timeout=60)


def greedy_answers(url: str, prompts: Sequence[Sequence[int]], *, eos_id: int, most: int) -> list[list[int]]:
    """The token ids, EOS included, of a greedy answer of at most `most` tokens to each prompt of token ids."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as response:
        model = json.load(response)["data"][0]["id"]

    def ask(prompt: Sequence[int]) -> list[int]:
        body = {"model": model, "prompt": list(prompt), "max_tokens": most, "temperature": 0, "return_token_ids": True}
        body |= {"ignore_eos": True, "stop_token_ids": [eos_id]}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)["choices"][0]["token_ids"]

    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(ask, prompts))
