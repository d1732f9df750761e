"""Calls to a server that misbehaves by script: tries, limits, the key, addresses."""

import json
import shutil
import socket
import ssl
import subprocess
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from parts.endpoint import (
    DONE,
    KEY,
    QUICK,
    Step,
    Stub,
    ask,
    engine,
    event,
    events,
    fails,
    final,
    prompts,
    refuse,
    reply,
    text_of,
    whole,
)

from textgen_cli.config import DecodingConfig
from textgen_cli.errors import NetworkError, SafetyError, TextgenError, UsageError
from textgen_cli.events import Event, Notice
from textgen_cli.generate.address import base_url
from textgen_cli.generate.remote import RemoteEngine

# Trying again.


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_passing_failure_is_tried_again(status: int) -> None:
    seen: list[Event] = []
    chunks, stub = ask(refuse(status, "wait"), refuse(status, "wait"), whole("fine"), report=seen.append)
    assert text_of(chunks) == "fine"
    assert len(stub.calls) == 3
    assert len({json.dumps(call.body) for call in stub.calls}) == 1
    assert [isinstance(notice, Notice) and not notice.name for notice in seen] == [
        True,
        True,
    ]  # shown with -v only


@pytest.mark.parametrize("status", [429, 503])
def test_tries_come_to_an_end(status: int) -> None:
    error, stub = fails(refuse(status, "busy"))
    assert error.exit_code == 7
    assert len(stub.calls) == QUICK.tries


def test_a_record_that_breaks_the_server_each_time_fails_alone() -> None:
    chunks, stub = ask(refuse(500, "NaN in logits"))
    assert final(chunks).error is not None
    assert len(stub.calls) == QUICK.tries


SOON = format_datetime(datetime.now(UTC) - timedelta(seconds=5), usegmt=True)
FAR = format_datetime(datetime.now(UTC) + timedelta(days=2), usegmt=True)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("1", 1.0),
        ("0", 0.0),
        (SOON, 0.0),
        ("junk", 0.0),
        ("-3", 0.0),
        ("99999", None),
        (FAR, None),
        ("9" * 400, None),
        ("Mon, 01 Jan " + "9" * 30 + " 00:00:00 GMT", 0.0),
    ],
    # Names of their own: those made of today's date would differ between workers that collect a second apart.
    ids=["one", "none", "past", "junk", "negative", "long", "far", "huge", "impossible"],
)
def test_retry_after_is_obeyed_up_to_its_limit(header: str, seconds: float | None) -> None:
    busy = refuse(429, "slow down", Retry_After=header)
    start = time.monotonic()
    if seconds is None:
        error, stub = fails(busy, whole("fine"))
        assert "asks to wait" in (error.hint or "")
        assert len(stub.calls) == 1
        return
    assert text_of(ask(busy, whole("fine"))[0]) == "fine"
    assert seconds <= time.monotonic() - start < seconds + 0.6


GARBAGE = [
    reply(200, "not json"),
    reply(200, "[" * 100_000),
    reply(200, '{"choices": 3}'),
    reply(200, "9" * 5000),
    events(b"data: {broken\n\n"),
    events(b"data: [1]\n\n"),
    events(DONE),
    events(),
    events(cut=True),
    events(event("", None), DONE),
    events(b'data: {"error": {"message": "out of memory"}}\n\n'),
    reply(200, '{"error": {"message": "no provider"}}'),
]


@pytest.mark.parametrize("step", GARBAGE)
def test_garbage_is_tried_again_and_is_an_error_in_the_end(step: Step) -> None:
    chunks, stub = ask(step, whole("fine"))
    assert text_of(chunks) == "fine"
    assert len(stub.calls) == 2
    with Stub([step]) as stub:
        try:
            error: TextgenError | None = final(list(engine(stub).stream(prompts("abc")))).error
        except NetworkError as raised:
            error = raised
    assert error is not None
    assert len(stub.calls) == QUICK.tries


def test_a_stream_that_is_cut_after_its_text_was_shown_is_an_error_and_not_tried_again() -> None:
    for ending in ([], [DONE], [b"data: {broken\n\n"], [b'data: {"error": "x"}\n\n'], [1.0]):
        chunks, stub = ask(events(event("shown"), *ending, cut=not ending))
        assert text_of(chunks) == "shown"
        assert final(chunks).finish_reason == "error"
        assert final(chunks).error is not None
        assert len(stub.calls) == 1


@pytest.mark.slow
def test_a_stall_is_noticed_before_and_in_a_stream() -> None:
    start = time.monotonic()
    chunks, _ = ask(events(5.0), whole("fine"))
    assert text_of(chunks) == "fine"
    assert time.monotonic() - start < 2
    error, stub = fails(events(5.0))
    assert error.name == "E-ENDPOINT-STALLED"
    assert len(stub.calls) == QUICK.tries


@pytest.mark.slow
def test_comments_and_a_trickle_do_not_keep_a_stream_alive() -> None:
    pings: list[bytes | float] = [b": ping\n\n", 0.1] * 30
    start = time.monotonic()
    chunks, _ = ask(events(event("a"), *pings))
    assert final(chunks).error is not None
    assert time.monotonic() - start < 1.5
    slowly = [piece for letter in b'{"choices": [' * 9 for piece in (bytes([letter]), 0.1)]
    error, _ = fails(events(*slowly, kind="application/json"))
    assert error.name == "E-ENDPOINT-STALLED"


