"""A server that speaks vLLM's HTTP and draws with our own sampler, so its tokens are those of the native engine.

Paths, bodies and statuses are those of vLLM 0.32 (tests/end_to_end/test_vllm_stub.py compares them). As a process:

    python -m helpers.stub_vllm --model HF_DIR --port PORT

`POST /misbehave {"kind": value}` of its own sets one of KINDS.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch

from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.config.stages import SamplingConfig
from megatron_brain.conversion import load_hf_weights, read_hf_architecture, read_hf_model
from megatron_brain.data.groups import Segment
from megatron_brain.errors import UserError
from megatron_brain.generation.sampler import Sampler
from megatron_brain.models.architecture import resolve
from megatron_brain.models.attention import PackedLayout
from megatron_brain.models.provider import build_model

KINDS = {
    "status": "answer completions with this status, 500 for one",
    "hang": "never answer completions",
    "slow": "wait so many seconds before each completion",
    "die_after": "end the process after so many completions",
    "restart_after": "forget all that was given after so many completions, as a restarted process does",
    "fewer": "end a response after its first token, with finish_reason length",
    "shift": "answer with token ids that are larger by this",
    "other_prompt": "say that the prompt was another one",
    "keep_reset": "say that the prefix cache was not reset",
    "keep_weights": "keep the weights on reload, and say that it worked",
    "raw": "give log-probabilities of before temperature",
    "no_labels": "know no labels of weights, as older versions",
}
_DEV = {"/pause", "/resume", "/reset_prefix_cache", "/collective_rpc", "/update_weight_version", "/weight_info"} | {
    "/is_paused"
}


@dataclass
class _Request:
    body: dict[str, Any]
    done: threading.Event = field(default_factory=threading.Event)
    answer: dict[str, Any] | Exception | None = None


class Model:
    """The model of a Hugging Face directory, with weights that can be replaced."""

    def __init__(self, folder: Path, parallel: Any) -> None:
        sizes = read_hf_architecture(folder)
        told = read_hf_model(folder).config
        bf16 = "bfloat16" in str(told.get("dtype") or told.get("torch_dtype"))
        self.parallel, self.folder = parallel, folder
        self.config = resolve(ModelConfig(bf16=bf16), sizes, str(folder))
        with torch.random.fork_rng(devices=[]):
            self.chunks = build_model(self.config, ParallelConfig(), parallel, head="policy", seed=None)
        self.load(folder)

    def load(self, folder: Path) -> None:
        load_hf_weights(folder, self.chunks, self.config, "policy")
        self.chunks[0].eval()

    @torch.no_grad()
    def hidden(self, sequence: list[int]) -> torch.Tensor:
        """Hidden states `[tokens, h]`."""
        tokens, layout = torch.tensor([sequence]), PackedLayout(segments=(Segment(0, len(sequence)),))
        return self.chunks[0].trunk(tokens, torch.arange(len(sequence))[None], layout)[:, 0]

    @torch.no_grad()
    def prompt_logprobs(self, sequence: list[int]) -> list[float]:
        targets = torch.tensor(sequence[1:])
        return self.chunks[0].token_logprobs(self.hidden(sequence)[:-1], targets).tolist()

    @torch.no_grad()
    def top(self, sequence: list[int], count: int, temperature: float) -> list[tuple[int, float]]:
        logits = (self.hidden(sequence)[-1].float() @ self.chunks[0].output_weight.float().t())[: self.vocab_size]
        found = torch.log_softmax(logits / temperature, dim=0).topk(count)
        return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))

    @property
    def vocab_size(self) -> int:
        return self.chunks[0].true_vocab_size


class StubServer:
    """The server; it serves in threads of this process until `close`.

    Args:
        folder: the model that it starts with.
        dev_mode: whether it has the paths of VLLM_SERVER_DEV_MODE.
    """

    def __init__(
        self,
        folder: Path,
        parallel: Any,
        *,
        port: int = 0,
        dev_mode: bool = True,
        longest: int = 64,
    ) -> None:
        self.folder, self.dev_mode, self.longest, self.name = Path(folder), dev_mode, longest, "stub"
        self.model = Model(self.folder, parallel)
        self.kinds: dict[str, Any] = {}
        self.seen: list[dict[str, Any]] = []
        """The bodies of all completions that were asked for."""
        self.calls: list[str] = []
        self._queue: Queue[_Request | None] = Queue()
        self._lock = threading.RLock()
        self.running = threading.Event()
        self.begin_anew()
        handler = type("Handler", (_Handler,), {"stub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        threading.Thread(target=self._draw, daemon=True).start()

    def begin_anew(self) -> None:
        """Forget all that was given, as a new process would."""
        with self._lock:
            self.model.load(self.folder)
            self.start_time = time.time()
            self.label = "default"
            self.running.set()
            self.answered = 0

    def close(self) -> None:
        self._queue.put(None)
        self.http.shutdown()
        self.http.server_close()

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(body)
        if "slow" in self.kinds:
            time.sleep(self.kinds["slow"])
        while "hang" in self.kinds:
            time.sleep(0.05)
        self.running.wait()
        if "status" in self.kinds:
            raise _RefusedError(self.kinds["status"], "it was told to")
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
        return request.answer

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
            except (UserError, OSError) as error:
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
        body = requests[0].body
        sampling = SamplingConfig(
            temperature=body["temperature"],
            top_p=body.get("top_p", 1.0),
            top_k=body.get("top_k", 0),
            max_new_tokens=body["max_tokens"],
        )
        [eos] = body["stop_token_ids"]
        try:
            drawn = Sampler(self.model.chunks, self.model.parallel, sampling, eos_id=eos).generate(
                [tuple(request.body["prompt"]) for request in requests],
                seeds=[[request.body.get("seed", 0)] for request in requests],
            )
            for request, [completion] in zip(requests, drawn, strict=True):
                request.answer = self._choice(request.body, completion, eos)
        except Exception as error:  # A thread's error would be lost; the client gets it as a 500.
            for request in requests:
                request.answer = error
        for request in requests:
            request.done.set()

    def _choice(self, body: dict[str, Any], completion: Any, eos: int) -> dict[str, Any]:
        tokens, count = list(completion.tokens), len(completion.tokens)
        # The sampler tells the sum alone.
        each = [completion.logprob / count] * (count - 1)
        each.append(completion.logprob - math.fsum(each))
        reason = "stop" if tokens[-1] == eos else "length"
        if "fewer" in self.kinds and count > 1:
            tokens, each, reason = tokens[:1], each[:1], "length"
        prompt = list(body["prompt"])
        top = [{f"token_id:{token}": value} for token, value in zip(tokens, each, strict=True)]
        if body.get("logprobs"):
            temperature = 1.0 if "raw" in self.kinds else body["temperature"]
            found = self.model.top(prompt, body["logprobs"], temperature)
            top = [{f"token_id:{token}": value for token, value in found}]
        of_prompt = None
        if body.get("prompt_logprobs") is not None:
            values = zip(prompt[1:], self.model.prompt_logprobs(prompt), strict=True)
            of_prompt = [None, *({str(t): {"logprob": v, "rank": 1, "decoded_token": "?"}} for t, v in values)]
        return {
            "index": 0,
            "text": "?" * count,
            "token_ids": [token + self.kinds.get("shift", 0) for token in tokens],
            "prompt_token_ids": [*prompt[:-1], prompt[-1] + 1] if "other_prompt" in self.kinds else prompt,
            "finish_reason": reason,
            "stop_reason": eos if reason == "stop" else None,
            "prompt_logprobs": of_prompt,
            "logprobs": {
                "tokens": [f"token_id:{token}" for token in tokens],
                "token_logprobs": each,
                "top_logprobs": top,
                "text_offset": list(range(len(tokens))),
            },
        }


_SAMPLING = ("temperature", "top_p", "top_k", "max_tokens", "stop_token_ids")


class _RefusedError(Exception):
    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status, self.said = status, said


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: StubServer

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
            known = {"error": {"message": refused.said, "type": "", "param": None, "code": refused.status}}
            self._send(refused.status, json.dumps(known if refused.said else {"detail": "Not Found"}))
        except BrokenPipeError:
            pass  # The client no longer waits.

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
            stub.running.clear()
            return {"status": "paused"}
        if path == "/resume":
            stub.running.set()
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
    parser.add_argument("--longest", type=int, default=64)
    parser.add_argument("--without-dev-mode", action="store_true")
    args = parser.parse_args()
    from megatron_brain.runtime import parallel

    torch.set_num_threads(1)
    layout = parallel.start(ParallelConfig(), seed=1)
    StubServer(args.model, layout, port=args.port, dev_mode=not args.without_dev_mode, longest=args.longest)
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
