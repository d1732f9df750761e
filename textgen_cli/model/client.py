"""The one door to a Hub: huggingface_hub's own client, with our checks between it and every server.

Owns where the token may go, how long a silent server is waited for and which of our errors a failure is. What
a server may say stands in `wire.py`. Files come over plain HTTP: Xet would fetch past these checks.

Bounds in time: 10 s for a connection or a silent server (HF_HUB_ETAG_TIMEOUT for answers about a repository,
HF_HUB_DOWNLOAD_TIMEOUT for files), four tries with pauses of at most 4 s, Retry-After up to 5 minutes.
"""

import functools
import logging
import os
import re
import ssl
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urljoin, urlsplit

# The library reads these when it is imported.
for _name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK", "DISABLE_SAFETENSORS_CONVERSION",
              "HF_HUB_DISABLE_XET"):  # fmt: skip
    os.environ.setdefault(_name, "1")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import httpx2
    import huggingface_hub
    from huggingface_hub import constants, errors
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
    from huggingface_hub.utils.logging import set_verbosity

from textgen_cli.errors import NetworkError, OutputError, TextgenError, UsageError
from textgen_cli.events import Notice, Report
from textgen_cli.model import transfer, wire
from textgen_cli.model.transfer import Body

HUBS = ("https://huggingface.co", "https://hf.co")  # the only ones that ever get a token
RETRIED = (408, 429, 500, 502, 503, 504)
PAUSES = (1.0, 2.0, 4.0)  # seconds
MAX_REDIRECTS = 5
LISTING_LIMIT = 50_000  # entries of a repository

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A repository on a Hub or a mirror of it."""

    repo: str
    endpoint: str

    @property
    def host(self) -> str | None:
        return urlsplit(self.endpoint).hostname

    @property
    def api(self) -> huggingface_hub.HfApi:
        return huggingface_hub.HfApi(endpoint=self.endpoint, token=token(self.endpoint))


def place(repo: str, mirror: str | None, report: Report) -> Place:
    """A repository where the user wants it from: --mirror, else HF_ENDPOINT. UsageError E-ENDPOINT."""
    _take_over()
    subject, endpoint = ("--mirror", mirror.rstrip("/")) if mirror else ("HF_ENDPOINT", constants.ENDPOINT)
    try:
        scheme, host, _ = wire.origin(endpoint)
    except ValueError:
        scheme, host = "", None
    if scheme not in ("http", "https") or not host:
        raise UsageError("E-ENDPOINT", subject, "is not an http or https address")
    if scheme == "http" and not wire.is_loopback(host):
        fact = f"{subject} is not https; what it sends can be altered on the way"
        report(Notice(f"{host}: {fact}", "W-ENDPOINT"))
    return Place(repo, endpoint)


def token(endpoint: str) -> bool | None:
    """None: the user's own token, as the library finds it. False: no token, since the host is not the Hub."""
    if wire.origin(endpoint) not in map(wire.origin, HUBS):
        return False
    if not re.fullmatch(r"[!-~]*", os.environ.get("HF_TOKEN", "").strip()):
        raise UsageError("E-TOKEN-FORM", "HF_TOKEN", "holds characters that no token has")
    return None


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    return bool(constants.HF_HUB_OFFLINE)


def cache_folder() -> Path:
    """The cache that all tools of the Hub share on this machine. OutputError E-NO-HOME."""
    cache = Path(constants.HF_HUB_CACHE)
    if cache.parts[:1] and cache.parts[0].startswith("~"):
        raise OutputError(
            "E-NO-HOME", "cache", "there is no home folder to keep models in", hint="set HF_HOME"
        )
    return cache.absolute()


def scanned() -> huggingface_hub.HFCacheInfo:
    """What is in that cache; empty where there is none."""
    try:
        return huggingface_hub.scan_cache_dir(cache_folder())
    except errors.CacheNotFound:
        return huggingface_hub.HFCacheInfo(0, frozenset(), frozenset(), [])


def delete(repo: str, commit: str) -> None:
    """Take a commit of a repository out of that cache, with the content that no other one has. Raises OSError."""
    found = scanned()
    own = frozenset(one for one in found.repos if (one.repo_id, one.repo_type) == (repo, "model"))
    replace(found, repos=own).delete_revisions(commit).execute()


@functools.cache
def _take_over() -> None:
    set_verbosity(logging.CRITICAL)
    huggingface_hub.set_client_factory(_client)


def _client() -> httpx2.Client:
    hooks: dict[str, list[Callable[..., Any]]] = {"request": [_bound_time], "response": [_check_response]}
    try:
        return httpx2.Client(
            event_hooks=hooks, follow_redirects=True, max_redirects=MAX_REDIRECTS, timeout=None
        )
    except (ValueError, ImportError, httpx2.InvalidURL):  # ImportError: socks without its package
        raise UsageError("E-PROXY", "proxy", "the address in the environment cannot be used") from None


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
        wire.check_redirect(source, urljoin(source, response.headers["location"]))


def commit_of(where: Place, revision: str | None, *, patient: bool) -> Any:
    """What the server names as the commit of a revision; only a patient call tries again."""
    limit = constants.HF_HUB_ETAG_TIMEOUT

    def ask() -> Any:
        return where.api.model_info(where.repo, revision=revision or "main", timeout=limit).sha

    return call(ask, where, revision, pauses=PAUSES if patient else ())


