"""A loopback server that speaks the OpenAI protocol, or a broken form of it, one scripted step a call.

Below it, what tests of the remote engine ask of it.
"""

import json
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import pytest

from textgen_cli.config import DecodingConfig
from textgen_cli.errors import TextgenError
from textgen_cli.generate.endpoint import Limits
from textgen_cli.generate.remote import RemoteEngine
from textgen_cli.generate.request import Chunk, Completion, Request, derive_seed


@dataclass(frozen=True)
class Call:
    """What arrived: the path, the headers by lower-case name, the JSON body."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


Step = Callable[[BaseHTTPRequestHandler, Call], None]


def reply(status: int, body: str | bytes, kind: str = "application/json", **headers: str) -> Step:
    """A whole answer; `headers` are written with _ for -."""
    data = body.encode() if isinstance(body, str) else body

    def step(handler: BaseHTTPRequestHandler, call: Call) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return step


def refuse(
    status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
) -> Step:
    """An error in OpenAI's shape."""
    return reply(status, json.dumps({"error": {"message": message, "param": param, "code": code}}), **headers)


def whole(*texts: str, finish: str | None = "stop", usage: bool = True, logprobs: Any = None) -> Step:
    """An answer with one choice a text, in the form that fits the path; no text: the prompt backwards."""

    def step(handler: BaseHTTPRequestHandler, call: Call) -> None:
        given = texts or (backwards(call),)
        choices = []
        for index, text in enumerate(given):
            said = (
                {"message": {"role": "assistant", "content": text}} if "chat" in call.path else {"text": text}
            )
            choices.append({"index": index, "finish_reason": finish, "logprobs": logprobs, **said})
        answer: dict[str, Any] = {"choices": choices}
        if usage:
            answer["usage"] = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
        reply(200, json.dumps(answer))(handler, call)

    return step


def backwards(call: Call) -> str:
    """The prompt, or the last message, from its end to its beginning."""
    return str(call.body.get("prompt") or call.body["messages"][-1]["content"])[::-1]


def events(*pieces: bytes | float, kind: str = "text/event-stream", cut: bool = False) -> Step:
    """A stream of raw bytes, piece by piece; a number is a pause in seconds; `cut` breaks the framing."""

    def step(handler: BaseHTTPRequestHandler, call: Call) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", kind)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for piece in pieces:
            if isinstance(piece, float):
                time.sleep(piece)
            elif piece:
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                handler.wfile.flush()
        if not cut:
            handler.wfile.write(b"0\r\n\r\n")
        handler.close_connection = True

    return step


def event(text: str = "", finish: str | None = None, **more: Any) -> bytes:
    """One event of a stream, readable as chat and as completion."""
    choice = {"index": 0, "delta": {"content": text}, "text": text, "finish_reason": finish, **more}
    return b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}\n\n'
DONE = b"data: [DONE]\n\n"


@dataclass
class Stub:
    """The server: each call takes the next step; the last step serves all further calls."""

    steps: Sequence[Step]
    models: Step | None = None  # answers GET /v1/models
    tls: ssl.SSLContext | None = None
    calls: list[Call] = field(default_factory=list)
    hung_up: threading.Event = field(
        default_factory=threading.Event
    )  # a client closed while a step was writing
    busiest: int = 0  # most calls at one time

    def __enter__(self) -> Self:
        stub = self
        lock = threading.Lock()
        active = 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer waits for the client's delayed ACK

            def do_GET(self) -> None:
                self.serve({})

            def do_POST(self) -> None:
                self.serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def serve(self, body: dict[str, Any]) -> None:
                nonlocal active
                call = Call(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
                with lock:
                    active += 1
                    stub.busiest = max(stub.busiest, active)
                    posts = sum(1 for earlier in stub.calls if earlier.body)
                    stub.calls.append(call)
                    step = stub.steps[min(posts, len(stub.steps) - 1)] if body else stub.models
                try:
                    (step or reply(404, "{}"))(self, call)
                except (BrokenPipeError, ConnectionResetError):
                    stub.hung_up.set()
                finally:
                    with lock:
                        active -= 1

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if self.tls is not None:
            self._server.socket = self.tls.wrap_socket(self._server.socket, server_side=True)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self._server.server_address[1]}/v1"


QUICK = Limits(connect=1, answer=0.6, stall=0.3, retry_after=1.5, backoff=0.01, tries=3)
KEY = "sk-Secret/Key+0123456789"


def prompts(*texts: str, n: int = 1) -> list[Request]:
    return [Request(i, s, text, None, derive_seed(0, i, s)) for i, text in enumerate(texts) for s in range(n)]


def chat(text: str) -> list[Request]:
    return [Request(0, 0, None, ({"role": "user", "content": text},), 7)]


def engine(stub: Stub, decoding: DecodingConfig | None = None, **options: Any) -> RemoteEngine:
    options.setdefault("limits", QUICK)
    return RemoteEngine(stub.url, "m", decoding or DecodingConfig(), **options)


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def final(chunks: list[Chunk]) -> Completion:
    last = chunks[-1].final
    assert last is not None
    assert all(chunk.final is None for chunk in chunks[:-1])
    return last


def ask(*steps: Step, requests: list[Request] | None = None, **options: Any) -> tuple[list[Chunk], Stub]:
    """All chunks of a run against these steps, and the server."""
    with Stub(steps) as stub:
        return list(engine(stub, **options).stream(requests or prompts("abc"))), stub


def fails(*steps: Step, **options: Any) -> tuple[TextgenError, Stub]:
    """The error that ends a run against these steps."""
    with Stub(steps) as stub, pytest.raises(TextgenError) as caught:
        list(engine(stub, **options).stream(prompts("abc")))
    return caught.value, stub