def test_a_long_stream_that_keeps_coming_is_no_stall() -> None:
    pieces: list[bytes | float] = [event("a"), 0.12] * 8
    chunks, _ = ask(events(*pieces, event("", "stop"), DONE))
    assert text_of(chunks) == "a" * 8
    assert final(chunks).error is None


def test_a_slow_reader_is_no_stall() -> None:
    with Stub([events(event("a"), 0.1, event("b"), 0.1, event("c", "stop"), DONE)]) as stub:
        stream = engine(stub).stream(prompts("abc"))
        first = next(stream)
        time.sleep(3 * QUICK.stall)
        assert first.text + text_of(list(stream)) == "abc"


def test_a_refused_connection_is_a_network_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(NetworkError, match="E-NETWORK"):
        list(
            RemoteEngine(f"http://127.0.0.1:{port}", "m", DecodingConfig(), limits=QUICK).stream(prompts("a"))
        )


def test_an_answer_without_end_is_given_up() -> None:
    chunks, stub = ask(reply(200, " " * 20_000), limits=replace(QUICK, answer_bytes=10_000))
    assert final(chunks).error is not None
    assert len(stub.calls) == 1
    chunks, _ = ask(events(*[event("ab")] * 500), limits=replace(QUICK, answer_bytes=10_000))
    assert final(chunks).error is not None


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to make a certificate")
    command = [
        openssl,
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    made = [*command, "-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert")]
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    with Stub([whole("x")], tls=context) as stub:
        with pytest.raises(NetworkError, match="E-TLS"):
            list(engine(stub).stream(prompts("abc")))
        assert not stub.calls


# Secrets and messages.


def test_the_key_goes_to_the_endpoint_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEXTGEN_API_KEY", KEY + "\n")
    with Stub([whole("stolen")]) as other:
        error, stub = fails(reply(308, "", Location=other.url + "/completions"))
        assert stub.calls[0].headers["authorization"] == f"Bearer {KEY}"
        assert not other.calls
        assert error.name == "E-REDIRECT"


def test_no_key_means_no_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    _, stub = ask(whole("x"))
    assert "authorization" not in stub.calls[0].headers


@pytest.mark.parametrize(
    "address", ["http://example.com/v1", "http://10.0.0.1:8000", "http://127.0.0.1.example.com"]
)
def test_a_key_never_travels_in_the_open(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    RemoteEngine(address, "m", DecodingConfig())
    monkeypatch.setenv("TEXTGEN_API_KEY", KEY)
    with pytest.raises(SafetyError, match="E-INSECURE-KEY") as caught:
        RemoteEngine(address, "m", DecodingConfig())
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1", "http://[::1]:1/v1", "http://localhost:1", "https://a.example"]
)
def test_a_key_may_go_to_the_loopback_and_over_tls(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEXTGEN_API_KEY", KEY)
    client = RemoteEngine(address, "m", DecodingConfig())._endpoint.client(1)
    assert client.headers["Authorization"] == f"Bearer {KEY}"


def test_a_key_that_no_header_can_carry_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEXTGEN_API_KEY", "sk-\x0bsecret")
    with pytest.raises(UsageError, match="E-KEY") as caught:
        RemoteEngine("http://127.0.0.1", "m", DecodingConfig())
    assert "secret" not in str(caught.value)


def test_the_loopback_is_reached_without_the_proxies_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Stub([whole("from the proxy")]) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert text_of(ask(whole("direct"))[0]) == "direct"
        elsewhere = RemoteEngine("http://model.example/v1", "m", DecodingConfig(), limits=QUICK)
        assert text_of(list(elsewhere.stream(prompts("a")))) == "from the proxy"
    monkeypatch.setenv("http_proxy", "nonsense://user:hunter2@host")
    with pytest.raises(UsageError, match="E-PROXY") as caught:
        list(elsewhere.stream(prompts("a")))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("status", [400, 401, 404, 410, 422, 503])
def test_a_huge_error_body_with_escapes_and_the_key_is_cut_escaped_and_redacted(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEXTGEN_API_KEY", KEY)
    nasty = f"\x1b]52;c;aGk=\x07 {KEY} \u202e\r\n" + "A" * 10_000_000
    for body in (nasty, json.dumps({"error": {"message": nasty[:50_000]}})):
        with Stub([reply(status, body, "text/plain")]) as stub:
            shown = ""
            try:
                shown = str(final(list(engine(stub).stream(prompts("abc")))).error)
            except TextgenError as error:
                shown = f"{error} {error.hint}"
        assert "sk-" not in shown
        assert "AAAA" in shown
        assert shown.isprintable()
        assert len(shown) < 350


@pytest.mark.parametrize(
    "address",
    [
        "",
        "model.example",
        "ftp://a/v1",
        "file:///etc/passwd",
        "http://",
        "http://user:hunter2@a/v1",
        "https://a/v1?k=hunter2",
        "http://a b/",
        "http://a/\x1b",
        "http://" + "a" * 64 + ".example",
        "http://a:99999/",
    ],
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(UsageError, match="E-ENDPOINT") as caught:
        base_url(address)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "base"),
    [
        ("http://a:8000", "http://a:8000/v1"),
        ("http://a/", "http://a/v1"),
        ("https://a/openai/v1/", "https://a/openai/v1"),
    ],
)
def test_addresses(address: str, base: str) -> None:
    assert str(base_url(address)) == base
