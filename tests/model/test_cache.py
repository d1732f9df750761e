"""The cache: a folder appears whole or not at all, under races, kills and full disks."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from parts import publishers

from textgen_cli.errors import ModelError, OutputError
from textgen_cli.events import Event, Notice, Progress, silent
from textgen_cli.model import cache


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "model"


def fill(target: Path, text: str = "{}") -> bool:
    """Publish one small file; False where there was nothing to do."""
    with cache.publish(target, report=silent, origin={"name": "x"}) as staging:
        if staging is None:
            return False
        (staging / "deep").mkdir()
        (staging / "deep" / "config.json").write_text(text)
    return True


def litter(target: Path) -> list[str]:
    """What lies beside a target and its lock."""
    return sorted(
        path.name for path in target.parent.iterdir() if path.name not in (target.name, f"{target.name}.lock")
    )


def test_published_once_and_whole(target: Path) -> None:
    assert cache.whole(target) is None
    assert fill(target)
    assert not fill(target, "other")
    manifest = cache.whole(target)
    assert manifest is not None
    assert manifest["origin"] == {"name": "x"}
    assert set(manifest["versions"]) >= {"textgen", "transformers", "torch"}
    known = subprocess.run(
        ["sha256sum", target / "deep" / "config.json"], capture_output=True, text=True, check=True
    )
    assert manifest["files"] == {"deep/config.json": {"size": 2, "sha256": known.stdout.split()[0]}}
    assert litter(target) == []


def test_every_file_and_folder_reaches_the_disk_before_the_name(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power loss cannot be made here, so the calls of the operating system are listened to."""
    calls: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def heard_fsync(descriptor: int) -> None:
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}").rpartition(".staging")[2] or "/")
        fsync(descriptor)

    def heard_rename(self: Path, to: Path) -> Path:
        calls.append("rename")
        return rename(self, to)

    monkeypatch.setattr(os, "fsync", heard_fsync)
    monkeypatch.setattr(Path, "rename", heard_rename)
    fill(target)
    before, after = calls[: calls.index("rename")], calls[calls.index("rename") + 1 :]
    assert sorted(before) == ["/", "/deep", "/deep/config.json", "/textgen.json"]
    assert after == [str(target.parent)]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_follow_the_umask(target: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with cache.publish(target, report=silent, origin={}) as staging:
            assert staging is not None
            (staging / "weights").touch(0o600)  # as safetensors makes its files
    finally:
        os.umask(before)
    assert [stat.S_IMODE((target / name).stat().st_mode) for name in ("weights", "textgen.json")] == [
        mode,
        mode,
    ]
    assert not target.parent.stat().st_mode & 0o022


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, ModelError("E-X", "x", "y")])
def test_an_exception_leaves_nothing(target: Path, error: BaseException | type[BaseException]) -> None:
    def run() -> None:
        with cache.publish(target, report=silent, origin={}) as staging:
            assert staging is not None
            (staging / "half").write_text("half")
            raise error

    with pytest.raises((KeyboardInterrupt, ValueError, ModelError)):
        run()
    assert not target.exists()
    assert litter(target) == []
    assert fill(target)


def damage_manifest(target: Path, **changes: object) -> None:
    path = target / "textgen.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_file(target: Path, kind: str) -> None:
    """Put something else in the place of the published file."""
    place, other = target / "deep" / "config.json", target.parent / "out"
    place.unlink()
    other.write_text("{}")
    if kind == "link":
        place.symlink_to(other)
    elif kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)


def replace_all(target: Path) -> None:
    shutil.rmtree(target)
    target.write_text("x")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda target: (target / "textgen.json").unlink(),
    "manifest is no JSON": lambda target: (target / "textgen.json").write_text("{"),
    "manifest is a list": lambda target: (target / "textgen.json").write_text("[]"),
    "manifest nests": lambda target: (target / "textgen.json").write_text("[" * 100_000),
    "manifest of another format": partial(damage_manifest, format=2),
    "manifest lists nothing": partial(damage_manifest, files={}),
    "manifest lists numbers": partial(damage_manifest, files={"deep/config.json": 2}),
    "manifest leaves the folder": partial(
        damage_manifest, files={"../model.lock": {"size": 0, "sha256": ""}}
    ),
    "file shorter": lambda target: (target / "deep" / "config.json").write_text("{"),
    "file missing": partial(replace_file, kind="nothing"),
    "file is a folder": partial(replace_file, kind="folder"),
    "file is a pipe": partial(replace_file, kind="pipe"),
    "file is a link that leaves the folder": partial(replace_file, kind="link"),
    "a file in its place": replace_all,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_whole_is_replaced(target: Path, damage: str) -> None:
    fill(target)
    DAMAGES[damage](target)
    assert cache.whole(target) is None
    with pytest.raises(ModelError, match="E-HASH"):
        cache.verify(target)
    assert fill(target)
    assert cache.whole(target) is not None
    cache.verify(target)


def test_verify_names_the_changed_file(target: Path) -> None:
    fill(target)
    cache.verify(target)
    (target / "deep" / "config.json").write_text("[]")  # the size is the same
    assert cache.whole(target) is not None
    with pytest.raises(ModelError, match=r"\[E-HASH\] deep/config.json") as caught:
        cache.verify(target)
    assert caught.value.exit_code == 5


