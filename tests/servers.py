"""An OpenAI-compatible server on the loopback address that behaves, or misbehaves, as a test tells it to."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-secret-0123456789"


@dataclass
class Reply:
    """What is sent back: ``body`` as it is where it is bytes; ``cut`` leaves out the last bytes that were announced."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = 0


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


class Server:
    """Answers every POST with ``answer(request)``, a ``Reply``; every GET with an empty list of models."""

    def __init__(self, answer: Callable[[Request], Reply]) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.models = Reply({"object": "list", "data": []})
        self.lock = threading.Lock()
        self.release = threading.Event()
        """Set at the end: for answers that wait."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.reply(outer.models)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                request = Request("POST", self.path, dict(self.headers), body)
                with outer.lock:
                    outer.requests.append(request)
                self.reply(outer.answer(request))

            def reply(self, reply: Reply) -> None:
                data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                try:
                    self.send_response(reply.status)
                    for name, value in {"Content-Length": str(len(data)), **reply.headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data[: len(data) - reply.cut])
                except OSError:  # who asked has gone
                    pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    @property
    def prompts(self) -> list[str]:
        """What was asked, in the order in which it came."""
        return [prompt_of(request) for request in self.requests]


def prompt_of(request: Request) -> str:
    """The text of a request, of either route."""
    body = request.body
    return str(body["prompt"] if "prompt" in body else body["messages"][-1]["content"])


def chat(text: Any, **more: Any) -> Reply:
    """A chat completion."""
    return Reply({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}], **more})


def completion(text: str) -> Reply:
    """A completion."""
    return Reply({"choices": [{"index": 0, "text": text, "finish_reason": "stop"}]})


@contextmanager
def serving(answer: Callable[[Request], Reply]) -> Iterator[Server]:
    """A server for as long as the block lasts."""
    server = Server(answer)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.http.shutdown()
        server.http.server_close()
        thread.join()


def closed_port() -> int:
    """A port on which nobody listens."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return int(server.server_port)


def in_turn(*replies: Reply) -> Callable[[Request], Reply]:
    """The replies one after the other, the last of them from then on."""
    left = list(replies)
    lock = threading.Lock()

    def answer(request: Request) -> Reply:
        with lock:
            return left.pop(0) if len(left) > 1 else left[0]

    return answer
