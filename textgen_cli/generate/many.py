"""A window of records: requests to the engine, and from what it gives one line a sequence.

Knows no torch and no terminal; windows, order and files are text/flow.py's.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from textgen_cli.errors import TextgenError, UsageError
from textgen_cli.generate.engines import Opened
from textgen_cli.generate.request import Chunk, Completion, Request
from textgen_cli.text.batch import Result, failure, joined
from textgen_cli.text.records import Record


def shown(records: Iterable[Record], open_engine: Callable[[], Opened]) -> Iterator[list[Result]]:
    """For each record what the model would see of it, as its `text`."""
    opened: Opened | None = None
    for record in records:
        opened = opened or open_engine()
        asked = _asked(opened, record)
        if not isinstance(asked, Result):
            asked = Result(record, [joined(record.fields, {"text": opened.rendered(asked[0])})])
        yield [asked]


def _asked(opened: Opened, record: Record) -> list[Request] | Result:
    """The requests of a record, or its failure. What is wrong with the command line is raised."""
    if record.error is not None:
        return failure(record, record.error)
    try:
        return opened.prompter(record)
    except UsageError:
        raise
    except TextgenError as error:
        return failure(record, error)


def window(
    opened: Opened, members: Sequence[Record], finished: frozenset[int]
) -> Iterator[tuple[int, Result]]:
    """(record index, result) of each record of a window as it becomes whole; those `finished` need none."""
    requests: list[Request] = []
    count: dict[int, int] = {}
    for record in members:
        asked = _asked(opened, record)
        if isinstance(asked, Result):
            yield record.index, asked
        else:
            requests += asked
            count[record.index] = len(asked)
    by_index = {record.index: record for record in members}
    if len(finished) < len(members) and requests:
        for index, ended in _ended(opened.engine.stream(requests, finished), count):
            yield index, _result(by_index[index], ended)


def _ended(
    chunks: Iterable[Chunk], count: dict[int, int]
) -> Iterator[tuple[int, list[tuple[str, Completion]]]]:
    """Each record's (text, completion) pairs in the order of its sequences, once all have ended."""
    texts: dict[tuple[int, int], list[str]] = defaultdict(list)
    ended: dict[int, dict[int, tuple[str, Completion]]] = defaultdict(dict)
    for chunk in chunks:
        key = chunk.index, chunk.sequence
        texts[key].append(chunk.text)
        if chunk.final:
            ended[chunk.index][chunk.sequence] = "".join(texts.pop(key)), chunk.final
            if len(ended[chunk.index]) == count[chunk.index]:
                yield chunk.index, [pair for _, pair in sorted(ended.pop(chunk.index).items())]


def _result(record: Record, ended: Sequence[tuple[str, Completion]]) -> Result:
    wrong = next((final.error for _, final in ended if final.error), None)
    if isinstance(wrong, UsageError):
        raise wrong
    if wrong:
        return failure(record, wrong)
    many = len(ended) > 1
    return Result(
        record,
        [output(record.fields, text, final, n if many else None) for n, (text, final) in enumerate(ended)],
        tokens=sum(final.completion_tokens or 0 for _, final in ended),
    )


def output(
    fields: dict[str, Any], text: str, final: Completion, sequence: int | None = None
) -> dict[str, Any]:
    """One output line: the input's fields, then what was generated."""
    ours: dict[str, Any] = {} if sequence is None else {"sequence": sequence}
    ours |= {"text": text, "finish_reason": final.finish_reason}
    ours |= {"prompt_tokens": final.prompt_tokens, "completion_tokens": final.completion_tokens}
    if final.logprobs is not None:
        ours["logprobs"] = final.logprobs
    return joined(fields, ours | final.extra)