def tree(where: Place, commit: str, *, deep: bool) -> list[tuple[str, Any, Any, bool]]:
    """Name, size, hash and "is it a sha256" of the files of a commit, nothing checked; `deep`: those in folders, too.

    Raises NetworkError E-REMOTE for an endless list.
    """

    def ask() -> list[Any]:
        return list(
            islice(where.api.list_repo_tree(where.repo, revision=commit, recursive=deep), LISTING_LIMIT + 1)
        )

    entries = call(ask, where, commit, pauses=())
    if len(entries) > LISTING_LIMIT:
        raise NetworkError("E-REMOTE", where.repo, f"has more than {LISTING_LIMIT:,} files")
    return [
        (str(entry.path), entry.lfs.size, entry.lfs.sha256, True)
        if entry.lfs
        else (str(entry.path), entry.size, entry.blob_id, False)
        for entry in entries
        if isinstance(entry, RepoFile)
    ]


@contextmanager
def body(
    where: Place, commit: str, name: str, start: int, etag: str | None, *, until: int | None = None
) -> Iterator[Body]:
    """The bytes of a file from `start` on, if it still has the ETag; the whole file where the server thinks otherwise.

    `until`: the number of bytes from the beginning that are asked for at most.

    Raises wire.Passing for what is worth another try, else NetworkError.
    """
    url = f"{where.endpoint}/{where.repo}/resolve/{commit}/{quote(name)}"
    headers = {**build_hf_headers(token=token(where.endpoint)), "Accept-Encoding": "identity"}
    if start or until:
        headers["Range"] = f"bytes={start}-{until - 1 if until else ''}"
        if etag:
            headers["If-Range"] = etag
    with (
        _wired(where, commit),
        get_session().stream(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as answer,
    ):
        if answer.status_code == 416:
            yield transfer.refused()
            return
        hf_raise_for_status(answer)
        _check_answers([*answer.history, answer])
        yield transfer.answered(answer.status_code, answer.headers, answer.iter_bytes(), start)


def _check_answers(answers: list[httpx2.Response]) -> None:
    """On the way to a file one answer at least must be that of a Hub; storage behind it says nothing of commits."""
    for answer in answers:
        try:
            wire.check_headers(answer.request.url.host, answer.headers)
        except NetworkError:
            if answer is answers[-1]:
                raise
        else:
            return


# --- failures


def call(ask: Callable[[], T], where: Place, revision: str | None, *, pauses: Iterable[float] = PAUSES) -> T:
    """Call, and again after each pause while the server fails in a way that passes; then raise our error."""
    remaining = iter(pauses)
    while True:
        try:
            with mapped(where, revision):
                return ask()
        except wire.Passing as error:
            broken = httpx2.ReadError | httpx2.RemoteProtocolError
            refused = isinstance(error.__cause__, errors.HfHubHTTPError | broken)
            pause = next(remaining, None) if refused else None
            if pause is None:
                raise error.final() from error.__cause__
            asked = error.asked
        time.sleep(max(pause, asked))


@contextmanager
def mapped(where: Place, revision: str | None) -> Iterator[None]:
    """Turn what the library raises into our errors; nothing of the server's own text or address gets in."""
    try:
        with _wired(where, revision):
            yield
    except TextgenError:
        raise
    except OSError as error:
        fact = (error.strerror or str(error)).lower()
        raise OutputError("E-WRITE", error.filename or constants.HF_HUB_CACHE, fact) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # parsing of an answer
        raise NetworkError("E-REMOTE", where.repo, "the answer is not that of a Hub") from error


@contextmanager
def _wired(where: Place, revision: str | None) -> Iterator[None]:
    try:
        yield
    except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as error:
        raise _failure(error, where, revision) from error


def _failure(error: BaseException, where: Place, revision: str | None) -> NetworkError:
    repo, host = where.repo, where.host
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(error, repo, revision)
    if isinstance(error, httpx2.ProxyError):
        return NetworkError("E-PROXY", repo, "the proxy refuses the connection")
    if any(isinstance(link, ssl.SSLCertVerificationError) for link in _chain(error)):
        return NetworkError("E-TLS", repo, f"the certificate of {host} is not valid here")
    if isinstance(error, httpx2.TooManyRedirects):
        return NetworkError("E-REDIRECT", repo, f"{host} redirects more than {MAX_REDIRECTS} times")
    if isinstance(error, httpx2.TimeoutException):
        return wire.Passing("E-NETWORK", repo, f"{host} does not answer in time")
    if isinstance(error, httpx2.ConnectError):
        unreached = wire.Passing("E-NETWORK", repo, f"{host} cannot be reached")
        unreached.reached = False
        return unreached
    return wire.Passing("E-NETWORK", repo, f"the connection to {host} broke off")


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
    kind = wire.Passing if status in RETRIED else NetworkError
    if status == 429:
        found = kind("E-RATE", repo, "the server takes no more requests for now")
    else:
        found = kind("E-NETWORK", repo, f"the server answers with status {status}")
    if isinstance(found, wire.Passing):
        found.asked = wire.asked_pause(error.response.headers)
    return found


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
