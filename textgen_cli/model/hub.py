"""Models from the Hugging Face Hub, through huggingface_hub's own client and cache.

Owns which files are fetched, where the token may go and which of our errors a failure is. What a server may
say stands in `wire.py`, what is in the cache already in `snapshot.py`.

Bounds in time: 10 s for a connection or a silent server (HF_HUB_ETAG_TIMEOUT for answers about files,
HF_HUB_DOWNLOAD_TIMEOUT for the rest), six tries with pauses of at most 8 s, Retry-After up to 5 minutes.
"""

import functools
import logging
import os
import re
import shutil
import ssl
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urljoin, urlsplit

# The library reads these when it is imported. Xet fetches past the checks below, so it must be asked for.
_xet_is_chosen = "HF_HUB_DISABLE_XET" in os.environ
for _name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK", "DISABLE_SAFETENSORS_CONVERSION",
              "HF_HUB_DISABLE_XET"):  # fmt: skip
    os.environ.setdefault(_name, "1")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import httpx2
    import huggingface_hub
    from huggingface_hub import constants, errors
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils.logging import set_verbosity

from textgen_cli.errors import NetworkError, OutputError, TextgenError, UsageError
from textgen_cli.events import Notice, Progress, Report
from textgen_cli.model import snapshot, wire
from textgen_cli.model.check import LOADABLE
from textgen_cli.model.snapshot import Cached, File
from textgen_cli.model.weights import ADAPTER, INDEX, SINGLE, no_weights
from textgen_cli.model.wire import COMMIT

HUBS = ("https://huggingface.co", "https://hf.co")  # the only ones that ever get a token
constants.HF_HUB_DISABLE_XET = (
    constants.HF_HUB_DISABLE_XET or not _xet_is_chosen
)  # where it was imported before

T = TypeVar("T")

RETRIED = (408, 429, 500, 502, 503, 504)
FAILED = (500, 502, 503, 504)  # what the library does not try again while it reads a file
PAUSES = (1.0, 2.0, 4.0)  # seconds, where the library does not try again by itself
LISTING_LIMIT = 50_000  # entries in the top folder of a repository
MAX_REDIRECTS = 5


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository on disk, every file of it compared with its hash."""

    folder: Path
    commit: str
    repo: str


def fetch(repo: str, revision: str | None, *, offline: bool, report: Report) -> Snapshot:
    """Bring a model of the Hub into the cache, or find it there; only the files that loading needs.

    A commit that is whole in the cache opens no connection; a branch or tag costs one request. Where that
    fails for want of a network and the cache has an older answer, it is used with a warning.

    Raises NetworkError, UsageError, SafetyError E-PICKLE, ModelError (E-HASH, E-WEIGHTS, E-ADAPTER) and
    OutputError (E-SPACE, E-WRITE, E-NO-HOME).
    """
    home = _home(repo)
    pinned = revision if revision and COMMIT.fullmatch(revision) else None
    known = pinned or snapshot.ref(home, revision or "main")
    if offline or constants.HF_HUB_OFFLINE:
        if known and snapshot.whole(Cached(home, known), listed=False):
            return Snapshot(Cached(home, known).folder, known, repo)
        raise NetworkError("E-OFFLINE", repo, "is not in the cache, and --offline or HF_HUB_OFFLINE is set")
    if pinned and snapshot.whole(Cached(home, pinned), listed=True):
        return Snapshot(Cached(home, pinned).folder, pinned, repo)
    _prepare(report)
    try:
        commit = _resolve(repo, revision, patient=known is None)
    except NetworkError as error:
        if (
            error.name not in ("E-NETWORK", "E-RATE")
            or not known
            or not snapshot.whole(Cached(home, known), listed=False)
        ):
            raise
        report(Notice(f"{repo}: {error.fact}; using commit {known[:12]} from the cache", "W-CACHED-REVISION"))
        return Snapshot(Cached(home, known).folder, known, repo)
    cached = Cached(home, commit)
    if not snapshot.whole(cached, listed=True):
        _complete(repo, cached, report)
    if not pinned:
        snapshot.write_ref(home, revision or "main", commit)
    return Snapshot(cached.folder, commit, repo)


def _home(repo: str) -> Path:
    cache = Path(constants.HF_HUB_CACHE)
    if cache.parts[:1] and cache.parts[0].startswith("~"):
        raise OutputError(
            "E-NO-HOME", "cache", "there is no home folder to keep models in", hint="set HF_HOME"
        )
    return cache.absolute() / f"models--{repo.replace('/', '--')}"


# --- the client


def _prepare(report: Report) -> None:
    """Make the library quiet and put our checks between it and every server."""
    _take_over()
    try:
        scheme, host, _ = wire.origin(constants.ENDPOINT)
    except ValueError:
        scheme, host = "", None
    if scheme not in ("http", "https") or not host:
        raise UsageError("E-ENDPOINT", "HF_ENDPOINT", "is not an http or https address")
    if scheme == "http" and not wire.is_loopback(host):
        fact = "HF_ENDPOINT is not https; what it sends can be altered on the way"
        report(Notice(f"{host}: {fact}", "W-ENDPOINT"))


@functools.cache
def _take_over() -> None:
    set_verbosity(logging.CRITICAL)
    huggingface_hub.set_client_factory(_client)


def _client() -> httpx2.Client:
    hooks: dict[str, list[Callable[..., Any]]] = {"request": [_bound_time], "response": [_check_response]}
    return httpx2.Client(event_hooks=hooks, follow_redirects=True, max_redirects=MAX_REDIRECTS, timeout=None)


def _bound_time(request: httpx2.Request) -> None:
    """Some calls of the library wait for ever."""
    timeout = request.extensions.get("timeout", {})
    limits = {
        key: timeout.get(key) or constants.HF_HUB_DOWNLOAD_TIMEOUT
        for key in ("connect", "read", "write", "pool")
    }
    request.extensions = {**request.extensions, "timeout": limits}


def _check_response(response: httpx2.Response) -> None:
    source = str(response.request.url)
    if response.status_code in RETRIED:
        wire.check_pause(response.request.url.host, response.headers)
    if response.has_redirect_location:
        target = urljoin(source, response.headers["location"])
        wire.check_redirect(source, target)
        if wire.origin(target) in {wire.origin(url) for url in (source, constants.ENDPOINT, *HUBS)}:
            return  # the library goes on to the target and ignores what stands here
    if response.request.method == "HEAD" and response.status_code < 400:
        wire.check_headers(response.request.url.host, response.headers)


def _token() -> bool | None:
    """None: the user's own token, as the library finds it. False: no token, since the host is not the Hub."""
    if wire.origin(constants.ENDPOINT) not in map(wire.origin, HUBS):
        return False
    if not re.fullmatch(r"[!-~]*", os.environ.get("HF_TOKEN", "").strip()):
        raise UsageError("E-TOKEN-FORM", "HF_TOKEN", "holds characters that no token has")
    return None


