"""The engine that sends requests to an OpenAI-compatible server. Knows no model and no torch.

One request is streamed; several are sent at once, `concurrency` at a time, and come out in the order
they went in. What one call is and when it is tried again stands in `endpoint.py`.
"""

import asyncio
import json
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import groupby
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from textgen_cli.config import DecodingConfig, GenerateConfig, option_name
from textgen_cli.errors import UsageError
from textgen_cli.events import Notice, Report, silent
from textgen_cli.generate.endpoint import Endpoint, Limits
from textgen_cli.generate.openai_api import EXTENSIONS, Asked, check_sendable, extensions
from textgen_cli.generate.request import Chunk, Request

if TYPE_CHECKING:
    from textgen_cli.generate.grammar import Constraint

Items = SimpleQueue[Chunk | Notice | None]


class RemoteEngine:
    """Generates through the server at `endpoint`, an address that usually ends in /v1.

    `stop` cuts texts, `logprobs` asks for that many alternatives a token, `json_schema` for such JSON.
    `split_sequences` asks for each sequence of a record in a call of its own, for servers without `n`.
    `server` (vllm, sglang, llamacpp) says which extensions are known; None asks the server's model list.
    Raises UsageError for options or addresses that cannot be used, SafetyError for a key in the open.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        decoding: DecodingConfig,
        *,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        json_schema: dict[str, Any] | None = None,
        concurrency: int = 8,
        split_sequences: bool = False,
        server: str | None = None,
        limits: Limits | None = None,
        report: Report = silent,
    ) -> None:
        check_sendable(decoding)
        if server is not None and server not in EXTENSIONS:
            raise UsageError("E-ENDPOINT-SERVER", "--endpoint-server", f"is one of {', '.join(EXTENSIONS)}")
        asked = Asked(model, decoding, tuple(stop), logprobs, json_schema)
        self._endpoint = Endpoint(endpoint, asked, limits or Limits())
        self._concurrency = concurrency
        self._split = split_sequences
        self._server = server
        self._report = report

    def stream(self, requests: Sequence[Request], done: Collection[int] = ()) -> Iterator[Chunk]:
        """Yield the text of each request that is not `done`, in order; closing the iterator closes the connections.

        Raises NetworkError, ModelError or UsageError where the server fails the whole run; what concerns
        one record alone is in its last chunk.
        """
        requests = [request for request in requests if request.index not in done]
        if not requests:
            return
        items: Items = SimpleQueue()
        loop = asyncio.new_event_loop()
        task = loop.create_task(self._produce(self._calls(requests), items.put))
        # A thread of its own: pieces are read, and clocks are right, while the reader is slow to take them.
        thread = threading.Thread(target=_drive, args=(loop, task, items), daemon=True)
        thread.start()
        try:
            while (item := items.get()) is not None:
                if isinstance(item, Chunk):
                    yield item
                else:
                    self._report(item)
            task.result()
        finally:
            with suppress(RuntimeError):  # the loop has ended by itself
                loop.call_soon_threadsafe(task.cancel)
            thread.join(timeout=5)
            if task.done() and not task.cancelled():
                task.exception()  # seen; otherwise asyncio reports it on stderr

    def measure(self, messages: Sequence[dict[str, Any]]) -> tuple[None, None]:
        """Only the server can count its tokens, and says so where they are too many."""
        return None, None

    def settle(self) -> None:
        """Find out whether the server has the decoding options that only some have.

        Raises UsageError where it lacks one, NetworkError where it cannot be asked; opens no connection where
        there is nothing to ask.
        """
        if extensions(self._endpoint.asked.decoding):
            asyncio.run(self._settled())

    async def _settled(self) -> None:
        async with self._endpoint.client(1) as client:
            self._server = await self._endpoint.settled(client, self._server, self._report)

    def _calls(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Requests that one call answers: the neighbouring sequences of one record."""
        if self._split:
            return [[request] for request in requests]
        runs = groupby(requests, key=lambda request: (request.index, request.prompt, request.messages))
        return [list(run) for _, run in runs]

    async def _produce(self, calls: list[list[Request]], put: Callable[[Chunk | Notice], None]) -> None:
        """Answer all calls, handing chunks on in the order of the requests."""
        endpoint = self._endpoint
        async with endpoint.client(self._concurrency) as client:
            self._server = await endpoint.settled(client, self._server, put)
            if len(calls) == 1:
                await endpoint.call(client, calls[0], put, put, streamed=len(calls[0]) == 1)
                return
            slots = asyncio.Semaphore(self._concurrency)

            async def collect(call: list[Request]) -> list[Chunk]:
                chunks: list[Chunk] = []
                async with slots:
                    await endpoint.call(client, call, chunks.append, put, streamed=False)
                return chunks

            pending: deque[asyncio.Task[list[Chunk]]] = deque()
            try:
                for call in calls:
                    pending.append(asyncio.create_task(collect(call)))
                    # A slow call holds back at most this many that are done.
                    while len(pending) >= 4 * self._concurrency or (call is calls[-1] and pending):
                        for chunk in await pending.popleft():
                            put(chunk)
            finally:
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)


def open_remote(config: GenerateConfig, constraint: "Constraint | None", report: Report) -> RemoteEngine:
    """The engine of the server that the command line names; UsageError for what it cannot be asked for."""
    if config.model.offline:
        raise UsageError("E-CONFLICT", "--endpoint", "cannot be used with --offline")
    given = [name for name, value in asdict(config.constraint).items() if value and name != "json_schema"]
    given += [name for name in ("adapter", "quantize", "locked") if getattr(config.model, name)]
    given += ["truncate"] if config.prompting.truncate else []
    given += ["top"] if config.prompting.top != 1 else []
    given += ["engine"] if config.engine == "compiled" else []
    if given:
        raise UsageError("E-ENDPOINT-OPTION", option_name(given[0]), "cannot be asked of a server")
    return RemoteEngine(
        config.endpoint.endpoint or "",
        config.model.model,
        config.decoding,
        stop=config.decoding.stop,
        logprobs=config.decoding.logprobs,
        json_schema=None if constraint is None else json.loads(constraint.text),
        concurrency=config.endpoint.concurrency,
        split_sequences=config.endpoint.split_sequences,
        server=config.endpoint.endpoint_server,
        report=report,
    )


def _drive(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None], items: Items) -> None:
    """Run the task to its end, however it ends; None in the queue is the end."""
    try:
        loop.run_until_complete(asyncio.wait([task]))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
        items.put(None)
