"""An engine whose texts are given, in pieces of one character, for what stands around engines."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from textgen_cli.generate.request import Chunk, Completion, Request


@dataclass
class Pieces:
    """An engine that answers each request with the next of its texts, character by character, in turn."""

    texts: dict[str, list[str]]
    asked: list[Request] = field(default_factory=list)

    def stream(self, requests: Sequence[Request], done: Any = ()) -> Iterator[Chunk]:
        self.asked += requests
        texts = [self.texts[str(request.prompt)].pop(0) for request in requests]
        logprobs: list[dict[str, Any]] = [{"token": "x"}]
        for at in range(max(map(len, texts)) + 1):
            for request, text in zip(requests, texts, strict=True):
                final = Completion("stop", 1, len(text), logprobs) if at == len(text) else None
                if at <= len(text):
                    yield Chunk(request.index, request.sequence, text[at : at + 1], final)


def answered(engine: Any, *prompts: str) -> list[tuple[list[str], Completion]]:
    """The pieces and the end of each answer."""
    requests = [Request(i, 0, prompt, None, 40 + i) for i, prompt in enumerate(prompts)]
    pieces: list[list[str]] = [[] for _ in prompts]
    ends: dict[int, Completion] = {}
    for chunk in engine.stream(requests):
        assert chunk.index not in ends
        pieces[chunk.index] += [chunk.text] if chunk.text else []
        if chunk.final:
            ends[chunk.index] = chunk.final
    return [(pieces[i], ends[i]) for i in range(len(prompts))]