# --- the steps


def _resolve(repo: str, revision: str | None, *, patient: bool) -> str:
    """The commit that a revision means now. Only a patient call tries again: the cache may have an answer."""
    api = huggingface_hub.HfApi(endpoint=constants.ENDPOINT, token=_token())

    def ask() -> Any:
        return api.model_info(repo, revision=revision or "main", timeout=constants.HF_HUB_ETAG_TIMEOUT).sha

    commit = _try(ask, repo, revision, pauses=PAUSES if patient else ())
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise NetworkError("E-REMOTE-HEADER", repo, "the server names no commit for it")
    if revision and COMMIT.fullmatch(revision) and commit != revision:
        raise NetworkError("E-REMOTE", repo, f"the server answers commit {commit[:12]} for {revision[:12]}")
    return commit


def _complete(repo: str, cached: Cached, report: Report) -> None:
    """Fetch what the snapshot lacks and check all of it."""
    files = _listing(repo, cached.commit)
    missing = [file for file in files if not snapshot.present(cached, file)]
    total = sum(file.size for file in missing)
    _check_space(cached.home, total, repo)
    done = 0
    for file in missing:
        _download(repo, cached, file, _meter(report, repo, file, done, total))
        done += file.size
    snapshot.verify(cached, files, listed=True)


def _listing(repo: str, commit: str) -> list[File]:
    """The files of a commit that loading needs, small ones first."""
    api = huggingface_hub.HfApi(endpoint=constants.ENDPOINT, token=_token())

    def ask() -> list[Any]:
        return list(islice(api.list_repo_tree(repo, revision=commit, recursive=False), LISTING_LIMIT + 1))

    entries = _try(ask, repo, commit, pauses=())
    if len(entries) > LISTING_LIMIT:
        raise NetworkError("E-REMOTE", repo, f"has more than {LISTING_LIMIT:,} files")
    found = [entry for entry in entries if isinstance(entry, RepoFile)]
    names = {entry.path for entry in found}
    if not names & {SINGLE, INDEX, ADAPTER}:
        raise no_weights(repo, names)
    wanted = [_file(repo, entry) for entry in found if LOADABLE.fullmatch(str(entry.path))]
    if SINGLE in names:
        wanted = [file for file in wanted if file.name == SINGLE or not file.name.startswith("model") or
                  not file.name.endswith((".safetensors", ".safetensors.index.json"))]  # fmt: skip
    return sorted(wanted, key=lambda file: (file.size, file.name))


def _file(repo: str, entry: RepoFile) -> File:
    size: Any = entry.lfs.size if entry.lfs else entry.size
    digest: Any = entry.lfs.sha256 if entry.lfs else entry.blob_id
    form = "[0-9a-f]{64}" if entry.lfs else "[0-9a-f]{40}"
    if type(size) is not int or size < 0 or not isinstance(digest, str) or not re.fullmatch(form, digest):
        raise NetworkError(
            "E-REMOTE-HEADER", repo, f"the server lists {entry.path!r} without a size and a hash"
        )
    return File(entry.path, size, digest)


def _check_space(home: Path, needed: int, repo: str) -> None:
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OutputError("E-SPACE", repo, f"needs {needed:,} bytes, {existing} has {free:,} free")


