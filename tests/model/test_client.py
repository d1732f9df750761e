"""The way to a Hub: proxies that help, refuse or lie (F99), names without an address (F100), certificates (F102)."""

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from parts.hub import Hub

from textgen_cli.errors import NetworkError, TextgenError
from textgen_cli.events import silent
from textgen_cli.model import client, hub

FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights"}
REPO = "org/name"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with Hub() as found:
        found.use(monkeypatch, tmp_path / "hf")
        found.add(REPO, FILES)
        yield found
    huggingface_hub.set_client_factory(client._client)  # with the environment of the other tests


def fetch() -> hub.Snapshot:
    client._take_over()
    huggingface_hub.set_client_factory(client._client)  # a session reads the environment when it begins
    return hub.fetch(REPO, None, offline=False, report=silent)


def failure() -> TextgenError:
    with pytest.raises(TextgenError) as caught:
        fetch()
    return caught.value


def test_a_proxy_of_the_environment_is_used(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.example")
    monkeypatch.setenv("http_proxy", server.endpoint)
    assert (fetch().folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert all(request.path.startswith("http://hub.example/") for request in server.log)


@pytest.mark.parametrize("where", ["/revision/", "/tree/", "/resolve/"])
def test_a_page_that_asks_for_a_login_is_no_answer(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.example")
    monkeypatch.setenv("http_proxy", server.endpoint)
    server.fault(where, body=b"<html>log in</html>", headers={"Content-Type": "text/html", "ETag": None})
    assert failure().exit_code == 7
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize("status", [403, 407, 501])
def test_a_proxy_that_lets_nothing_through(server: Hub, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    monkeypatch.setenv("https_proxy", server.endpoint)  # it knows no CONNECT, and says so with a status
    error = failure()
    assert (error.name, error.exit_code) == ("E-PROXY", 7)


def test_a_proxy_that_is_none(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "nonsense://user:hunter2@host")
    error = failure()
    assert (error.name, error.exit_code) == ("E-PROXY", 2)
    assert "hunter2" not in str(error)


def test_a_name_without_an_address(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    error = failure()
    assert (type(error), error.name) == (NetworkError, "E-NETWORK")


@pytest.mark.parametrize("fault", ["nobody vouches", "another name", "out of date"])
def test_a_certificate_that_is_not_valid(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to make a certificate")
    name = "other" if fault == "another name" else "localhost"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
         "-addext", f"subjectAltName=DNS:{name}", "-keyout", tmp_path / "key", "-out", tmp_path / "cert"],
        capture_output=True, check=True,
    )  # fmt: skip
    if fault == "out of date":
        subprocess.run(
            [openssl, "x509", "-in", tmp_path / "cert", "-signkey", tmp_path / "key", "-days", "-1",
             "-out", tmp_path / "old"],
            capture_output=True, check=True,
        )  # fmt: skip
        (tmp_path / "old").replace(tmp_path / "cert")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    if fault != "nobody vouches":
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert"))
    server.server.socket = context.wrap_socket(server.server.socket, server_side=True)
    port = server.endpoint.rpartition(":")[2]
    monkeypatch.setattr(constants, "ENDPOINT", f"https://localhost:{port}")
    assert failure().name == "E-TLS"
    assert server.log == []