def test_one_fills_the_other_waits(target: Path) -> None:
    first = publishers.start(target, hold=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "inside\n"
    second = publishers.start(target)
    assert second.stdout is not None
    assert second.stdout.readline() == "wait\n"
    time.sleep(0.3)
    assert second.poll() is None
    assert publishers.words(first) == ["made"]
    assert publishers.words(second) == ["whole"]


def test_many_at_once_fill_once(target: Path) -> None:
    processes = [publishers.start(target) for _ in range(4)]
    said = [publishers.words(process)[-1] for process in processes]
    assert sorted(said) == ["made", "whole", "whole", "whole"]
    cache.verify(target)


def test_killed_inside_then_run_again(target: Path) -> None:
    first = publishers.start(target, hold=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "inside\n"
    waiting = publishers.start(target)
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "wait\n"
    assert len(litter(target)) == 1
    first.kill()
    first.communicate()
    # The kernel frees the lock of the dead; who waited does the work and clears up.
    assert publishers.words(waiting) == ["made"]
    assert litter(target) == []
    cache.verify(target)


def test_full_disk(tmp_path: Path) -> None:
    with publishers.mounted(tmp_path / "disk", "2m") as disk:
        target = disk / "cache" / "model"
        (said,) = publishers.words(publishers.start(target, megabytes=3))
        assert said == f"8 [E-WRITE] {target}: no space left on device"
        assert not target.exists()
        assert litter(target) == []
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        assert publishers.words(publishers.start(target, megabytes=3)) == ["made"]
        cache.verify(target)


def test_read_only_disk(tmp_path: Path) -> None:
    with publishers.mounted(tmp_path / "disk", "8m") as disk:
        assert publishers.words(publishers.start(disk / "there")) == ["made"]
        (disk / "there.lock").unlink()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert publishers.words(publishers.start(disk / "there")) == ["whole"]
        assert publishers.words(publishers.start(disk / "other")) == [
            f"8 [E-WRITE] {disk / 'other'}: read-only file system"
        ]


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user, which only root can")
def test_folder_of_another_user() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        folder.chmod(0o755)
        assert publishers.words(publishers.start(folder / "there")) == ["made"]
        assert publishers.words(publishers.start(folder / "there", user=65534)) == ["whole"]
        (said,) = publishers.words(publishers.start(folder / "other", user=65534))
        assert said == f"8 [E-WRITE] {folder / 'other'}: permission denied"
        assert not (folder / "other").exists()


def test_a_file_where_the_cache_should_be(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(OutputError, match="E-WRITE") as caught:
        fill(tmp_path / "cache" / "model")
    assert caught.value.exit_code == 8


@pytest.mark.parametrize(("mode", "warned"), [(0o755, False), (0o700, False), (0o775, True), (0o757, True)])
def test_a_cache_that_others_write_is_warned_of(target: Path, mode: int, warned: bool) -> None:
    target.parent.mkdir()
    target.parent.chmod(mode)
    for _ in range(2):  # while it is made, and when it is whole
        events: list[Event] = []
        with cache.publish(target, report=events.append, origin={}) as staging:
            if staging is not None:
                (staging / "config.json").write_text("{}")
        names = [event.name for event in events if isinstance(event, Notice)]
        assert names == (["W-CACHE-MODE"] if warned else [])


def test_connections_are_not_called_unwritable(target: Path) -> None:
    with pytest.raises(ConnectionResetError), cache.publish(target, report=silent, origin={}):
        raise ConnectionResetError


def test_stages_are_told(target: Path) -> None:
    events: list[Event] = []
    with cache.publish(target, report=events.append, origin={"name": "tiny"}) as staging:
        assert staging is not None
        (staging / "config.json").write_text("{}")
    assert events == [Progress("save", "tiny")]


ROOT = (
    "import sys; from pathlib import Path; from textgen_cli.model import cache\n"
    "try: print(cache.root(Path(sys.argv[1]) if sys.argv[1:] else None))\n"
    "except cache.OutputError as error: print(error.exit_code, error.name)"
)


@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ({"HOME": "/h"}, [], "/h/.cache/textgen"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, [], "/x/textgen"),
        ({"XDG_CACHE_HOME": "/x"}, [], "/x/textgen"),
        ({"HOME": "/h"}, ["some/where"], "some/where"),
        ({"HOME": "/h"}, ["~/models"], "/h/models"),
        ({}, [], "8 E-NO-HOME"),
        ({}, ["~/models"], "8 E-NO-HOME"),
        ({}, ["/given"], "/given"),
    ],
)
@pytest.mark.skipif(
    sys.platform != "linux" or os.getuid() != 0, reason="becomes a user nobody knows, as root on Linux"
)
def test_root(tmp_path: Path, environment: dict[str, str], arguments: list[str], expected: str) -> None:
    """As a user whom the password file does not know, so that nothing but the environment can answer."""
    tmp_path.chmod(0o777)
    command = [
        "setpriv",
        "--reuid=54321",
        "--regid=54321",
        "--clear-groups",
        sys.executable,
        "-c",
        ROOT,
        *arguments,
    ]
    environment = {
        **environment,
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(cache.__file__).parents[2]),
    }
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == expected, done.stderr
