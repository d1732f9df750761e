"""A ModelScope on the loopback interface that the real client talks to: the list of files, and files with ranges.

with Scope() as scope:
    scope.files["config.json"] = b"{}"
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit


class Scope:
    """The server of one repository, `owner/name`; `endpoint` is its address while the context is entered."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.spoiled: dict[str, bytes] = {}  # what is sent in place of a file's content
        self.cut: dict[str, int] = {}  # bytes of a file after which the connection ends, once
        self.status: dict[str, int] = {}  # what a file is answered with in its place
        self.held: dict[str, int] = {}  # bytes of a file after which nothing comes, until the context is left
        self.stopping = threading.Event()
        self.log: list[tuple[str, str | None, str | None]] = []  # path, Range, Authorization

    def __enter__(self) -> Self:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()

    def listing(self) -> bytes:
        entries = [
            {"Path": name, "Name": name, "Size": len(content), "Type": "blob",
             "Sha256": hashlib.sha256(content).hexdigest()}
            for name, content in self.files.items()
        ]  # fmt: skip
        return json.dumps({"Code": 200, "Success": True, "Data": {"Files": entries}}).encode()

    def content(self, path: str) -> bytes | None:
        """What a path means; None where there is nothing."""
        parts = urlsplit(path)
        if re.fullmatch(r"/api/v1/models/owner/name/repo/files", parts.path):
            return self.listing()
        name = parse_qs(parts.query).get("FilePath", [unquote(parts.path).rpartition("/")[2]])[0]
        return self.spoiled.get(name, self.files.get(name)) if "owner/name" in parts.path else None


def _handler(scope: Scope) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._serve()

        def do_GET(self) -> None:
            self._serve()

        def _serve(self) -> None:
            scope.log.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
            body = scope.content(self.path)
            name = parse_qs(urlsplit(self.path).query).get("FilePath", [""])[0]
            if name in scope.status:
                self._reply(scope.status[name], b'{"Message": "\x1b[2Jno"}', {})
                return
            if body is None:
                self._reply(404, b'{"Code": 404, "Success": false, "Message": "\x1b[2Jno such thing"}', {})
                return
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            headers = {"Accept-Ranges": "bytes"}
            if not found:
                self._reply(200, body, headers)
                return
            start, end = int(found[1]), int(found[2] or len(body) - 1)
            self._reply(
                206, body[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(body)}"}
            )

        def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            name = parse_qs(urlsplit(self.path).query).get(
                "FilePath", [urlsplit(self.path).path.rpartition("/")[2]]
            )[0]
            cut = scope.cut.pop(name, None) if self.command == "GET" else None
            held = scope.held.get(name)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body if cut is None else body[:cut]) if held is None else self._hold(
                    body[:held]
                )
                self.close_connection = cut is not None or held is not None

        def _hold(self, begun: bytes) -> None:
            self.wfile.write(begun)
            scope.stopping.wait()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
