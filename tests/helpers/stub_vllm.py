"""A server that speaks vLLM's HTTP and draws with our own sampler, so its tokens are those of the native engine.

Paths, bodies and statuses are those of vLLM 0.32; tests/end_to_end/test_vllm_stub.py compares them. As a process:

    python -m helpers.stub_vllm --model HF_DIR --port PORT      # prints `ready`

`POST /misbehave {"kind": value}` of its own sets one of KINDS.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from typing import Any
from urllib.parse import parse_qs, urlsplit

from helpers.stub_models import NumberModel, PolicyOfFolder, StubModel

KINDS = {
    "status": "answer completions with this status, 500 for one",
    "hang": "never answer completions",
    "fail_once": "answer one completion with status 500",
    "slow": "take so many seconds for each completion",
    "slow_pause": "take so many seconds for a pause",
    "die_after": "end the process after so many completions",
    "restart_after": "forget all that was given after so many completions, as a restarted process does",
    "restart_at_resume": "forget all that was given when it is to go on, once",
    "fewer": "end a response after its first token, with finish_reason length",
    "shift": "answer with token ids that are larger by this",
    "other_prompt": "say that the prompt was another one",
    "keep_reset": "say that the prefix cache was not reset",
    "keep_weights": "keep the weights on reload, and say that it worked",
    "raw": "give log-probabilities of before temperature",
    "no_labels": "know no labels of weights, as older versions",
}
_DEV = {
    *("/pause", "/resume", "/is_paused", "/reset_prefix_cache", "/collective_rpc"),
    *("/update_weight_version", "/weight_info"),
}
"""The paths that only VLLM_SERVER_DEV_MODE has."""


@dataclass
class _Request:
    body: dict[str, Any]
    done: threading.Event = field(default_factory=threading.Event)
    answer: dict[str, Any] | Exception | None = None


class StubServer:
    """The server; it serves in threads of this process until `close`.

    Args:
        model: what draws.
        folder: the weights that it starts with.
        dev_mode: whether it has the paths of VLLM_SERVER_DEV_MODE.
        longest: its --max-model-len.
    """

    def __init__(
        self, model: StubModel, folder: Path, *, port: int = 0, dev_mode: bool = True, longest: int = 64
    ) -> None:
        self.model, self.folder, self.dev_mode, self.longest, self.name = model, folder, dev_mode, longest, "stub"
        self.kinds: dict[str, Any] = {}
        self.seen: list[dict[str, Any]] = []
        """The bodies of all completions that were asked for."""
        self.calls: list[str] = []
        """The paths of all requests."""
        self.pauses = 0
        self._queue: Queue[_Request | None] = Queue()
        self._lock = threading.RLock()
        self.running = threading.Event()
        self.begin_anew()
        self._listen(port)
        threading.Thread(target=self._draw, daemon=True).start()

    def begin_anew(self) -> None:
        """Forget all that was given, as a new process would."""
        with self._lock:
            self.model.load(self.folder)
            self.start_time = time.time()
            self.label = "default"
            self.running.set()
            self.answered = 0

    def _listen(self, port: int) -> None:
        self.connections: set[socket.socket] = set()
        self.http = _HttpServer(("127.0.0.1", port), type("Handler", (_Handler,), {"stub": self}))
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def kill(self) -> None:
        """Be gone, as a killed process is: connections end without an answer, and new ones are refused."""
        self.http.shutdown()
        self.http.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # The client may have closed it.
                connection.shutdown(socket.SHUT_RDWR)

    def start_again(self) -> None:
        """Be there again after `kill`, as a new process at the same address."""
        self.begin_anew()
        self._listen(self.port)

    def close(self) -> None:
        self._queue.put(None)
        self.kill()

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(body)
        while "hang" in self.kinds:
            time.sleep(0.05)
        if "status" in self.kinds or self.kinds.pop("fail_once", False):
            raise _RefusedError(self.kinds.get("status", 500), "it was told to")
        self.running.wait()
        pauses = self.pauses
        time.sleep(self.kinds.get("slow", 0))
        if len(body["prompt"]) >= self.longest:
            raise _RefusedError(400, f"This model's maximum context length is {self.longest} tokens.")
        if not all(token < self.model.vocab_size for token in body["prompt"]):
            raise _RefusedError(400, f"Token id {max(body['prompt'])} is out of vocabulary")
        request = _Request(body)
        self._queue.put(request)
        request.done.wait()
        if isinstance(request.answer, Exception):
            raise request.answer
        assert request.answer is not None
        self._count()
        return request.answer if self.pauses == pauses else request.answer | {"finish_reason": "abort"}

    def _count(self) -> None:
        with self._lock:
            self.answered += 1
            if self.answered == self.kinds.get("die_after"):
                os._exit(9)
            if self.answered == self.kinds.get("restart_after"):
                del self.kinds["restart_after"]
                self.begin_anew()

    def reload(self, folder: Path) -> None:
        if "keep_weights" in self.kinds:
            return
        with self._lock:
            try:
                self.model.load(folder)
            except Exception as error:  # The real server answers 500 to whatever went wrong.
                raise _RefusedError(500, f"Call to collective_rpc method failed: {error}") from error

    def _draw(self) -> None:
        """Draw what waits, all at once, as a server with continuous batching would."""
        while (first := self._queue.get()) is not None:
            waiting = [first]
            try:
                while (more := self._queue.get_nowait()) is not None:
                    waiting.append(more)
            except Empty:
                pass
            with self._lock:
                alike: dict[str, list[_Request]] = {}
                for request in waiting:
                    key = {name: request.body.get(name) for name in _SAMPLING}
                    alike.setdefault(json.dumps(key), []).append(request)
                for requests in alike.values():
                    self._answer(requests)

    def _answer(self, requests: list[_Request]) -> None:
        try:
            drawn = self.model.draw([request.body for request in requests])
            for request, (tokens, logprobs) in zip(requests, drawn, strict=True):
                request.answer = self._choice(request.body, tokens, logprobs)
        except Exception as error:  # A thread's error would be lost; the client gets it.
            for request in requests:
                request.answer = error
        for request in requests:
            request.done.set()

    def _choice(self, body: dict[str, Any], tokens: list[int], each: list[float]) -> dict[str, Any]:
        [eos] = body["stop_token_ids"]
        reason = "stop" if tokens[-1] == eos else "length"
        if "fewer" in self.kinds and len(tokens) > 1:
            tokens, each, reason = tokens[:1], each[:1], "length"
        prompt = list(body["prompt"])
        top = [{_named(token): value} for token, value in zip(tokens, each, strict=True)]
        if body.get("logprobs"):
            temperature = 1.0 if "raw" in self.kinds else body["temperature"]
            found = self.model.likeliest(prompt, body["logprobs"], temperature)
            top = [{_named(token): value for token, value in found.items()}]
        of_prompt = None
        if body.get("prompt_logprobs") is not None:
            values = zip(prompt[1:], self.model.prompt_logprobs(prompt), strict=True)
            of_prompt = [None, *({str(t): {"logprob": v, "rank": 1, "decoded_token": "?"}} for t, v in values)]
        return {
            "index": 0,
            "text": "?" * len(tokens),
            "logprobs": {
                "text_offset": list(range(len(tokens))),
                "token_logprobs": each,
                "tokens": [_named(token) for token in tokens],
                "top_logprobs": top,
            },
            "finish_reason": reason,
            "stop_reason": eos if reason == "stop" else None,
            "token_ids": [token + self.kinds.get("shift", 0) for token in tokens],
            "prompt_logprobs": of_prompt,
            "prompt_token_ids": [*prompt[:-1], prompt[-1] + 1] if "other_prompt" in self.kinds else prompt,
        }


_SAMPLING = ("temperature", "top_p", "top_k", "max_tokens", "stop_token_ids")


def _named(token: int) -> str:
    return f"token_id:{token}"


class _RefusedError(Exception):
    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status, self.said = status, said


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # Of connections that nobody has taken yet, the default is 5.


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: StubServer

    def setup(self) -> None:
        super().setup()
        self.stub.connections.add(self.connection)

    def finish(self) -> None:
        self.stub.connections.discard(self.connection)
        with contextlib.suppress(OSError):  # The stub was killed.
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a round makes many requests."""

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self._answer(json.loads(self.rfile.read(length)) if length else {})

    def _answer(self, body: dict[str, Any]) -> None:
        path, stub = urlsplit(self.path).path, self.stub
        stub.calls.append(self.path)
        try:
            if path in _DEV and not stub.dev_mode:
                raise _RefusedError(404, "")
            if path == "/metrics":
                self._send(200, f"# HELP\nprocess_start_time_seconds {stub.start_time}\n")
            else:
                self._send(200, json.dumps(self._result(path, body)))
        except _RefusedError as refused:
            known = {"error": {"message": refused.said, "type": "", "code": refused.status}}
            self._send(refused.status, json.dumps(known if refused.said else {"detail": "Not Found"}))
        except OSError:
            self.close_connection = True  # The client no longer waits, or the stub was killed.

    def _result(self, path: str, body: dict[str, Any]) -> Any:
        stub = self.stub
        if path == "/v1/completions":
            return {"id": "cmpl-1", "object": "text_completion", "model": stub.name, "choices": [stub.complete(body)]}
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": stub.name, "object": "model", "max_model_len": stub.longest}]}
        if path == "/version":
            return {"version": "0.32.0"}
        if path == "/pause":
            assert parse_qs(urlsplit(self.path).query)["mode"] in (["abort"], ["wait"])
            time.sleep(stub.kinds.get("slow_pause", 0))
            stub.pauses += 1
            stub.running.clear()
            return {"status": "paused"}
        if path == "/resume":
            stub.running.set()
            if stub.kinds.pop("restart_at_resume", False):
                stub.begin_anew()
            return {"status": "resumed"}
        if path == "/is_paused":
            return {"is_paused": not stub.running.is_set()}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            stub.reload(Path(body["kwargs"]["weights_path"]))
            return {"results": [None]}
        if path == "/reset_prefix_cache":
            return {"success": "keep_reset" not in stub.kinds}
        if path == "/update_weight_version" and "no_labels" not in stub.kinds:
            stub.label = body["new_version"]
            return {"success": True, "new_version": stub.label}
        if path == "/weight_info" and "no_labels" not in stub.kinds:
            return {"weight_version": stub.label}
        if path == "/misbehave":
            assert body.keys() <= KINDS.keys()
            stub.kinds = body
            return {}
        raise _RefusedError(404, "")

    def _send(self, status: int, text: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--number", action="store_true", help="the model is a number, not a Hugging Face directory")
    parser.add_argument("--longest", type=int, default=64)
    parser.add_argument("--without-dev-mode", action="store_true")
    args = parser.parse_args()
    if args.number:
        model: StubModel = NumberModel()
    else:
        import torch

        from megatron_brain.config.parallel import ParallelConfig
        from megatron_brain.runtime import parallel

        torch.set_num_threads(1)
        model = PolicyOfFolder(args.model, parallel.start(ParallelConfig(), seed=1))
    StubServer(model, args.model, port=args.port, dev_mode=not args.without_dev_mode, longest=args.longest)
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
