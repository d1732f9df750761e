"""Models from the Hub: huggingface_hub's own client against a Hub on the loopback interface."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from parts.hub import Hub, etag

from textgen_cli.errors import ModelError, NetworkError, OutputError, SafetyError, TextgenError, UsageError
from textgen_cli.events import Event, Notice, Progress, silent
from textgen_cli.model import client, hub, snapshot

REPO = "org/name"
WEIGHTS = b"weights " * 40_000
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"tokens": []}',
    "model.safetensors": WEIGHTS,
}
USELESS = {
    "README.md": b"# read me",
    "pytorch_model.bin": b"\x80\x04.",
    "onnx/model.onnx": b"x",
    "modeling_evil.py": b"1",
    "consolidated.safetensors": b"x",
    "model.fp16.safetensors": b"x",
}


def fetch(revision: str | None = None, *, offline: bool = False, report: Any = silent) -> hub.Snapshot:
    return hub.fetch(REPO, revision, offline=offline, report=report)


def stored(cache: Path) -> set[str]:
    """Names of the files in the cache that hold content or point to it."""
    home = cache / "models--org--name"
    return {p.relative_to(home).as_posix() for p in home.rglob("*") if not p.is_dir() or p.is_symlink()}


def failure(revision: str | None = None, **options: Any) -> TextgenError:
    with pytest.raises(TextgenError) as caught:
        fetch(revision, **options)
    assert len(str(caught.value)) < 300
    return caught.value


def test_the_files_that_loading_needs_and_no_others(server: Hub, cache: Path) -> None:
    commit = server.add(REPO, {**FILES, **USELESS})
    found = fetch()
    assert found == hub.Snapshot(cache / "models--org--name" / "snapshots" / commit, commit, REPO)
    assert {p.name: p.read_bytes() for p in found.folder.iterdir()} == FILES
    asked = {request.path.rpartition("/")[2] for request in server.requests(path="/resolve/")}
    assert asked == FILES.keys()


def test_shards_come_with_their_index_and_a_single_file_wins_over_them(server: Hub, cache: Path) -> None:
    sharded = {
        "config.json": b"{}",
        "model.safetensors.index.json": b"{}",
        "model-00001-of-00002.safetensors": b"1",
        "model-00002-of-00002.safetensors": b"2",
    }
    server.add(REPO, sharded)
    assert {p.name for p in fetch().folder.iterdir()} == sharded.keys()
    server.add(REPO, {**sharded, "model.safetensors": b"all"})
    assert {p.name for p in fetch().folder.iterdir()} == {"config.json", "model.safetensors"}


def test_a_cached_commit_opens_no_connection_and_a_branch_costs_one_request(server: Hub, cache: Path) -> None:
    commit = server.add(REPO, FILES)
    first = fetch()
    server.log.clear()
    assert fetch(commit) == first
    assert server.log == []
    assert fetch("main") == first
    assert [request.path for request in server.log] == ["/api/models/org/name/revision/main"]


def test_each_revision_is_its_own_commit(server: Hub, cache: Path) -> None:
    old = server.add(REPO, FILES, branch="v1.0")
    new = server.add(REPO, {**FILES, "config.json": b'{"model_type": "gpt2"}'})
    assert (fetch("v1.0").commit, fetch().commit) == (old, new)
    assert (fetch("v1.0").folder / "config.json").read_bytes() == FILES["config.json"]


def test_progress_counts_the_bytes_of_all_files(server: Hub, cache: Path) -> None:
    server.add(REPO, FILES)
    events: list[Event] = []
    fetch(report=events.append)
    bars = [event for event in events if isinstance(event, Progress)]
    total = sum(map(len, FILES.values()))
    assert bars == events
    sizes = {"": total, **{name: len(content) for name, content in FILES.items()}}
    assert {(bar.stage, bar.subject, bar.unit) for bar in bars} == {("download", REPO, "bytes")}
    for part, size in sizes.items():
        done = [bar.done for bar in bars if bar.part == part]
        assert (done, done[-1]) == (sorted(done), size)
        assert {bar.total for bar in bars if bar.part == part} == {size}


def test_the_branch_moves_during_the_download_and_all_files_are_of_one_commit(
    server: Hub, cache: Path
) -> None:
    old = server.add(REPO, FILES)
    other = {name: content + b" " for name, content in FILES.items()}
    server.fault("/tree/", times=1, then=lambda: server.add(REPO, other))
    found = fetch()
    assert found.commit == old
    assert {p.name: p.read_bytes() for p in found.folder.iterdir()} == FILES
    assert fetch().commit != old


# --- offline


def test_offline_uses_the_cache_without_a_connection(
    server: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = server.add(REPO, FILES)
    first = fetch()
    server.log.clear()
    assert fetch(offline=True) == fetch("main", offline=True) == fetch(commit, offline=True) == first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch() == first
    assert server.log == []


@pytest.mark.parametrize("revision", [None, "v2", "0" * 40])
def test_offline_and_not_cached_fails_at_once(server: Hub, cache: Path, revision: str | None) -> None:
    server.add(REPO, FILES)
    fetch()
    server.log.clear()
    start = time.monotonic()
    if revision is None:
        (cache / "models--org--name" / "refs" / "main").write_text("../../junk")
    assert failure(revision, offline=True).name == "E-OFFLINE"
    assert time.monotonic() - start < 1
    assert server.log == []


def test_offline_takes_what_another_program_cached_after_comparing_it(server: Hub, cache: Path) -> None:
    import huggingface_hub

    commit = server.add(REPO, FILES)
    for name in FILES:
        huggingface_hub.hf_hub_download(REPO, name, endpoint=server.endpoint, cache_dir=cache, token=False)
    assert fetch(offline=True).commit == commit
    blob = cache / "models--org--name" / "blobs" / etag("model.safetensors", WEIGHTS)
    blob.write_bytes(b"W" + WEIGHTS[1:])
    assert failure(offline=True).name == "E-HASH"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["refused", "status", "stall"])
def test_no_network_and_a_cached_branch_is_used_with_a_warning(
    server: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    commit = server.add(REPO, FILES)
    fetch()
    if how == "refused":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    else:
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
        server.fault("/revision/", **({"status": 503} if how == "status" else {"stall": 5}))
    events: list[Event] = []
    start = time.monotonic()
    assert fetch(report=events.append).commit == commit
    assert time.monotonic() - start < 3
    assert [event.name for event in events if isinstance(event, Notice)] == ["W-CACHED-REVISION"]


def test_no_network_and_nothing_cached_fails_soon(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    start = time.monotonic()
    for revision in (None, "0" * 40):
        error = failure(revision)
        assert (type(error), error.name, error.exit_code) == (NetworkError, "E-NETWORK", 7)
    assert time.monotonic() - start < 5


# --- faults of the server


@pytest.mark.parametrize(
    ("where", "status"),
    [
        *(("/revision/", status) for status in client.RETRIED),
        *(("GET", status) for status in client.RETRIED),
        ("/tree/", 429),
        ("/tree/", 503),
    ],
)
def test_a_failure_that_passes_is_tried_again(
    server: Hub, cache: Path, clock: list[float], where: str, status: int
) -> None:
    server.add(REPO, FILES)
    method = "GET" if where == "GET" else None
    server.fault("safetensors" if method else where, method=method, status=status, times=2)
    assert (fetch().folder / "model.safetensors").read_bytes() == WEIGHTS
    assert clock


@pytest.mark.parametrize(
    ("value", "pause"), [("2", 2), ("300", 300), ("Wed, 21 Oct 2099 07:28:00 GMT", 1), ("junk", 1), ("-5", 1)]
)
@pytest.mark.parametrize("where", ["/revision/", "/tree/", "config.json"])
def test_retry_after_is_obeyed(
    server: Hub, cache: Path, clock: list[float], where: str, value: str, pause: int
) -> None:
    server.add(REPO, FILES)
    server.fault(where, status=429, times=1, headers={"Retry-After": value})
    fetch()
    assert sum(clock) in (pause, pause + 1)  # the library waits a second more


@pytest.mark.parametrize(
    "headers",
    [{"Retry-After": "99999"}, {"Retry-After": "9" * 5000}, {"RateLimit": '"api";r=0;t=99999'}],
    ids=["s", "long", "limit"],
)
@pytest.mark.parametrize("where", ["/revision/", "/tree/", "config.json"])
def test_a_pause_of_hours_is_an_error(
    server: Hub, cache: Path, clock: list[float], where: str, headers: dict[str, str]
) -> None:
    server.add(REPO, FILES)
    server.fault(where, status=429, headers=headers)
    assert failure().name == "E-RATE"
    assert clock == []


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ({"status": 401}, "E-REPO"),
        ({"status": 401, "headers": {"X-Error-Code": "RepoNotFound"}}, "E-REPO"),
        ({"status": 403}, "E-GATED"),
        ({"status": 403, "headers": {"X-Error-Code": "GatedRepo"}}, "E-GATED"),
        ({"status": 404}, "E-REPO"),
        ({"status": 404, "headers": {"X-Error-Code": "RevisionNotFound"}}, "E-NOT-FOUND"),
        ({"status": 410}, "E-NOT-FOUND"),
        ({"status": 451}, "E-NOT-FOUND"),
        ({"status": 407}, "E-PROXY"),
        ({"status": 418}, "E-NETWORK"),
        ({"body": b"<html>please log in</html>"}, "E-REMOTE"),
        ({"body": b"[]"}, "E-REMOTE"),
        ({"body": b"[" * 100_000}, "E-REMOTE"),
        ({"body": b'{"id": "org/name", "sha": "../../x", "siblings": []}'}, "E-REMOTE-HEADER"),
        ({"body": b'{"id": "org/name", "siblings": []}'}, "E-REMOTE-HEADER"),
    ],
)
def test_a_refusal_names_the_repository_and_leaves_nothing(
    server: Hub, cache: Path, fault: dict[str, Any], name: str
) -> None:
    server.add(REPO, FILES)
    headers = {"X-Error-Message": "\x1b]0;evil\x07 hf_secret"} | fault.pop("headers", {})
    server.fault("/revision/", headers=headers, **fault)
    error = failure()
    assert (error.name, error.subject, error.exit_code) == (name, REPO, 7)
    assert not re.search("evil|secret|log in|http", str(error))
    assert not cache.exists()
    assert len(server.log) == 1


@pytest.mark.parametrize("status", [401, 403, 404, 410, 451])
def test_a_refused_file_leaves_no_ref(server: Hub, cache: Path, status: int) -> None:
    server.add(REPO, FILES)
    server.fault("safetensors", status=status)
    assert failure().exit_code == 7
    assert not {
        name for name in stored(cache) if name.startswith(("refs", "textgen")) or "model.safetensors" in name
    }


@pytest.mark.parametrize("revision", ["nowhere", "0" * 40])
def test_an_absent_revision_or_repository(server: Hub, cache: Path, revision: str) -> None:
    assert failure().name == "E-REPO"
    server.add(REPO, FILES)
    assert failure(revision).name == "E-NOT-FOUND"


def test_a_server_that_answers_another_commit_is_refused(server: Hub, cache: Path) -> None:
    commit = server.add(REPO, FILES)
    server.branches[REPO]["0" * 40] = commit
    assert failure("0" * 40).name == "E-REMOTE"


JUNK = [
    "",
    "../../../escaped",
    "a" * 39,
    "a" * 41,
    "A" * 40,
    "a" * 10_000,
    "é" * 40,
    '"' + "a" * 40,
    "W/W/" + "a" * 40,
    "a" * 64 + "/x",
]


@pytest.mark.parametrize(
    ("header", "value"),
    [*(("ETag", value) for value in (None, *JUNK)), *(("X-Linked-Etag", value) for value in JUNK[:3])]
    + [("X-Repo-Commit", value) for value in (None, *JUNK[:3], "a" * 64)],
)
def test_a_header_that_is_no_hash_stores_nothing(
    server: Hub, cache: Path, tmp_path: Path, header: str, value: str | None
) -> None:
    server.add(REPO, FILES)
    server.fault("/resolve/", headers={header: value})
    if header == "X-Linked-Etag" and not value:
        fetch()  # the ETag counts
        return
    error = failure()
    assert (error.name, error.exit_code) == ("E-REMOTE-HEADER", 7)
    time.sleep(0.05)  # other files were on their way
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {".lock"}


@pytest.mark.parametrize(
    "entry",
    [
        {"oid": "../../x"},
        {"oid": None},
        {"size": -1},
        {"size": "1"},
        {"size": 1e3},
        {"oid": "a" * 64},
        {"lfs": {"oid": "a" * 40, "size": 1, "pointerSize": 1}},
        {"lfs": {"oid": "a" * 64, "size": None, "pointerSize": 1}},
    ],
    ids=str,
)
def test_a_listing_without_size_and_hash_is_refused(server: Hub, cache: Path, entry: dict[str, Any]) -> None:
    server.add(REPO, FILES)
    listing = [{"type": "file", "path": "config.json", "oid": "a" * 40, "size": 1, **entry}]
    listing += [{"type": "file", "path": "model.safetensors", "oid": "a" * 40, "size": 1}]
    server.fault("/tree/", body=json.dumps(listing).encode())
    assert failure().name == "E-REMOTE-HEADER"
    assert server.requests(path="/resolve/") == []


@pytest.mark.parametrize(
    "name",
    [
        "../config.json",
        "/etc/config.json",
        "a/../../config.json",
        "config.json\n",
        "\x1b[2Jconfig.json",
        "CON",
        "x" * 300 + ".json",
    ],
)
def test_names_of_files_never_become_paths(server: Hub, cache: Path, tmp_path: Path, name: str) -> None:
    server.add(REPO, FILES)
    listing = json.loads(server.answer(f"/api/models/{REPO}/tree/main")[2])
    listing.append({"type": "file", "path": name, "oid": "a" * 40, "size": 1})
    server.fault("/tree/", body=json.dumps(listing).encode())
    assert {p.name for p in fetch().folder.iterdir()} == FILES.keys()


def test_an_endless_listing_is_refused(server: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add(REPO, FILES)
    monkeypatch.setattr(client, "LISTING_LIMIT", 500)
    server.fault("/tree/", headers={"Link": f'<{server.endpoint}/api/models/{REPO}/tree/main>; rel="next"'})
    assert failure().name == "E-REMOTE"


# --- bad content


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_wrong_bytes_of_the_right_size_are_removed(server: Hub, cache: Path, name: str) -> None:
    server.add(REPO, FILES)
    server.fault(name, method="GET", times=1, body=b"?" + FILES[name][1:])
    error = failure()
    assert (type(error), error.name, error.subject, error.exit_code) == (ModelError, "E-HASH", name, 5)
    left = stored(cache)
    assert f"blobs/{etag(name, FILES[name])}" not in left
    assert not any(path.endswith(f"/{name}") or path.startswith(("refs", "textgen")) for path in left)
    assert (fetch().folder / name).read_bytes() == FILES[name]


def test_a_body_that_is_cut_once_is_fetched_again(server: Hub, cache: Path, clock: list[float]) -> None:
    server.add(REPO, FILES)
    server.fault("safetensors", method="GET", times=1, cut=1000)
    assert (fetch().folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_large_body_goes_on_where_it_was_cut(server: Hub, cache: Path, clock: list[float]) -> None:
    large = os.urandom(1 << 20) * 24
    server.add(REPO, {**FILES, "model.safetensors": large})
    server.fault("safetensors", method="GET", times=1, cut=21 << 20)
    assert (fetch().folder / "model.safetensors").read_bytes() == large
    asked = [
        (r.headers.get("range"), r.headers.get("if-range")) for r in server.requests("GET", "safetensors")
    ]
    assert asked == [(None, None), (f"bytes={21 << 20}-", f'"{etag("model.safetensors", large)}"')]


def test_a_body_that_is_always_cut_is_an_error_and_the_next_run_goes_on(
    server: Hub, cache: Path, clock: list[float]
) -> None:
    """F88."""
    server.add(REPO, FILES)
    server.fault("safetensors", method="GET", cut=1000)
    error = failure()
    assert (error.name, error.subject, error.exit_code) == ("E-NETWORK", "model.safetensors", 7)
    assert "got 6,000 of 320,000 bytes after 6 tries" in error.fact
    assert sum(clock) < 60
    assert not any("snapshots" in name and "model.safetensors" in name for name in stored(cache))
    server.faults.clear()
    server.log.clear()
    assert (fetch().folder / "model.safetensors").read_bytes() == WEIGHTS
    assert [r.headers.get("range") for r in server.requests("GET", "safetensors")] == ["bytes=6000-"]
    assert not list(cache.rglob("*incomplete"))


@pytest.mark.parametrize("length", [True, False], ids=["declared", "endless"])
def test_a_body_that_is_longer_than_said_is_stopped(server: Hub, cache: Path, length: bool) -> None:
    server.add(REPO, FILES)
    long = WEIGHTS + b"x" * 30_000_000
    server.fault("safetensors", method="GET", body=long, headers={} if length else {"Content-Length": None})
    assert failure().name == "E-REMOTE"
    assert not any(
        str(p).endswith("incomplete") or p.stat().st_size > len(WEIGHTS)
        for p in cache.rglob("*")
        if p.is_file()
    )


@pytest.mark.slow
def test_a_silent_server_is_noticed(
    server: Hub, cache: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(REPO, FILES)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    for where in ("/revision/", "/tree/", "safetensors"):
        server.fault(where, method="GET", stall=20)
        start = time.monotonic()
        assert failure().name == "E-NETWORK"
        assert time.monotonic() - start < 4
        server.faults.clear()
    assert fetch().commit


# --- redirects


def test_a_redirect_to_storage_is_followed_without_the_repository_headers(server: Hub, cache: Path) -> None:
    """What the real Hub does for large files: the answer about them stands on the redirect."""
    server.add(REPO, FILES)
    with Hub() as storage:
        storage.add(REPO, FILES)
        headers = {
            "Location": f"{storage.endpoint}/{REPO}/resolve/main/model.safetensors",
            "X-Repo-Commit": server.branches[REPO]["main"],
            "X-Linked-Etag": etag("model.safetensors", WEIGHTS),
            "X-Linked-Size": str(len(WEIGHTS)),
        }
        server.fault("safetensors", status=302, headers=headers)
        assert (fetch().folder / "model.safetensors").read_bytes() == WEIGHTS
        assert [request.method for request in storage.log] == ["GET"]


@pytest.mark.parametrize(
    "target",
    ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://169.254.169.254/latest/", "http://[fe80::1]/"],
)
@pytest.mark.parametrize("where", ["/revision/", "/tree/", "safetensors"])
def test_a_redirect_that_leaves_the_web_is_refused(server: Hub, cache: Path, where: str, target: str) -> None:
    server.add(REPO, FILES)
    server.fault(where, status=302, headers={"Location": target})
    assert failure().name == "E-REDIRECT"


def test_a_mirror_may_lead_to_a_hub_and_not_to_something_else(server: Hub, cache: Path) -> None:
    """One answer on the way must be a Hub's; which one does not matter, since the bytes are compared anyway."""
    server.add(REPO, FILES)
    with Hub() as other:
        other.add(REPO, FILES)
        server.fault("safetensors", status=307,
                     headers={"Location": f"{other.endpoint}/{REPO}/resolve/main/model.safetensors"})  # fmt: skip
        assert (fetch().folder / "model.safetensors").read_bytes() == WEIGHTS
        server.add(REPO, {**FILES, "model.safetensors": WEIGHTS + b"x"})
        other.fault("safetensors", headers={"X-Repo-Commit": None})
        assert failure().name == "E-REMOTE-HEADER"


