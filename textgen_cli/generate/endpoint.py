"""One OpenAI-compatible server: one call to it, and when a call is tried again.

A call that fails is tried again unless a part of its text has been handed on: text that was shown cannot
be taken back, so the record then ends with an error.
The key goes to the endpoint's own host and never into a message. No redirect is followed. Knows no order among calls.
"""

import asyncio
import itertools
import json
import random
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import httpx2

from textgen_cli import __version__
from textgen_cli.errors import NetworkError, TextgenError, UsageError
from textgen_cli.events import Notice
from textgen_cli.generate.address import base_url, is_loopback, read_key, unreachable
from textgen_cli.generate.openai_api import (
    EXTENSIONS,
    Answer,
    Asked,
    check_extensions,
    cut_logprobs,
    extensions,
    flaw,
    read_choices,
    read_json,
    read_usage,
    request_body,
)
from textgen_cli.generate.refusal import CallFailed, quoted, refusal, retry_after, wants_other_fields
from textgen_cli.generate.request import Chunk, Completion, Request
from textgen_cli.text.stops import StopFinder

ERROR_BYTES = 64 * 2**10  # read of a refusal; the rest is left unread
LONGEST_BACKOFF = 30.0  # seconds

Usage = tuple[int | None, int | None]
Emit = Callable[[Chunk], None]
Notify = Callable[[Notice], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """How long to wait for a server, in seconds, how often to ask, how much to read."""

    connect: float = 10.0
    answer: float = 600.0  # until a stream's first piece, or until a whole answer
    stall: float = 60.0  # between two pieces of a stream
    retry_after: float = 300.0  # a server that asks for more is given up
    backoff: float = 0.5  # before the second try; doubles, with jitter
    tries: int = 6
    answer_bytes: int = 64 * 2**20  # an answer longer than this is not text


class Endpoint:
    """A server that is asked for texts."""

    def __init__(self, address: str, asked: Asked, limits: Limits) -> None:
        self.asked = asked
        self._base = base_url(address)
        self.subject = str(self._base)
        self._limits = limits
        self._loopback = is_loopback(self._base.host)
        self._key = read_key(self._base, self._loopback)
        self._refused: set[str] = set()  # fields that are ours, not the user's, and unknown to this server

    def client(self, connections: int) -> httpx2.AsyncClient:
        """A client for one event loop; proxies are those of the environment."""
        headers = {"User-Agent": f"textgen/{__version__}", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        host = f"[{self._base.host}]" if ":" in self._base.host else self._base.host
        try:
            return httpx2.AsyncClient(
                headers=headers,
                timeout=httpx2.Timeout(None, connect=self._limits.connect),
                limits=httpx2.Limits(max_connections=connections),
                # What stays on this machine is no proxy's business.
                mounts={f"all://{host}": None} if self._loopback else None,
                verify=self._tls,
            )
        except (ValueError, ImportError, httpx2.InvalidURL):  # ImportError: socks without its package
            raise UsageError("E-PROXY", "proxy", "the address in the environment cannot be used") from None

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        if self._base.scheme == "http":
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody and costs nothing: no TLS happens
        return httpx2.create_ssl_context()

    async def settled(self, client: httpx2.AsyncClient, server: str | None, notify: Notify) -> str | None:
        """The kind of `server`, which is asked for it where decoding options depend on it and None is known.

        Raises UsageError for an option that it lacks or may ignore.
        """
        decoding = self.asked.decoding
        if not extensions(decoding):
            return server
        server = server or await self.server_kind(client, notify)
        check_extensions(decoding, server, self.subject)
        return server

    async def server_kind(self, client: httpx2.AsyncClient, notify: Notify) -> str:
        """What the server calls itself in its model list; "unknown" where that says nothing."""

        async def models() -> object:
            try:
                async with self._open(client, "models", None) as (response, _):
                    return read_json(await self._read(response), self.subject, self._key).get("data")
            except NetworkError as error:
                if error.name == "E-ENDPOINT-PATH" or (isinstance(error, CallFailed) and error.alone):
                    return None  # no list, or a broken one
                raise

        listed = await self._persist(models, notify)
        cards = [card for card in listed if isinstance(card, dict)] if isinstance(listed, list) else []
        card = next((card for card in cards if card.get("id") == self.asked.model), cards[0] if cards else {})
        owner = card.get("owned_by")
        return owner if isinstance(owner, str) and owner in EXTENSIONS else "unknown"

    async def call(
        self,
        client: httpx2.AsyncClient,
        requests: Sequence[Request],
        emit: Emit,
        notify: Notify,
        *,
        streamed: bool,
    ) -> None:
        """Generate the sequences of one record; a failure of this record alone is in its last chunks.

        Raises NetworkError, ModelError or UsageError where the run cannot go on.
        """
        shown = False

        def show(chunk: Chunk) -> None:
            nonlocal shown
            shown = True
            emit(chunk)

        async def attempt() -> None:
            await (
                self._stream(client, requests[0], show) if streamed else self._whole(client, requests, show)
            )

        try:
            await self._persist(attempt, notify, lambda: shown)
        except CallFailed as failure:
            if not (failure.alone or shown):
                raise
            for request in requests:
                emit(_failed(request, failure))

    async def _persist(
        self, attempt: Callable[[], Awaitable[T]], notify: Notify, shown: Callable[[], bool] = lambda: False
    ) -> T:
        """Try until it succeeds, nothing may be tried again, or the tries are over."""
        for number in itertools.count(1):
            try:
                return await attempt()
            except CallFailed as failure:
                if not failure.retry or shown() or number >= self._limits.tries:
                    raise
                wait = self._backoff(number) if failure.wait is None else failure.wait
                notify(Notice(f"{self.subject} {failure.fact}; trying again in {wait:.1f} s"))
                await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    def _backoff(self, number: int) -> float:
        """Seconds before the next try; the jitter keeps many clients from coming back together."""
        return min(self._limits.backoff * 2.0 ** (number - 1), LONGEST_BACKOFF) * random.uniform(0.5, 1.5)

    async def _whole(self, client: httpx2.AsyncClient, requests: Sequence[Request], show: Emit) -> None:
        body = self._body(requests)
        async with self._open(client, "completions", body) as (response, _):
            self._check_type(response, streamed=False)
            value = read_json(await self._read(response), self.subject, self._key)
        self._finish_whole(value, requests, show)

    def _finish_whole(self, value: dict[str, Any], requests: Sequence[Request], show: Emit) -> None:
        """Hand on the sequences of one whole answer."""
        answers = read_choices(value, self.subject, "message")
        if len(answers) < len(requests) or set(answers) != set(range(len(answers))):
            fact = f"gave {len(answers)} of {len(requests)} sequences"
            hint = "--split-sequences asks for each by itself"
            raise CallFailed("E-ENDPOINT-IGNORED", self.subject, f"{fact}; {hint}", alone=True)
        usage = read_usage(value) or (None, None)
        if len(requests) > 1:
            usage = (usage[0], None)  # the server counts all sequences together
        for number, request in enumerate(requests):
            answer = answers[number]
            cut = StopFinder(self.asked.stop)
            answer.text = cut.feed(answer.text) + cut.end()
            if cut.found:
                answer.finish_reason = "stop"
            last = self._completion(answer, usage, cut.found)
            show(Chunk(request.index, request.sequence, "" if last.error else answer.text, last))

    async def _stream(self, client: httpx2.AsyncClient, request: Request, show: Emit) -> None:
        answer, cut = Answer(), StopFinder(self.asked.stop)
        usage: Usage = (None, None)
        body = self._body([request]) | {"stream": True}
        if "stream_options" not in self._refused:
            body["stream_options"] = {"include_usage": True}
        try:
            async with self._open(client, "completions", body) as (response, deadline):
                if not self._check_type(response, streamed=True):
                    value = read_json(await self._read(response), self.subject, self._key)
                    self._finish_whole(value, [request], show)
                    return
                async with aclosing(self._events(response, deadline)) as events:
                    async for value in events:
                        usage = read_usage(value) or usage
                        piece = read_choices(value, self.subject, "delta").get(0, Answer())
                        text = cut.feed(piece.text)
                        answer.add(text, piece)
                        if text:
                            show(Chunk(request.index, request.sequence, text))
                        if cut.found:
                            answer.finish_reason, usage = "stop", (usage[0], None)
                            break  # the server may not know of the stop string
        except CallFailed:
            if answer.finish_reason is None:
                raise
        if answer.finish_reason is None:
            raise CallFailed("E-ENDPOINT-CUT", self.subject, "the stream ended early", retry=True)
        rest = cut.end()
        answer.text += rest
        show(Chunk(request.index, request.sequence, rest, self._completion(answer, usage, cut.found)))

    async def _events(
        self, response: httpx2.Response, deadline: asyncio.Timeout
    ) -> AsyncGenerator[dict[str, Any]]:
        """The objects of a stream until [DONE] or its end; comments do not keep it alive."""
        loop = asyncio.get_running_loop()
        size = 0
        async for event in httpx2.EventSource(response):
            deadline.reschedule(loop.time() + self._limits.stall)
            if event.data == "[DONE]":
                return
            if not event.data:
                continue
            size += len(event.data)
            if size > self._limits.answer_bytes:
                raise CallFailed("E-ENDPOINT-ANSWER", self.subject, "the answer has no end", alone=True)
            value = read_json(event.data, self.subject, self._key)
            if "choices" in value:
                yield value

    def _completion(self, answer: Answer, usage: Usage, was_cut: bool) -> Completion:
        """How a sequence ended; an answer that lacks what was asked for is an error."""
        error = flaw(self.asked, answer, self.subject)
        if error is not None:
            return Completion("error", *usage, error=error)
        logprobs = None if self.asked.logprobs is None else answer.logprobs or []
        if logprobs and was_cut:
            logprobs = cut_logprobs(logprobs, len(answer.text))
        return Completion(answer.finish_reason or "error", *usage, logprobs=logprobs)

    def _body(self, requests: Sequence[Request]) -> dict[str, Any]:
        body = request_body(self.asked, requests[0], len(requests))
        if "max_tokens" in self._refused:
            body["max_completion_tokens"] = body.pop("max_tokens")
        return body

    @asynccontextmanager
    async def _open(
        self, client: httpx2.AsyncClient, path: str, body: dict[str, Any] | None
    ) -> AsyncIterator[tuple[httpx2.Response, asyncio.Timeout]]:
        """Send a call and hold its answer; every failure on the way becomes one of our errors."""
        if body is not None and "messages" in body:
            path = "chat/" + path
        # ASCII: half a surrogate pair in a prompt stays sendable.
        content = None if body is None else json.dumps(body).encode("ascii")
        headers = {} if content is None else {"Content-Type": "application/json"}
        url = self._base.copy_with(path=f"{self._base.path}/{path}")
        try:
            async with (
                asyncio.timeout(self._limits.answer) as deadline,
                client.stream(
                    "GET" if content is None else "POST", url, content=content, headers=headers
                ) as response,
            ):
                if response.status_code != 200:
                    raise await self._refusal(response, body or {})
                yield response, deadline
        except TimeoutError:
            fact = "has stopped answering"
            raise CallFailed("E-ENDPOINT-STALLED", self.subject, fact, retry=True) from None
        except httpx2.RequestError as error:
            raise unreachable(error, self._limits.connect, self.subject, self._key) from None

    async def _refusal(self, response: httpx2.Response, body: dict[str, Any]) -> TextgenError:
        status = response.status_code
        data = bytearray()
        async for piece in response.aiter_bytes():
            data += piece
            if len(data) > ERROR_BYTES:
                break
        text = data.decode("utf-8", "replace")
        if 300 <= status < 400:
            target = quoted(response.headers.get("location", "nowhere").partition("?")[0], self._key)
            hint = "give the final address as --endpoint"
            return NetworkError("E-REDIRECT", self.subject, f"redirects to {target}", hint=hint)
        if other := wants_other_fields(status, text, body):
            self._refused.add(other)
            return CallFailed("E-ENDPOINT", self.subject, f"refuses {other}", retry=True, wait=0.0)
        error = refusal(status, text, body, self.asked.model, self.subject, self._key)
        if isinstance(error, CallFailed):
            error.wait = retry_after(response.headers.get("retry-after", ""))
            if error.wait is not None and error.wait > self._limits.retry_after:
                error.retry, error.hint = False, f"the server asks to wait {error.wait:.0f} s"
        return error

    def _check_type(self, response: httpx2.Response, *, streamed: bool) -> bool:
        """Whether the answer is a stream of events; raise where it is neither that nor JSON."""
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            return False
        if streamed and kind == "text/event-stream":
            return True
        fact = f"answers with {quoted(kind, self._key) or 'data of no type'}, not JSON"
        hint = "is this the address of an API, or a proxy's?"
        raise CallFailed("E-ENDPOINT-ANSWER", self.subject, fact, hint=hint)

    async def _read(self, response: httpx2.Response) -> bytes:
        """The whole answer."""
        data = bytearray()
        async for piece in response.aiter_bytes():
            data += piece
            if len(data) > self._limits.answer_bytes:
                raise CallFailed("E-ENDPOINT-ANSWER", self.subject, "the answer has no end", alone=True)
        return bytes(data)


def _failed(request: Request, failure: CallFailed) -> Chunk:
    return Chunk(request.index, request.sequence, "", Completion("error", None, None, error=failure))
