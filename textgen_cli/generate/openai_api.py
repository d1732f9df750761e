"""The OpenAI-compatible protocol as data: options to request fields, answers to text.

Opens no connection; `endpoint.py` carries what is made and read here. Whatever a server says is untrusted:
types are checked, and an option that it drops is an error.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import UnknownType
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from textgen_cli.config import BUILT_IN, DecodingConfig, option_name
from textgen_cli.errors import UsageError
from textgen_cli.generate.refusal import CallFailed, quoted
from textgen_cli.generate.request import Request

# Decoding fields outside OpenAI's own, by the name a server gives itself as `owned_by` in its model list.
# llama.cpp's repeat_penalty looks back 64 tokens where repetition_penalty looks at all: not the same option.
EXTENSIONS: dict[str, frozenset[str]] = {
    "vllm": frozenset({"top_k", "min_p", "repetition_penalty"}),
    "sglang": frozenset({"top_k", "min_p", "repetition_penalty"}),
    "llamacpp": frozenset({"top_k", "min_p"}),
}
STANDARD = frozenset({"max_new_tokens", "temperature", "top_p"})
SAMPLING = frozenset({"temperature", "top_p", "top_k", "min_p"})  # without meaning where decoding is greedy

# Some servers keep a seed in 32 bits with a sign, and JSON numbers are exact to 53 bits only.
SEED_BITS = 0x7FFF_FFFF

FINISH_REASONS = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "tool_calls": "stop",
    "function_call": "stop",
    "length": "length",
    "content_filter": "filter",
}


@dataclass(frozen=True)
class Asked:
    """What every call of a run asks for beside its text."""

    model: str
    decoding: DecodingConfig
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # alternatives a token; 0: the token's own only
    json_schema: dict[str, Any] | None = None


@dataclass
class Answer:
    """One sequence as it arrives."""

    text: str = ""
    finish_reason: str | None = None
    logprobs: list[dict[str, Any]] | None = None

    def add(self, text: str, piece: "Answer") -> None:
        """Append what a piece of a stream brings; `text` is what remains of its text."""
        self.text += text
        self.finish_reason = self.finish_reason or piece.finish_reason
        if piece.logprobs is not None:
            self.logprobs = (self.logprobs or []) + piece.logprobs


def check_sendable(decoding: DecodingConfig) -> None:
    """Raise UsageError for the first decoding option that the protocol has no field for."""
    for name in ("bad_words", "bias", "set", "prompt_lookup", "draft_model", "watermark"):
        if getattr(decoding, name):
            raise UsageError("E-ENDPOINT-OPTION", option_name(name), "cannot be sent to an endpoint")
    known = STANDARD.union(*EXTENSIONS.values())
    for name, value in decoding.given().items():
        if name not in known and value:
            raise UsageError("E-ENDPOINT-OPTION", option_name(name), "cannot be sent to an endpoint")


def extensions(decoding: DecodingConfig) -> dict[str, Any]:
    """The decoding fields that only some servers know, as they are sent."""
    known = frozenset().union(*EXTENSIONS.values()) - (SAMPLING if decoding.greedy else frozenset())
    return {name: value for name, value in decoding.given().items() if name in known}


def check_extensions(decoding: DecodingConfig, server: str, subject: str) -> None:
    """Raise UsageError for an option that this kind of server lacks or may ignore."""
    missing = sorted(set(extensions(decoding)) - EXTENSIONS.get(server, frozenset()))
    if not missing:
        return
    option = option_name(missing[0])
    if server in EXTENSIONS:
        raise UsageError("E-ENDPOINT-OPTION", option, f"{server} at {subject} has no such option")
    raise UsageError(
        "E-ENDPOINT-OPTION",
        option,
        f"{subject} is of unknown kind and may ignore it",
        hint=f"--endpoint-server ({', '.join(EXTENSIONS)}) names the kind",
    )


def request_body(asked: Asked, request: Request, n: int) -> dict[str, Any]:
    """The JSON body of one call for `n` sequences of one record, not streamed."""
    decoding = asked.decoding
    body: dict[str, Any] = {"model": asked.model}
    if request.messages is not None:
        body["messages"] = list(request.messages)
    else:
        body["prompt"] = request.prompt
    body["max_tokens"] = decoding.max_new_tokens or BUILT_IN["max_new_tokens"]
    if decoding.greedy:
        body["temperature"] = 0
    else:
        pairs = (("temperature", decoding.temperature), ("top_p", decoding.top_p))
        body.update((name, value) for name, value in pairs if value is not None)
        body["seed"] = request.seed & SEED_BITS
    body.update(extensions(decoding))
    if body.get("top_k") == 0:
        body["top_k"] = -1  # "all of them": SGLang knows -1 only, the others both
    if n > 1:
        body["n"] = n
    if asked.stop:
        body["stop"] = list(asked.stop)
    if asked.logprobs is not None:
        chat = {"logprobs": True, "top_logprobs": asked.logprobs}
        body.update(chat if request.messages is not None else {"logprobs": asked.logprobs})
    if asked.json_schema is not None:
        schema = {"name": "output", "schema": asked.json_schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def read_json(data: bytes | str, subject: str, key: str | None) -> dict[str, Any]:
    """The object in an answer; CallFailed (worth another try) where there is none, or it tells an error."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CallFailed("E-ENDPOINT-ANSWER", subject, "the answer is not a JSON object", retry=True)
    if value.get("error"):
        fact = f"fails: {quoted(str(value['error']), key)}"
        raise CallFailed("E-ENDPOINT", subject, fact, retry=True, alone=True)
    return value