@pytest.mark.parametrize("endpoint", ["ftp://x", "huggingface.co", "http://[", "https://", "http://x:port"])
def test_an_endpoint_that_is_no_address(cache: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    error = failure()
    assert (type(error), error.name) == (UsageError, "E-ENDPOINT")


def test_a_redirect_loop_ends(server: Hub, cache: Path) -> None:
    server.add(REPO, FILES)
    server.fault(
        "/revision/", status=302, headers={"Location": f"{server.endpoint}/api/models/{REPO}/revision/main"}
    )
    assert failure().name == "E-REDIRECT"
    assert len(server.log) <= client.MAX_REDIRECTS + 1


# --- the token


SECRET = "hf_canary0123456789"


def test_another_endpoint_gets_no_token(server: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    server.add(REPO, FILES)
    fetch()
    assert server.log
    assert not any("authorization" in request.headers or SECRET in str(request) for request in server.log)


@pytest.mark.parametrize("token", ["x\ny", "x y", "naïve", "a\x00b", "\x1b[0m"])
def test_a_token_that_is_none_is_refused_before_any_request(
    cache: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    environment = {**os.environ, "HF_TOKEN": token}
    monkeypatch.setattr(os, "environ", environment)
    with pytest.raises(UsageError) as caught:
        fetch()
    assert caught.value.name == "E-TOKEN-FORM"
    assert token not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "sent"),
    [
        ("https://huggingface.co", None),
        ("https://hf.co", None),
        ("http://huggingface.co", False),
        ("https://huggingface.co.evil.example", False),
        ("https://mirror.example", False),
        ("https://huggingface.co@evil.example", False),
    ],
)
def test_which_endpoint_may_get_the_token(
    cache: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, sent: bool | None
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    assert client.token(constants.ENDPOINT) is sent


@pytest.mark.parametrize(
    ("endpoint", "warned"),
    [
        ("http://mirror.example", True),
        ("https://mirror.example", False),
        ("http://localhost:9", False),
        ("http://[::1]:9", False),
    ],
)
def test_an_open_line_to_another_endpoint_is_warned_of(
    cache: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, warned: bool
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    events: list[Event] = []
    client.place("x", None, events.append)
    assert [event.name for event in events if isinstance(event, Notice)] == ["W-ENDPOINT"] * warned


# --- what is refused, and the cache


def test_a_repository_with_pickles_only_is_refused_before_any_file(server: Hub, cache: Path) -> None:
    server.add(REPO, {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04.", "tokenizer.json": b"{}"})
    error = failure()
    assert (type(error), error.name) == (SafetyError, "E-PICKLE")
    assert server.requests(path="/resolve/|conver|discussion") == []
    assert not cache.exists()


def test_a_repository_without_weights_or_with_an_adapter(server: Hub, cache: Path) -> None:
    server.add(REPO, {"config.json": b"{}"})
    assert failure().name == "E-WEIGHTS"
    server.add(REPO, {"adapter_config.json": b"{}", "adapter_model.bin": b"x"})
    assert failure().name == "E-PICKLE"


def test_a_model_larger_than_the_disk_is_refused_before_the_first_byte(server: Hub, cache: Path) -> None:
    server.add(REPO, FILES)
    listing = json.loads(server.answer(f"/api/models/{REPO}/tree/main")[2])
    for entry in listing:
        if "lfs" in entry:
            entry["lfs"]["size"] = entry["size"] = 1 << 60
    server.fault("/tree/", body=json.dumps(listing).encode())
    error = failure()
    assert (type(error), error.name) == (OutputError, "E-SPACE")
    assert server.requests(path="/resolve/") == []


def damage_cut(link: Path) -> None:
    os.truncate(link, 10)


def damage_flip(link: Path) -> None:
    content = bytearray(link.read_bytes())
    content[100] ^= 1
    link.resolve().write_bytes(content)


@pytest.mark.parametrize("damage", [damage_cut, damage_flip])
@pytest.mark.parametrize("offline", [True, False])
def test_a_damaged_file_of_the_cache_is_found_and_removed(
    server: Hub, cache: Path, damage: Any, offline: bool
) -> None:
    server.add(REPO, FILES)
    link = fetch().folder / "model.safetensors"
    damage(link)
    assert failure(offline=offline).name == "E-HASH"
    assert not link.is_symlink()
    assert (fetch().folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_link_to_nothing_is_fetched_anew(server: Hub, cache: Path) -> None:
    server.add(REPO, FILES)
    link = fetch().folder / "model.safetensors"
    link.resolve().unlink()
    assert failure(offline=True).name == "E-OFFLINE"
    assert (fetch().folder / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "junk",
    [
        "",
        "[]",
        "{",
        '{"listed": true, "files": {"../x": {"size": 1, "digest": "' + "a" * 40 + '"}}}',
        '{"listed": true, "files": {"config.json": 1}}',
        '{"listed": true, "files": []}',
    ],
)
def test_a_damaged_record_only_costs_hashing(server: Hub, cache: Path, junk: str) -> None:
    commit = server.add(REPO, FILES)
    first = fetch()
    (cache / "models--org--name" / "textgen" / f"{commit}.json").write_text(junk)
    assert fetch(offline=True) == fetch(commit) == first


def test_an_untouched_model_is_hashed_once(server: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = server.add(REPO, FILES)
    fetch()
    hashed: list[Path] = []
    digest = snapshot.digest

    def noted(path: Path, *, git: bool) -> str:
        hashed.append(path)
        return digest(path, git=git)

    monkeypatch.setattr(snapshot, "digest", noted)
    fetch(commit)
    fetch()
    fetch(offline=True)
    assert hashed == []
    os.utime(fetch().folder / "config.json")
    fetch(commit)
    assert [path.name for path in hashed] == ["config.json"]


def test_the_cache_stays_one_that_the_library_understands(server: Hub, cache: Path) -> None:
    import huggingface_hub

    commit = server.add(REPO, FILES)
    folder = fetch().folder
    scan = huggingface_hub.scan_cache_dir(cache)
    assert (scan.warnings, [repo.repo_id for repo in scan.repos]) == ([], [REPO])
    assert huggingface_hub.hf_hub_download(
        REPO, "config.json", cache_dir=cache, local_files_only=True
    ) == str(folder / "config.json")
    assert not list(cache.rglob("*.incomplete"))
    scan.delete_revisions(commit).execute()
    assert failure(offline=True).name == "E-OFFLINE"


def test_no_home_makes_no_folder_named_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    error = failure()
    assert (type(error), error.name, error.exit_code) == (OutputError, "E-NO-HOME", 8)
    assert list(tmp_path.iterdir()) == []


# --- other processes

SCRIPT = """
import sys
from textgen_cli.errors import TextgenError
from textgen_cli.events import Notice
from textgen_cli.model import hub
try:
    revision = next(iter(sys.argv[1:]), None)
    found = hub.fetch("org/name", revision, offline=False, report=lambda e: isinstance(e, Notice) and print(e))
    print(found.folder)
except TextgenError as error:
    print(error.name)
assert "torch" not in sys.modules
"""


def process(server: Hub, home: Path, *revision: str, **env: str) -> subprocess.Popen[str]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS"))
    }
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *revision],
        env={**clean, **server.settings(home), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_the_environment_is_obeyed_and_the_library_is_silent(server: Hub, tmp_path: Path) -> None:
    commit = server.add(REPO, FILES)
    server.fault("/tree/", status=503, times=1, headers={"X-HF-Warning": "topic; shouting"})
    out, err = process(server, tmp_path / "hf", HF_TOKEN=SECRET, HF_HUB_ENABLE_HF_TRANSFER="1").communicate(
        timeout=60
    )
    assert (out.strip(), err) == (str(tmp_path / "hf/hub/models--org--name/snapshots" / commit), "")
    assert not any("authorization" in request.headers for request in server.log)
    server.log.clear()
    again, _ = process(server, tmp_path / "hf", HF_HUB_OFFLINE="1").communicate(timeout=60)
    assert (again, server.log) == (out, [])
    absent, _ = process(server, tmp_path / "other", HF_HUB_OFFLINE="1").communicate(timeout=60)
    assert (absent.strip(), server.log) == ("E-OFFLINE", [])
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_two_processes_at_once_both_end_well(server: Hub, tmp_path: Path) -> None:
    server.add(REPO, FILES)
    arrived = threading.Barrier(2, timeout=30)
    server.fault("/tree/", times=2, then=arrived.wait)
    server.fault("safetensors", method="GET", stall=0.3)
    both = [process(server, tmp_path) for _ in range(2)]
    results = [one.communicate(timeout=60) for one in both]
    assert results[0] == results[1]
    assert Path(results[0][0].strip(), "model.safetensors").read_bytes() == WEIGHTS
    assert len(server.requests("GET", "safetensors")) == 1
    assert not list(tmp_path.rglob("*.incomplete"))


@pytest.mark.slow
def test_two_processes_and_two_revisions(server: Hub, tmp_path: Path) -> None:
    """F107: each has its own commit, and what both have in common comes once."""
    old = server.add(REPO, FILES, branch="v1.0")
    new = server.add(REPO, {**FILES, "config.json": b'{"model_type": "gpt2"}'})
    arrived = threading.Barrier(2, timeout=30)
    server.fault("/tree/", times=2, then=arrived.wait)
    both = [process(server, tmp_path, revision) for revision in ("v1.0", "main")]
    results = [one.communicate(timeout=60) for one in both]
    assert [err for _, err in results] == ["", ""]
    folders = [Path(out.strip()) for out, _ in results]
    assert [folder.name for folder in folders] == [old, new]
    assert [(folder / "config.json").read_bytes() for folder in folders] == [
        FILES["config.json"], b'{"model_type": "gpt2"}'
    ]  # fmt: skip
    assert all((folder / "model.safetensors").read_bytes() == WEIGHTS for folder in folders)
    assert len(server.requests("GET", "safetensors")) == 1


def test_a_killed_download_leaves_nothing_that_counts(server: Hub, tmp_path: Path) -> None:
    server.add(REPO, FILES)
    server.fault("safetensors", method="GET", times=1, stall=30)
    one = process(server, tmp_path)
    while not server.requests("GET", "safetensors") and one.poll() is None:
        time.sleep(0.02)
    one.kill()
    one.communicate(timeout=30)
    assert not list(tmp_path.rglob("refs/*"))
    out, err = process(server, tmp_path).communicate(timeout=60)
    assert (Path(out.strip(), "model.safetensors").read_bytes(), err) == (WEIGHTS, "")
