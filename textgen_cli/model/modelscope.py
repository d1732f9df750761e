"""Models from ModelScope, through its own light client (the extra `modelscope`), into our cache.

The client finds the repository and opens its files; `transfer.py` takes their bytes. Owns which files are fetched
and how each is asked for. ModelScope has branches and tags but tells no commit of them: what a model is called by
here is the hash of its list of files.
"""

import contextlib
import functools
import hashlib
import importlib
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from textgen_cli.errors import NetworkError, UsageError
from textgen_cli.events import Report
from textgen_cli.model import cache, snapshot, together, transfer, wire
from textgen_cli.model.selection import loadable
from textgen_cli.model.snapshot import File
from textgen_cli.model.transfer import Body

SITES = ("https://modelscope.cn", "https://www.modelscope.cn", "https://www.modelscope.ai")  # get the token
TOKEN = "MODELSCOPE_API_TOKEN"
BRANCH = "master"
FILE_LIMIT = 50_000
BLOCK = 1 << 16  # bytes read at most at once


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
    except ImportError as error:
        hint = "pip install 'textgen-cli[modelscope]'"
        raise UsageError("E-EXTRA", "ms:", "needs the package modelscope-hub", hint=hint) from error
    logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)
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
    """Bring the files into the folder `parts`, several at once; goes on with what an earlier run left there."""

    def work(file: File, tell: Callable[[Any], None], stopped: threading.Event) -> None:
        def opened(start: int, etag: str | None) -> AbstractContextManager[Body]:
            return _body(api, repo, revision, file.name, start, etag)

        with cache.writing(parts / file.name):
            transfer.fetch(file, parts / file.name, opened, lambda count: tell((file, count)), stopped.is_set)

    parts.mkdir(exist_ok=True)
    for event in transfer.gathered(together.each(files, work, transfer.WORKERS), repo, files):
        report(event)


@contextmanager
def _body(api: Any, repo: str, revision: str, name: str, start: int, etag: str | None) -> Iterator[Body]:
    """The bytes of a file from `start` on. Raises wire.Passing for what is worth another try, else NetworkError."""
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if etag:
            headers["If-Range"] = etag
    with _wired(repo, revision):
        try:
            answer = api.legacy.download_stream(repo, "model", name, revision, headers=headers)
        except _library().errors.APIError as error:
            if error.status_code != 416:
                raise
            yield transfer.refused()
            return
        with answer:
            yield transfer.answered(answer.status_code, answer.headers, _chunks(answer), start)


def _chunks(answer: Any) -> Iterator[bytes]:
    """What has come, as it comes: one that waits for a whole block never sees that a server trickles."""
    while chunk := answer.raw.read1(BLOCK, decode_content=True):
        yield chunk


# --- failures


@contextmanager
def _mapped(repo: str, revision: str | None) -> Iterator[None]:
    """Turn all that the client raises into our errors, with nothing of the server's own words in them."""
    try:
        with contextlib.redirect_stdout(None), _wired(repo, revision):
            yield
    except wire.Passing as error:
        raise error.final() from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # parsing of an answer
        raise NetworkError("E-REMOTE", repo, "the answer is not that of ModelScope") from error


@contextmanager
def _wired(repo: str, revision: str | None) -> Iterator[None]:
    errors, broken = _library().errors, importlib.import_module("urllib3").exceptions.HTTPError
    try:
        yield
    except errors.NotExistError as error:
        raise NetworkError(
            "E-REPO", repo, f"does not exist or has no revision {revision or BRANCH}"
        ) from error
    except (errors.AuthenticationError, errors.PermissionDeniedError) as error:
        raise NetworkError("E-GATED", repo, "is not open to you", hint=f"set {TOKEN}") from error
    except errors.HubError as error:
        raise _refusal(repo, error) from error
    except (ConnectionError, TimeoutError, broken) as error:
        raise wire.Passing("E-NETWORK", repo, "ModelScope cannot be reached") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise wire.Passing("E-NETWORK", repo, "ModelScope cannot be reached") from error


def _refusal(repo: str, error: Any) -> NetworkError:
    fact = "ModelScope cannot be reached or does not answer well"
    if not error.retryable:
        return NetworkError("E-NETWORK", repo, fact)
    found = wire.Passing("E-NETWORK", repo, fact)
    found.asked = float(getattr(error, "retry_after", None) or 0)
    if found.asked > wire.LONGEST_PAUSE:
        return NetworkError("E-RATE", repo, f"asks to wait {found.asked:,.0f} s before the next try")
    return found
