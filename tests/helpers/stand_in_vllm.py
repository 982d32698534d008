"""A program that takes the place of vLLM's Python in tests of scripts: it answers as a healthy server does, and draws
nothing."""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

_SERVER = """#!{python}
import http.server, os, subprocess, sys, json
if sys.argv[1] == "-c":  # a question about the environment
    sys.exit(0)
port = int(sys.argv[sys.argv.index("--port") + 1])
worker = subprocess.Popen(["sleep", "300"])
told = dict(pids=[os.getpid(), worker.pid], argv=sys.argv[1:], gpus=os.environ.get("CUDA_VISIBLE_DEVICES"),
            dev=os.environ.get("VLLM_SERVER_DEV_MODE"))
open(f"{folder}/{{port}}.json", "w").write(json.dumps(told))
if "--broken" in sys.argv and port % 2:
    sys.exit("there is no room for the weights")
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


def write_stand_in(folder: Path) -> tuple[Path, Path]:
    """An untied model that has no weights, and the program.

    Each server writes `PORT.json` into the folder: the process ids of itself and of its worker, and what it was told.
    """
    model, program = folder / "model", folder / "vllm_python"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    program.write_text(_SERVER.format(python=sys.executable, folder=folder))
    program.chmod(0o755)
    return model, program


def kill_servers(folder: Path) -> None:
    """Kill what is left of servers that wrote into the folder."""
    for pid in filter(is_alive, pids(folder)):
        os.kill(pid, signal.SIGKILL)


def two_free_ports() -> int:
    """The first, which is even, of two free ports beside each other."""
    for port in range(20000 + os.getpid() % 5000 * 2, 40000, 2):
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", port))
                other.bind(("127.0.0.1", port + 1))
                return port
            except OSError:
                continue
    raise AssertionError("no free ports")


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until something is true, or fail."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def pids(folder: Path) -> list[int]:
    """Process ids of all servers that wrote into the folder, and of their workers."""
    return [pid for file in folder.glob("*.json") for pid in json.loads(file.read_text())["pids"]]


def is_alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