def read_choices(value: dict[str, Any], subject: str, piece: str) -> dict[int, Answer]:
    """The choices of an answer by their index; `piece` is "message", or "delta" in a stream."""
    choices = value.get("choices")
    if not isinstance(choices, list):
        raise CallFailed("E-ENDPOINT-ANSWER", subject, "the answer has no choices", retry=True)
    answers = {}
    for choice in choices:
        if isinstance(choice, dict) and isinstance(index := choice.get("index", 0), int):
            holder = choice.get(piece)
            text = holder.get("content") if isinstance(holder, dict) else choice.get("text")
            if isinstance(text, list):  # parts, of which only some are text
                text = "".join(_clean(part.get("text")) for part in _entries(text))
            answers[index] = Answer(
                _clean(text), _finish(choice.get("finish_reason"), subject), _logprobs(choice.get("logprobs"))
            )
    return answers


def read_usage(value: dict[str, Any]) -> tuple[int | None, int | None] | None:
    """(prompt tokens, completion tokens) where the answer counts them."""
    usage = value.get("usage")
    if not isinstance(usage, dict):
        return None
    return _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))


def flaw(asked: Asked, answer: Answer, subject: str) -> CallFailed | None:
    """What is wrong with a finished answer: it was cut, or lacks what was asked for."""
    if answer.finish_reason is None:
        return CallFailed("E-ENDPOINT-ANSWER", subject, "the answer has no finish_reason")
    if asked.logprobs is not None and answer.logprobs is None and answer.text:
        return CallFailed("E-ENDPOINT-IGNORED", subject, "the server ignores --logprobs")
    if asked.json_schema is not None and answer.finish_reason == "stop":
        try:
            value = json.loads(answer.text)
        except (ValueError, RecursionError):
            return CallFailed("E-ENDPOINT-IGNORED", subject, "the server ignores --json-schema: no JSON came")
        if not _fits(value, asked.json_schema):
            fact = "the server ignores --json-schema: the JSON does not fit it"
            return CallFailed("E-ENDPOINT-IGNORED", subject, fact)
    return None


def _fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is of a schema; nothing is fetched, and what a part elsewhere would say is left open."""
    found = validator_for(schema, default=Draft202012Validator)(schema, registry=Registry())
    try:
        return bool(found.is_valid(value))
    except (Unresolvable, UnknownType):
        return True


def cut_logprobs(logprobs: Sequence[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """The tokens that begin within the first `length` characters of the text."""
    kept, at = [], 0
    for token in logprobs:
        if at >= length:
            break
        kept.append(token)
        at += len(token["token"])
    return kept


def _clean(text: object) -> str:
    """Text that UTF-8 can hold: halves of surrogate pairs, which JSON allows, become U+FFFD."""
    if not isinstance(text, str):
        return ""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _finish(reason: object, subject: str) -> str | None:
    if reason is None:
        return None
    if reason not in FINISH_REASONS:
        fact = f"unknown finish_reason {quoted(str(reason), None)}"
        raise CallFailed("E-ENDPOINT-ANSWER", subject, fact, alone=True)
    return FINISH_REASONS[str(reason)]


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _number(value: object) -> float | None:
    """A log-probability in nats; None for what JSON cannot hold."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _logprobs(value: object) -> list[dict[str, Any]] | None:
    """Chat's list of tokens, or the parallel lists of completions, as one list; None where neither came."""
    if not isinstance(value, dict):
        return None
    if isinstance(content := value.get("content"), list):
        return [
            _token(entry) | {"top": [_token(other) for other in _entries(entry.get("top_logprobs"))]}
            for entry in _entries(content)
        ]
    tokens, own, top = (value.get(name) for name in ("tokens", "token_logprobs", "top_logprobs"))
    if not (isinstance(tokens, list) and isinstance(own, list) and len(tokens) == len(own)):
        return None
    top = top if isinstance(top, list) and len(top) == len(tokens) else [None] * len(tokens)
    return [
        {
            "token": _clean(token),
            "logprob": _number(logprob),
            "top": [{"token": _clean(t), "logprob": _number(p)} for t, p in (others or {}).items()]
            if isinstance(others, dict)
            else [],
        }
        for token, logprob, others in zip(tokens, own, top, strict=True)
    ]


def _entries(value: object) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _token(entry: dict[str, Any]) -> dict[str, Any]:
    return {"token": _clean(entry.get("token")), "logprob": _number(entry.get("logprob"))}
