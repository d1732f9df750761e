"""What a server may say: headers that become paths, redirects, pauses. Plain data in, NetworkError out.

Knows no HTTP library and no Hub: `hub.py` asks it about every answer.
"""

import ipaddress
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from textgen_cli.errors import NetworkError

COMMIT = re.compile(r"[0-9a-f]{40}")
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
LONGEST_PAUSE = 300  # seconds; a server that asks for more is an error


class Passing(NetworkError):
    """A failure that may pass: worth another try after a pause, of `asked` seconds at least."""

    asked: float = 0.0
    reached = True  # whether there was a server at all

    def final(self) -> NetworkError:
        """The same as one that no further try will mend."""
        return NetworkError(self.name, self.subject, self.fact, hint=self.hint)


def check_headers(host: str, headers: Mapping[str, str]) -> None:
    """Refuse an answer about a file whose ETag or commit is no hash, for it is not a Hub's: E-REMOTE-HEADER."""
    etag = headers.get("x-linked-etag") or headers.get("etag")
    commit = headers.get("x-repo-commit")
    for name, value, form in (("ETag", etag, DIGEST), ("X-Repo-Commit", commit, COMMIT)):
        bare = (value or "").removeprefix("W/")
        if not form.fullmatch(bare[1:-1] if bare.startswith('"') and bare.endswith('"') else bare):
            raise NetworkError("E-REMOTE-HEADER", host, f"its answer has no {name} that is a hash",
                               hint="HF_ENDPOINT or a proxy may not lead to a Hub")  # fmt: skip


def check_redirect(source: str, target: str) -> None:
    """Refuse a redirect from https to anything else, or from outside to this machine: E-REDIRECT."""
    old, new = urlsplit(source), urlsplit(target)
    host = old.hostname or ""
    if new.scheme != "https" and (old.scheme == "https" or new.scheme != "http"):
        raise NetworkError(
            "E-REDIRECT", host, f"redirects to {new.scheme[:20] or 'nothing'} instead of https"
        )
    if _is_inside(new.hostname or "") and new.hostname != old.hostname:
        raise NetworkError("E-REDIRECT", host, "redirects to an address of this machine or its link")


def check_pause(host: str, headers: Mapping[str, str]) -> None:
    """Refuse to wait for hours, which the client would do: E-RATE."""
    if (pause := asked_pause(headers)) > LONGEST_PAUSE:
        raise NetworkError("E-RATE", host, f"asks to wait {pause:,.0f} s before the next try")


def asked_pause(headers: Mapping[str, str]) -> float:
    """Seconds a server asks to wait, in either header that the client obeys; 0 where it does not say."""
    after = headers.get("retry-after", "").strip()
    reset = re.search(r";\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    numbers = [after if after.isdecimal() else "", reset[1] if reset else ""]
    return max(float(number[:12] or 0) for number in numbers)


def content_range(value: str) -> tuple[int, int | None] | None:
    """Where a part of a file begins and how long the whole is (None: not said); None for a header of no known form."""
    match = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", value)
    return (int(match[1]), None if match[2] == "*" else int(match[2])) if match else None


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port: what must be equal for two addresses to be the same server."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def is_loopback(host: str) -> bool:
    """Whether a host's name can only mean this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_inside(host: str) -> bool:
    try:
        return is_loopback(host) or ipaddress.ip_address(host).is_link_local
    except ValueError:
        return False