def _download(repo: str, cached: Cached, file: File, meter: type[Any]) -> None:
    def get() -> None:
        huggingface_hub.hf_hub_download(
            repo, file.name, revision=cached.commit, cache_dir=cached.home.parent, token=_token(),
            endpoint=constants.ENDPOINT, tqdm_class=meter, etag_timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )  # fmt: skip

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _try(get, repo, cached.commit, statuses=FAILED)


def _meter(report: Report, repo: str, file: File, before: int, total: int) -> type[Any]:
    """The class of bar that the library draws: it reports, and stops a body that is longer than was said."""

    class Meter:
        def __init__(self, **_bar: Any) -> None:
            self.done = 0
            self.update(0)

        def update(self, n: float | None = 1) -> None:
            self.done += int(n or 0)
            if self.done > file.size:
                fact = f"the server sends more than the {file.size:,} bytes of {file.name}"
                raise NetworkError("E-REMOTE", repo, fact)
            report(Progress("download", repo, before + self.done, total, "bytes"))

        def ignore(self, *_: Any, **__: Any) -> None:
            pass

        close = refresh = set_postfix_str = set_transfer_postfix_str = update_transfer = __exit__ = ignore

        def __enter__(self) -> Self:
            return self

    return Meter


# --- failures


def _try(
    call: Callable[[], T], repo: str, revision: str | None, *, pauses: Iterable[float] = PAUSES,
    statuses: tuple[int, ...] = RETRIED,
) -> T:  # fmt: skip
    """Call, and again after each pause while the server fails in a way that passes; then raise our error."""
    remaining = iter(pauses)
    while True:
        try:
            with _mapped(repo, revision):
                return call()
        except NetworkError as error:
            cause = error.__cause__
            refused = isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code in statuses
            pause = next(remaining, None) if refused or isinstance(cause, httpx2.ReadError) else None
            if pause is None:
                raise
            asked = (
                wire.asked_pause(cause.response.headers) if isinstance(cause, errors.HfHubHTTPError) else 0
            )
        time.sleep(max(pause, asked))


@contextmanager
def _mapped(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what the library raises into our errors; nothing of the server's own text or address gets in."""
    try:
        yield
    except TextgenError:
        raise
    except errors.LocalEntryNotFoundError as error:  # what it raises when the question about a file fails
        raise _failure(error.__cause__ or error, repo, revision) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, errors.FileMetadataError) as error:
        raise _failure(error, repo, revision) from error
    except OSError as error:
        if error.errno is not None:
            fact = (error.strerror or str(error)).lower()
            raise OutputError("E-WRITE", error.filename or constants.HF_HUB_CACHE, fact) from error
        raise NetworkError("E-NETWORK", repo, "a file came with another size than announced") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # parsing of an answer
        raise NetworkError("E-REMOTE", repo, "the answer is not that of a Hub") from error


def _failure(error: BaseException, repo: str, revision: str | None) -> NetworkError:
    host = urlsplit(constants.ENDPOINT).hostname
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(error, repo, revision)
    if isinstance(error, errors.FileMetadataError):
        return NetworkError(
            "E-REMOTE-HEADER", repo, f"the answer of {host} lacks a commit, an ETag or a size"
        )
    if isinstance(error, httpx2.ProxyError):
        return NetworkError("E-PROXY", repo, "the proxy refuses the connection")
    if any(isinstance(link, ssl.SSLError) for link in _chain(error)):
        return NetworkError("E-TLS", repo, f"the certificate of {host} is not valid here")
    if isinstance(error, httpx2.TooManyRedirects):
        return NetworkError("E-REDIRECT", repo, f"{host} redirects more than {MAX_REDIRECTS} times")
    if isinstance(error, httpx2.TimeoutException):
        return NetworkError("E-NETWORK", repo, f"{host} does not answer in time")
    if isinstance(error, httpx2.ConnectError):
        return NetworkError("E-NETWORK", repo, f"{host} cannot be reached")
    return NetworkError("E-NETWORK", repo, f"the connection to {host} broke off")


def _refusal(error: errors.HfHubHTTPError, repo: str, revision: str | None) -> NetworkError:
    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return NetworkError("E-GATED", repo, "is not open to you",
                            hint="accept its terms on the Hub and set HF_TOKEN")  # fmt: skip
    if isinstance(error, errors.RevisionNotFoundError):
        return NetworkError("E-NOT-FOUND", repo, f"has no revision {revision or 'main'}")
    if isinstance(error, errors.RemoteEntryNotFoundError) or status in (410, 451):
        return NetworkError("E-NOT-FOUND", repo, f"is no longer offered (status {status})")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return NetworkError(
            "E-REPO", repo, "does not exist or is private", hint="a private one needs HF_TOKEN"
        )
    if status == 407:
        return NetworkError("E-PROXY", repo, "the proxy asks for a login")
    if status == 429:
        return NetworkError("E-RATE", repo, "the server takes no more requests for now")
    return NetworkError("E-NETWORK", repo, f"the server answers with status {status}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
