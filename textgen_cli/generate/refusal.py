"""What a server's refusal means: the options or the model are wrong, one record is, or later may be better.

Every word of a server is untrusted: it is escaped, cut, and never holds the key. Opens no connection.
"""

import email.utils
import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime

from textgen_cli.errors import ModelError, NetworkError, TextgenError, UsageError

RETRIED = frozenset({408, 429, 500, 502, 503, 504})
OPTIONS = {
    "n": "--num-return-sequences",
    "stop": "--stop",
    "seed": "--seed",
    "logprobs": "--logprobs",
    "top_logprobs": "--logprobs",
    "response_format": "--json-schema",
    "max_tokens": "--max-new-tokens",
    "max_completion_tokens": "--max-new-tokens",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "min_p": "--min-p",
    "repetition_penalty": "--repetition-penalty",
}
TOO_LONG = re.compile(r"context[ _](length|size|window)|maximum context|exceed_context", re.IGNORECASE)


class CallFailed(NetworkError):
    """One call failed: whether to try again, and whether the record or the whole run fails with it."""

    def __init__(
        self,
        name: str,
        subject: str,
        fact: str,
        *,
        hint: str | None = None,
        retry: bool = False,
        alone: bool = False,
        wait: float | None = None,
    ) -> None:
        super().__init__(name, subject, fact, hint=hint)
        self.retry = retry  # the same call may succeed later
        self.alone = alone  # this record alone fails; the run goes on
        self.wait = wait  # seconds the server asks for; None: our own back-off


def refusal(
    status: int, text: str, sent: Iterable[str], model: str, subject: str, key: str | None
) -> TextgenError:
    """The error for an answer that is not 200; `sent` are the names of the fields of the request."""
    message, param, code = _error_parts(text)
    words = quoted(message, key) or "no reason given"
    fact = f"answers {status}: {words}"
    if status in RETRIED:
        retry = code != "insufficient_quota"
        return CallFailed(
            "E-ENDPOINT-BUSY" if status == 429 else "E-ENDPOINT",
            subject,
            fact,
            retry=retry,
            alone=status == 500,
        )
    if status in (401, 403):
        return NetworkError(
            "E-ENDPOINT-KEY", subject, fact, hint="the server's key goes into TEXTGEN_API_KEY"
        )
    if status == 404 and not (param == "model" or model in message):
        return NetworkError("E-ENDPOINT-PATH", subject, fact, hint="the address usually ends in /v1")
    if status == 404 or param == "model" or f"'{model}'" in message or f"`{model}`" in message:
        return ModelError("E-ENDPOINT-MODEL", model, f"{subject} {fact}")
    if status not in (400, 413, 422):
        return NetworkError("E-ENDPOINT", subject, fact)
    if code == "context_length_exceeded" or TOO_LONG.search(message):
        return CallFailed("E-CONTEXT", subject, fact, alone=True)
    name = param if param in OPTIONS else next((name for name in sent if _names(message, name)), "")
    if name in OPTIONS:
        return UsageError("E-ENDPOINT-OPTION", OPTIONS[name], f"{subject} {fact}")
    return CallFailed("E-ENDPOINT-REFUSED", subject, fact, alone=True)


def wants_other_fields(status: int, text: str, sent: Iterable[str]) -> str | None:
    """The field of ours that a server refuses and the next call can do without."""
    if status not in (400, 422):
        return None
    if "stream_options" in sent and "stream_options" in text:
        return "stream_options"
    # Some say both names when the prompt is too long; that is no wish for the other name.
    if "max_tokens" in sent and "max_completion_tokens" in text and not TOO_LONG.search(text):
        return "max_tokens"
    return None


def retry_after(value: str) -> float | None:
    """Seconds to wait by a Retry-After header, which is a number or a date; None for junk."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:12])
    try:
        when = email.utils.parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def quoted(text: str, key: str | None) -> str:
    """A server's words for a message: on one line, escaped, without the key, at most 200 characters."""
    if key:
        text = text.replace(key, "***")
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[:2000])
    return shown if len(shown) <= 200 else shown[:199] + "…"


def _error_parts(text: str) -> tuple[str, str | None, str | None]:
    """(message, parameter, code) out of the shapes of OpenAI, FastAPI, vLLM and llama.cpp; else the text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text, None, None
    error = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(error, dict) and isinstance(error.get("detail"), list):
        error = next((entry for entry in error["detail"] if isinstance(entry, dict)), error)
        location = error.get("loc")
        place = location[-1] if isinstance(location, list) and location else None
        return str(error.get("msg", text)), place if isinstance(place, str) else None, None
    if not isinstance(error, dict):
        return error if isinstance(error, str) else text, None, None
    found = next((error[k] for k in ("message", "detail", "error") if isinstance(error.get(k), str)), text)
    param, code = error.get("param"), error.get("code")
    return found, param if isinstance(param, str) else None, code if isinstance(code, str) else None


def _names(message: str, name: str) -> bool:
    """Whether a message speaks of a field; English words count only where they are marked as a name."""
    if "_" in name or name == "logprobs":
        return re.search(rf"(?<!\w){name}(?!\w)", message) is not None
    return re.search(rf"^{name}\b|[`'\"]{name}[`'\"]|(?<![\w-]){name}(?=[=:])", message) is not None
