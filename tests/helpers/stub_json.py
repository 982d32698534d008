"""A server over real sockets that answers POST requests as a test says."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StubJson:
    """A server that answers each request with what `reply` makes of its number and JSON.

    Args:
        reply: returns status and answer, JSON or text, and as a third value further headers if there are some.

    Attributes:
        requests: (path, JSON) of each request so far.
        headers: the headers of each.
        most: the largest number of requests that were under way at one time.
    """

    def __init__(self, reply):
        self.requests, self.headers, self.most, now, lock = [], [], 0, set(), threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["content-length"])) or "null")
                with lock:
                    number = len(stub.requests)
                    stub.requests.append((self.path, request))
                    stub.headers.append(dict(self.headers))
                    now.add(number)
                    stub.most = max(stub.most, len(now))
                status, answer, *headers = reply(number, request)
                body = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
                self.send_response(status)
                for name, value in headers[0].items() if headers else ():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                with lock:  # The client may send its next request as soon as it has the body.
                    now.discard(number)
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()


def chat_judge(verdict):
    """A `reply` of an OpenAI-compatible judge: `verdict` makes the text of the reply of the message's text."""

    def reply(number, request):
        content = verdict(request["messages"][0]["content"])
        return 200, {"object": "chat.completion", "choices": [{"index": 0, "message": {"content": content}}]}

    return reply
