"""A server for --reward-url that rewards responses with a function of a file. It needs nothing but Python.

    python examples/reward_server.py examples/arithmetic/rule.py:right --port 8100

A request is a POST, to any path, of the JSON object

    {"prompts": ["text", ...], "responses": ["text", ...], "records": [{"id": "...", ...}, ...]}

and the answer is `{"rewards": [0.5, ...]}`, one number for each response. A request that the function fails on gets
status 400 and the traceback, which the run shows: the same request would fail again.
"""

import argparse
import json
import runpy
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reward = Callable[[list[str], list[str], list[dict]], list[float]]


def make_server(function: Reward, host: str, port: int) -> ThreadingHTTPServer:
    """The server, which listens already. Port 0 takes any free one."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:  # http.server calls it by this name.
            try:
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                rewards = function(request["prompts"], request["responses"], request["records"])
                status, answer = 200, {"rewards": [float(reward) for reward in rewards]}
            except Exception:
                status, answer = 400, {"error": traceback.format_exc()}
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a run sends thousands of requests."""

    return ThreadingHTTPServer((host, port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("function", help="path/to/file.py:function of (prompts, responses, records)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all of them")
    parser.add_argument("--port", type=int, default=8100)
    args = parser.parse_args()
    path, _, name = args.function.rpartition(":")
    server = make_server(runpy.run_path(path)[name], args.host, args.port)
    print(f"--reward-url http://{args.host}:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
