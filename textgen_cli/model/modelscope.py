"""Models from ModelScope, through its own light client (the extra `modelscope`), into our cache.

Owns which files are fetched and that each is what the repository's list of files says. ModelScope has branches and
tags but tells no commit of them: what a model is called by here is the hash of that list.
"""

import contextlib
import functools
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from textgen_cli.errors import ModelError, NetworkError, UsageError
from textgen_cli.events import Progress, Report
from textgen_cli.model import cache, snapshot
from textgen_cli.model.selection import loadable
from textgen_cli.model.snapshot import File

SITES = ("https://modelscope.cn", "https://www.modelscope.cn", "https://www.modelscope.ai")  # get the token
TOKEN = "MODELSCOPE_API_TOKEN"
BRANCH = "master"
FILE_LIMIT = 50_000


def fetch(repo: str, revision: str | None, root: Path, *, report: Report, offline: bool) -> tuple[Path, str]:
    """The folder in the cache `root` with a model, and the hash of its list of files; fetched if it is not there.

    Raises UsageError E-EXTRA where the client is not installed; NetworkError, ModelError, SafetyError, OutputError.
    """
    home = home_of(root, repo)
    if offline:
        known = snapshot.ref(home, revision or BRANCH)
        if known and cache.whole(home / known) is not None:
            return home / known, known
        raise NetworkError("E-OFFLINE", repo, "is not in the cache, and --offline is set")
    api = _client()
    with _mapped(repo, revision):
        listed = api.list_repo_files(repo, "model", revision=revision or BRANCH, recursive=False)
    files = loadable(repo, [_file(repo, entry) for entry in listed[:FILE_LIMIT] if entry.type == "blob"])
    state = hashlib.sha256(repr([(file.name, file.digest) for file in files]).encode()).hexdigest()[:40]
    target = home / state
    origin = {"name": f"ms:{repo}", "repo": repo, "revision": revision or BRANCH, "source": "modelscope"}
    with cache.publish(target, report=report, origin=origin) as staging:
        if staging is not None:
            parts = target.with_name(f".{state}.parts")
            cache.check_space(root, sum(file.size for file in files), repo)
            _download(api, repo, revision or BRANCH, files, parts, report)
            for file in files:
                (parts / file.name).replace(staging / file.name)
            shutil.rmtree(parts)
    snapshot.write_ref(home, revision or BRANCH, state)
    return target, state


def home_of(root: Path, repo: str) -> Path:
    """Where a repository lies in the cache `root`, whether it is there or not."""
    return root / "modelscope" / repo.replace("/", "--")


@functools.cache
def _library() -> Any:
    """The client's package, quiet."""
    try:
        import modelscope_hub  # noqa: PLC0415 - an extra
        from modelscope_hub import _download  # noqa: PLC0415
    except ImportError as error:
        hint = "pip install 'textgen-cli[modelscope]'"
        raise UsageError("E-EXTRA", "ms:", "needs the package modelscope-hub", hint=hint) from error
    logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)
    module: Any = _download
    module.tqdm = functools.partial(module.tqdm, disable=True)  # it draws whatever it is asked
    return modelscope_hub


def _client() -> Any:
    endpoint = os.environ.get("MODELSCOPE_ENDPOINT", SITES[0]).rstrip("/")
    # Given even where it is empty: else the client reads its stored login, a pickle, and sends it to any endpoint.
    token = os.environ.get(TOKEN, "") if endpoint in SITES else ""
    return _library().HubApi(endpoint=endpoint, token=token)


def _file(repo: str, entry: Any) -> File:
    if not isinstance(entry.sha256, str) or not re.fullmatch("[0-9a-f]{64}", entry.sha256) or entry.size < 0:
        raise NetworkError(
            "E-REMOTE-HEADER", repo, f"the server lists {entry.path!r} without a size and a hash"
        )
    return File(str(entry.path), entry.size, entry.sha256)


def _download(api: Any, repo: str, revision: str, files: list[File], parts: Path, report: Report) -> None:
    """Bring the files into the folder `parts`, where the client goes on with what an earlier run left."""
    total, before = sum(file.size for file in files), 0
    for file in files:
        meter = _meter(report, repo, before, total)
        with _mapped(repo, revision):
            api.downloader.download_file(
                repo, "model", file.name, revision=revision, local_dir=parts, expected_sha256=file.digest,
                file_size=file.size, progress_callbacks=[meter],
            )  # fmt: skip
        actual = cache.sha256(parts / file.name)
        if actual != file.digest:
            (parts / file.name).unlink()
            raise ModelError("E-HASH", file.name, snapshot.mismatch(actual, file), hint="run it again")
        before += file.size
        report(Progress("download", repo, before, total, "bytes"))


def _meter(report: Report, repo: str, before: int, total: int) -> type[Any]:
    """The class of bar that the client draws."""

    class Meter:
        def __init__(self, _name: str, _size: int) -> None:
            self.done = 0

        def update(self, size: int) -> None:
            self.done += size
            report(Progress("download", repo, min(before + self.done, total), total, "bytes"))

        def end(self) -> None:
            pass

    return Meter


@contextmanager
def _mapped(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what the client raises into our errors, with nothing of the server's own words in them."""
    errors = _library().errors
    try:
        with contextlib.redirect_stdout(None):
            yield
    except errors.FileIntegrityError as error:
        raise ModelError("E-HASH", repo, "a file came with another size or hash than listed") from error
    except errors.NotExistError as error:
        raise NetworkError(
            "E-REPO", repo, f"does not exist or has no revision {revision or BRANCH}"
        ) from error
    except (errors.AuthenticationError, errors.PermissionDeniedError) as error:
        raise NetworkError("E-GATED", repo, "is not open to you", hint=f"set {TOKEN}") from error
    except (errors.HubError, ConnectionError, TimeoutError) as error:
        raise NetworkError(
            "E-NETWORK", repo, "ModelScope cannot be reached or does not answer well"
        ) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise NetworkError("E-NETWORK", repo, "ModelScope cannot be reached") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # parsing of an answer
        raise NetworkError("E-REMOTE", repo, "the answer is not that of ModelScope") from error
