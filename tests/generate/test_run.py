"""The flow without a model: order of chunks, seeds, results of records, the meter."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from textgen_cli.config import PromptConfig
from textgen_cli.errors import ModelError, UsageError
from textgen_cli.events import Event, Notice, Progress
from textgen_cli.generate.engines import Opened
from textgen_cli.generate.many import output, window
from textgen_cli.generate.prompts import Prompter
from textgen_cli.generate.request import Chunk, Completion, Request
from textgen_cli.generate.run import in_order, settle_seed
from textgen_cli.text.batch import Result
from textgen_cli.text.flow import Meter, results
from textgen_cli.text.presets import Reader
from textgen_cli.text.records import Record

END = Completion("stop", 1, 2)


def test_one_sequence_comes_after_another_and_the_first_at_once() -> None:
    seen: list[str] = []

    def chunks() -> Iterator[Chunk]:
        for number, (sequence, text) in enumerate([(1, "c"), (0, "a"), (1, "d"), (0, "b")]):
            assert seen == (["a"] if number > 1 else [])  # what has its turn does not wait
            yield Chunk(0, sequence, text, END if number > 1 else None)

    for chunk in in_order([(0, 0), (0, 1)], chunks()):
        seen += [chunk.text]
    assert seen == ["a", "b", "c", "d"]


def test_a_random_seed_is_told() -> None:
    events: list[Event] = []
    drawn = {settle_seed("random", events.append) for _ in range(3)}
    assert len(drawn) == 3
    assert {event.text for event in events if isinstance(event, Notice)} == {f"seed {n}" for n in drawn}
    assert settle_seed("7", events.append) == 7
    assert len(events) == 3


class Backwards:
    """An engine that ends the last request first; the text of a prompt is its capitals."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[list[int]] = []

    def stream(self, requests: Sequence[Request], done: Any = ()) -> Iterator[Chunk]:
        self.calls.append([request.index for request in requests])
        for request in reversed(requests):
            if request.index in done:
                continue
            wrong: Any = self.error if request.prompt == "x" else None
            final = Completion("error", None, None, error=wrong) if wrong else END
            yield Chunk(request.index, request.sequence, (request.prompt or "").upper(), final)


def opened(engine: Any) -> Opened:
    return Opened(engine, Prompter(PromptConfig(), None, Reader("causal"), 0, 1), lambda request: "")


def records(prompts: str) -> list[Record]:
    return [Record(at, {"prompt": letter} if letter != "-" else {}) for at, letter in enumerate(prompts)]


def flat(groups: Iterator[list[Result]]) -> list[str]:
    return [str(line.get("text", "error")) for group in groups for result in group for line in result.outputs]


@pytest.mark.parametrize("done", range(7))
def test_results_keep_the_order_wherever_a_job_goes_on(done: int) -> None:
    engine = Backwards(ModelError("E-NAN", "m", "nan"))
    whole = ["A", "error", "C", "error", "E", "F"]
    assert flat(results(records("a-cxef"), done, 2, lambda: opened(engine), window)) == whole[done:]
    # What is computed together is the same in every life.
    assert engine.calls == [[0], [2, 3], [4, 5]][done // 2 :]


def test_a_mistake_of_the_command_line_fails_no_record() -> None:
    engine = Backwards(UsageError("E-FAMILY", "m", "cannot"))
    with pytest.raises(UsageError):
        flat(results(records("ax"), 0, 2, lambda: opened(engine), window))


def test_no_record_opens_no_engine() -> None:
    def fail() -> Opened:
        raise AssertionError

    assert flat(results([], 0, 2, fail, window)) == []


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"id": 1}, ["id"]),
        ({"text": 1}, ["input_text"]),
        ({"text": 1, "input_text": 2}, ["input_input_text", "input_text"]),
        ({"input_text": 2, "text": 1, "logprobs": 3}, ["input_text", "input_input_text", "logprobs"]),
    ],
)
def test_fields_with_our_names_are_kept(fields: dict[str, Any], names: list[str]) -> None:
    line = output(fields, "t", END)
    assert list(line) == [*names, "text", "finish_reason", "prompt_tokens", "completion_tokens"]
    assert [line[name] for name in names] == list(fields.values())
    assert line["text"] == "t"


def test_the_meter_counts_from_where_the_model_stands() -> None:
    now = [100.0]
    events: list[Event] = []
    meter = Meter(events.append, 1000, clock=lambda: now[0])
    meter(Progress("generate", "records", 400, unit="records"))
    now[0] = 150
    meter.begin(400)
    record = Record(0, {})
    group = [Result(record, [{}, {}], tokens=100)] * 2
    assert list(meter.counted([group])) == [group]
    now[0] = 160
    meter(Progress("generate", "records", 402, unit="records"))
    meter(Progress("load", "x"))
    meter(Progress("generate", "records", 1000, unit="records"))
    told = [(event.done, event.total, event.detail) for event in events if isinstance(event, Progress)]
    assert told == [
        (400, 1000, ""),
        (402, 1000, "0.2 records/s, 20 tokens/s, 49:50 left"),
        (0, None, ""),
        (1000, 1000, "60 records/s, 20 tokens/s"),
    ]
