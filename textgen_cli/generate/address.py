"""Where a server is and who may speak to it: its address, the key for it, and why it cannot be reached.

The key comes from TEXTGEN_API_KEY and never travels over plain http except on the loopback.
"""

import ipaddress
import os
import re
import ssl

import httpx2

from textgen_cli.errors import SafetyError, UsageError
from textgen_cli.generate.refusal import CallFailed, quoted

KEY_VARIABLE = "TEXTGEN_API_KEY"


def base_url(address: str) -> httpx2.URL:
    """The address of an API without a slash at its end; /v1 where it names a host alone.

    Raises UsageError for anything but http(s)://host[:port][/path].
    """
    try:
        url = httpx2.URL(address)
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    host = url.raw_host.decode("ascii")
    usable = re.fullmatch(r"[\w.:-]+", host) and all(len(label) <= 63 for label in host.split("."))
    if url.scheme not in ("http", "https") or not usable or not 0 < (url.port or 80) < 65536:
        raise UsageError(
            "E-ENDPOINT",
            "--endpoint",
            "is not an http or https address",
            hint="for example http://127.0.0.1:8000/v1",
        )
    if url.userinfo or url.query or url.fragment:
        raise UsageError(
            "E-ENDPOINT",
            "--endpoint",
            "holds more than host, port and path",
            hint=f"the key goes into {KEY_VARIABLE}",
        )
    return url.copy_with(path=url.path.rstrip("/") or "/v1")


def is_loopback(host: str) -> bool:
    """Whether that host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_key(base: httpx2.URL, loopback: bool) -> str | None:
    """The key in the environment, if any; SafetyError E-INSECURE-KEY where others would see it on its way."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        return None
    if not (key.isascii() and key.isprintable()):
        raise UsageError("E-KEY", KEY_VARIABLE, "holds characters that no header can carry")
    if base.scheme == "http" and not loopback:
        raise SafetyError(
            "E-INSECURE-KEY",
            KEY_VARIABLE,
            f"would travel in the open to {base.host}",
            hint="use https, or unset the key",
        )
    return key


def unreachable(error: httpx2.RequestError, patience: float, subject: str, key: str | None) -> CallFailed:
    """Why no answer came; `patience`: seconds that a connection was waited for."""
    if isinstance(error, httpx2.ConnectTimeout):
        fact = f"no connection within {patience:g} s"
        return CallFailed("E-NETWORK", subject, fact, retry=True)
    words = quoted(str(error) or type(error).__name__, key)
    if isinstance(error, httpx2.ProxyError):
        return CallFailed("E-PROXY", subject, words)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return CallFailed("E-TLS", subject, words)
        cause = cause.__cause__ or cause.__context__
    return CallFailed("E-NETWORK", subject, words, retry=True)
