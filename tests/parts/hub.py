"""A Hub on the loopback interface that the real client of huggingface_hub talks to, with faults by script.

    with Hub() as hub:
        commit = hub.add("org/name", {"config.json": b"{}", "model.safetensors": weights})
        hub.fault("/resolve/.*safetensors", method="GET", status=503, times=2)

It serves what a download needs: a revision's commit, a commit's tree, and files with ETag, commit and Range.
 `hub.log` holds every request.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import pytest

LARGE = (".safetensors", ".bin", ".gguf", ".model", ".h5")  # what a Hub keeps outside git, under its sha256


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def etag(name: str, content: bytes) -> str:
    """The hash by which a Hub names a file: sha256 for large ones, git's own for the others."""
    return hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else git_hash(content)


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # unquoted, with the query
    headers: Mapping[str, str]  # names in lower case


@dataclass
class Fault:
    """What an answer is instead of the right one; fields that are not given leave it as it is."""

    path: str  # a regular expression, searched in the unquoted path with query
    method: str | None = None
    times: int | None = None  # how often; None: always
    status: int | None = None  # with an empty body
    headers: Mapping[str, str | None] = field(default_factory=dict)  # added or replaced; None: left out
    body: bytes | None = None  # sent as it is, with a fitting length
    cut: int | None = None  # bytes of the body after which the connection ends
    trickle: float = 0.0  # seconds after each byte of the body
    whole: bool = False  # Range is not obeyed
    stall: float = 0.0  # seconds of silence before the answer; ends early with the hub
    then: Callable[[], Any] | None = None  # called before the answer is sent

    def meets(self, request: Request) -> bool:
        return (
            self.times != 0
            and self.method in (None, request.method)
            and re.search(self.path, request.path) is not None
        )  # fmt: skip


class Hub:
    """The server; `endpoint` is its address while the context is entered."""

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, str]] = {}  # repository -> branch or tag -> commit
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}  # (repository, commit) -> files
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.stopping = threading.Event()
        self.lock = threading.Lock()

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

    def add(self, repo: str, files: Mapping[str, bytes] | Path, *, branch: str = "main") -> str:
        """Make a commit of these files, or of all files below a folder, and let the branch mean it."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        named = "".join(f"{name} {etag(name, content)}\n" for name, content in sorted(files.items()))
        commit = hashlib.sha1(f"{repo}\n{named}".encode(), usedforsecurity=False).hexdigest()
        self.commits[repo, commit] = dict(files)
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def fault(self, path: str, **answer: Any) -> Fault:
        """Let requests whose path matches go wrong; the newest fault that matches counts."""
        self.faults.insert(0, Fault(path, **answer))
        return self.faults[0]

    def requests(self, method: str | None = None, path: str = "") -> list[Request]:
        """The requests so far with this method and a path that matches."""
        return [r for r in self.log if method in (None, r.method) and re.search(path, r.path)]

    def settings(self, home: Path) -> dict[str, str]:
        """The environment with which another process uses this hub and a cache of its own."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home)}

    def use(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> Path:
        """Let this process's huggingface_hub use this hub and a cache of its own; returns its folder."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            self.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        return home / "hub"

    # --- the right answers

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path without its query."""
        if match := re.fullmatch(r"/api/models/(.+?)/revision/(.+)", path):
            return self._revision(*match.groups())
        if match := re.fullmatch(r"/api/models/(.+?)/tree/([^/?]+)(\?.*)?", path):
            return self._tree(match[1], match[2], deep="recursive=true" in (match[3] or "").lower())
        if match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            return self._file(*match.groups())
        return 404, {}, b"no such page"

    def _commit(self, repo: str, revision: str) -> str | None:
        return revision if (repo, revision) in self.commits else self.branches.get(repo, {}).get(revision)

    def _absent(self, repo: str) -> tuple[int, dict[str, str], bytes]:
        return 404, {"X-Error-Code": "RevisionNotFound" if repo in self.branches else "RepoNotFound"}, b"{}"

    def _revision(self, repo: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        commit = self._commit(repo, revision)
        if commit is None:
            return self._absent(repo)
        siblings = [{"rfilename": name} for name in self.commits[repo, commit]]
        return (
            200,
            {"Content-Type": "application/json"},
            json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode(),
        )

    def _tree(self, repo: str, revision: str, *, deep: bool) -> tuple[int, dict[str, str], bytes]:
        commit = self._commit(repo, revision)
        if commit is None:
            return self._absent(repo)
        entries: dict[str, dict[str, Any]] = {}
        for name, content in self.commits[repo, commit].items():
            if "/" in name and not deep:
                top = name.partition("/")[0]
                entries[top] = {"type": "directory", "path": top, "oid": "0" * 40, "size": 0}
                continue
            entries[name] = {"type": "file", "path": name, "oid": git_hash(content), "size": len(content)}
            if name.endswith(LARGE):
                entries[name]["lfs"] = {"oid": etag(name, content), "size": len(content), "pointerSize": 134}
        return 200, {"Content-Type": "application/json"}, json.dumps(list(entries.values())).encode()

    def _file(self, repo: str, revision: str, name: str) -> tuple[int, dict[str, str], bytes]:
        commit = self._commit(repo, revision)
        if commit is None:
            return self._absent(repo)
        content = self.commits[repo, commit].get(name)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return (
            200,
            {"ETag": f'"{etag(name, content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"},
            content,
        )


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16

        def do_GET(self) -> None:
            self._serve()

        def do_HEAD(self) -> None:
            self._serve()

        def _serve(self) -> None:
            request = Request(
                self.command, unquote(self.path), {k.lower(): v for k, v in self.headers.items()}
            )
            with hub.lock:
                hub.log.append(request)
                fault = next((fault for fault in hub.faults if fault.meets(request)), Fault(""))
                if fault.times:
                    fault.times -= 1
            if fault.stall:
                hub.stopping.wait(fault.stall)
            if fault.then:
                fault.then()
            self._reply(*self._spoiled(fault, request), cut=fault.cut, trickle=fault.trickle)

        def _spoiled(self, fault: Fault, request: Request) -> tuple[int, dict[str, str], bytes]:
            path = urlsplit(self.path)
            status, headers, body = hub.answer(
                unquote(path.path + ("?" + path.query if "/tree/" in path.path else ""))
            )
            current = request.headers.get("if-range") in (None, {**headers, **fault.headers}.get("ETag"))
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
            if match and current and not fault.whole and status == 200:
                start, end = int(match[1]), min(int(match[2] or len(body)) + 1, len(body))
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
                status, body = 206, body[start:end]
            if fault.status is not None:
                status, headers, body = fault.status, {}, b""
            if fault.body is not None:
                body = fault.body
            headers["Content-Length"] = str(len(body))
            for name, value in fault.headers.items():
                headers.pop(name, None)
                if value is not None:
                    headers[name] = value
            return status, headers, body

        def _reply(
            self, status: int, headers: dict[str, str], body: bytes, *, cut: int | None, trickle: float
        ) -> None:
            lines = [f"HTTP/1.1 {status} x", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
            try:
                self.wfile.write("\r\n".join(lines).encode("latin-1"))
                for at in range(len(body) if trickle else 0):
                    self.wfile.write(body[at : at + 1])
                    self.wfile.flush()
                    if hub.stopping.wait(trickle):
                        break
                if self.command != "HEAD" and not trickle:
                    self.wfile.write(body if cut is None else body[:cut])
                    self.close_connection = cut is not None or "Content-Length" not in headers
                self.wfile.flush()
            except OSError:  # the client has had enough
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
