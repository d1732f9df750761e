"""What is sent to a server and what is read from it, over a real connection."""

import json
import time
from typing import Any

import pytest
from parts.endpoint import (
    DONE,
    USAGE,
    Stub,
    ask,
    chat,
    engine,
    event,
    events,
    final,
    prompts,
    reply,
    text_of,
    whole,
)

from textgen_cli.config import DecodingConfig
from textgen_cli.errors import UsageError
from textgen_cli.generate.openai_api import Answer, Asked, flaw
from textgen_cli.generate.request import Chunk, Completion, derive_seed

# What is sent.


def test_a_prompt_goes_to_completions_and_a_conversation_to_chat() -> None:
    stream = events(event("hi"), event("", "stop"), USAGE, DONE)
    _, stub = ask(stream)
    body = stub.calls[0].body
    assert stub.calls[0].path == "/v1/completions"
    assert body == {
        "model": "m",
        "prompt": "abc",
        "max_tokens": 256,
        "seed": derive_seed(0, 0, 0) % 2**31,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    _, stub = ask(stream, requests=chat("hello"))
    assert stub.calls[0].path == "/v1/chat/completions"
    assert stub.calls[0].body["messages"] == [{"role": "user", "content": "hello"}]
    assert "prompt" not in stub.calls[0].body


def test_every_option_has_its_field() -> None:
    decoding = DecodingConfig(
        max_new_tokens=9, temperature=0.5, top_p=0.9, top_k=0, min_p=0.1, repetition_penalty=1.1
    )
    logprobs: dict[str, Any] = {"content": []}
    schema = {"type": "object"}
    _, stub = ask(
        whole("{}", logprobs=logprobs),
        requests=chat("x"),
        decoding=decoding,
        stop=["\n", "END"],
        logprobs=2,
        json_schema=schema,
        server="vllm",
    )
    body = stub.calls[0].body
    sent = {
        name: body[name]
        for name in (
            "max_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "stop",
            "logprobs",
            "top_logprobs",
        )
    }
    assert sent == {
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "stop": ["\n", "END"],
        "logprobs": True,
        "top_logprobs": 2,
    }
    assert body["response_format"]["json_schema"]["schema"] == schema
    _, stub = ask(whole("{}", logprobs=logprobs), decoding=decoding, logprobs=2, server="vllm")
    assert stub.calls[0].body["logprobs"] == 2  # completions count alternatives in the same field


def test_greedy_sends_temperature_0_and_nothing_random() -> None:
    _, stub = ask(whole("x"), decoding=DecodingConfig(greedy=True, top_p=0.5, top_k=5))
    assert stub.calls[0].body["temperature"] == 0
    assert not {"seed", "top_p", "top_k"} & set(stub.calls[0].body)


@pytest.mark.parametrize(
    ("decoding", "option"),
    [
        (DecodingConfig(no_repeat_ngram_size=2), "--no-repeat-ngram-size"),
        (DecodingConfig(max_length=9), "--max-length"),
    ],
)
def test_an_option_without_a_field_is_refused_before_any_connection(
    decoding: DecodingConfig, option: str
) -> None:
    with Stub([whole("x")]) as stub:
        with pytest.raises(UsageError, match="E-ENDPOINT-OPTION") as caught:
            engine(stub, decoding)
        assert caught.value.subject == option
        assert not stub.calls


@pytest.mark.parametrize(
    ("owner", "option", "known"),
    [
        ("vllm", "repetition_penalty", True),
        ("sglang", "min_p", True),
        ("llamacpp", "top_k", True),
        ("llamacpp", "repetition_penalty", False),
        ("openai", "top_k", False),
        (None, "top_k", False),
    ],
)
def test_extensions_go_only_to_servers_that_say_who_they_are(
    owner: str | None, option: str, known: bool
) -> None:
    listed = (
        reply(200, json.dumps({"data": [{"id": "other"}, {"id": "m", "owned_by": owner}]})) if owner else None
    )
    decoding = DecodingConfig(**{option: 1})  # type: ignore[arg-type]
    with Stub([whole("x")], models=listed) as stub:
        if known:
            assert text_of(list(engine(stub, decoding).stream(prompts("abc")))) == "x"
            assert [call.path for call in stub.calls] == ["/v1/models", "/v1/completions"]
        else:
            with pytest.raises(UsageError, match="E-ENDPOINT-OPTION"):
                list(engine(stub, decoding).stream(prompts("abc")))
            assert [call.path for call in stub.calls] == ["/v1/models"]


def test_a_lone_surrogate_in_a_prompt_is_sendable() -> None:
    _, stub = ask(whole("x"), requests=prompts("a\ud83d"))
    assert stub.calls[0].body["prompt"] == "a\ud83d"


# What is read.


def test_a_stream_comes_as_it_is_written() -> None:
    chunks, _ = ask(events(event("Hel"), event("lo"), event("", "length"), USAGE, DONE))
    assert [chunk.text for chunk in chunks] == ["Hel", "lo", ""]
    assert final(chunks) == Completion("length", 5, 7)


def test_the_first_piece_is_out_before_the_last_is_written() -> None:
    with Stub([events(event("one"), 0.25, event(" two"), event("", "stop"), DONE)]) as stub:
        stream = engine(stub).stream(prompts("abc"))
        start = time.monotonic()
        assert next(stream).text == "one"
        assert time.monotonic() - start < 0.2
        assert text_of(list(stream)) == " two"


RAW = event("größe 🙂") + event(" ok", "stop") + USAGE + DONE


@pytest.mark.parametrize(
    "raw",
    [
        RAW,
        RAW.replace(b"\n", b"\r\n"),
        RAW.replace(b"\n", b"\r"),
        b": ping\n\n" + RAW.replace(b"\n\n", b"\n\n: still here\n\nid: 1\nevent: message\nretry: 10\n"),
        RAW.replace(b"data: ", b"data:"),
        b"data:\n\n" + RAW,
    ],
)
def test_streams_in_all_line_endings_with_comments_and_split_anywhere(raw: bytes) -> None:
    for pieces in ([raw], [raw[i : i + 1] for i in range(len(raw))]):
        chunks, _ = ask(events(*pieces))
        assert text_of(chunks) == "größe 🙂 ok"
        assert final(chunks).finish_reason == "stop"


def test_a_stream_without_done_is_whole_once_it_has_a_finish_reason() -> None:
    chunks, _ = ask(events(event("hi", "stop"), cut=True))
    assert text_of(chunks) == "hi"
    assert final(chunks) == Completion("stop", None, None)


def test_a_server_that_does_not_stream_is_read_whole() -> None:
    chunks, _ = ask(whole("hello"))
    assert chunks == [Chunk(0, 0, "hello", Completion("stop", 5, 7))]


def test_content_in_parts_is_read() -> None:
    parts = [
        {"type": "thinking", "thinking": []},
        {"type": "text", "text": "one "},
        {"type": "text", "text": "two"},
    ]
    chunks, _ = ask(whole(parts), requests=chat("x"))  # type: ignore[arg-type]
    assert text_of(chunks) == "one two"


def test_half_surrogates_become_replacement_characters() -> None:
    said = reply(
        200, '{"choices": [{"index": 0, "text": "a\\ud83d b\\ud83d\\ude42", "finish_reason": "stop"}]}'
    )
    chunks, _ = ask(said)
    assert text_of(chunks) == "a\ufffd b🙂"


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("content_filter", "filter"),
        ("eos_token", "stop"),
        ("x\x1b[2J", "error"),
        (None, "error"),
    ],
)
def test_finish_reasons(reason: str | None, shown: str) -> None:
    chunks, _ = ask(whole("a", finish=reason), requests=prompts("a", "b"))
    assert [chunk.final.finish_reason for chunk in chunks if chunk.final] == [shown, shown]
    assert "\x1b" not in str(chunks)


def test_usage_that_is_missing_or_nonsense_is_none() -> None:
    chunks, _ = ask(whole("a", usage=False))
    assert final(chunks) == Completion("stop", None, None)
    usage = '{"prompt_tokens": -1, "completion_tokens": true}'
    odd = f'{{"choices": [{{"text": "a", "finish_reason": "stop"}}], "usage": {usage}}}'
    assert final(ask(reply(200, odd))[0]) == Completion("stop", None, None)


CHAT_LOGPROBS = {
    "content": [
        {
            "token": "h",
            "logprob": -0.5,
            "bytes": [104],
            "top_logprobs": [{"token": "h", "logprob": -0.5}, {"token": "j", "logprob": -1e999}],
        },
        {"token": "i", "logprob": -0.25, "top_logprobs": []},
    ]
}
OLD_LOGPROBS = {
    "tokens": ["h", "i"],
    "token_logprobs": [-0.5, -0.25],
    "text_offset": [0, 1],
    "top_logprobs": [{"h": -0.5, "j": -1e999}, None],
}


@pytest.mark.parametrize("shape", [CHAT_LOGPROBS, OLD_LOGPROBS])
def test_both_shapes_of_logprobs_become_one(shape: dict[str, Any]) -> None:
    expected = [
        {
            "token": "h",
            "logprob": -0.5,
            "top": [{"token": "h", "logprob": -0.5}, {"token": "j", "logprob": None}],
        },
        {"token": "i", "logprob": -0.25, "top": []},
    ]
    assert final(ask(whole("hi", logprobs=shape), logprobs=2)[0]).logprobs == expected
    streamed = events(event("hi", logprobs=shape), event("", "stop"), DONE)
    assert final(ask(streamed, logprobs=2)[0]).logprobs == expected
    assert final(ask(whole("hi", logprobs=shape))[0]).logprobs is None  # nobody asked


# Stop strings.


@pytest.mark.parametrize("pieces", [["one END two"], ["one E", "N", "D two"], list("one END two")])
def test_a_stop_string_never_shows_even_if_the_server_ignores_it(pieces: list[str]) -> None:
    shape = {"content": [{"token": t, "logprob": -1.0} for t in ("one ", "END", " two")]}
    chunks, _ = ask(
        events(*map(event, pieces), event("", "length", logprobs=shape), DONE), stop=["END", "xx"]
    )
    assert text_of(chunks) == "one "
    assert final(chunks).finish_reason == "stop"
    chunks, _ = ask(whole("one END two", finish="length", logprobs=shape), stop=["END"], logprobs=0)
    assert text_of(chunks) == "one "
    assert [token["token"] for token in final(chunks).logprobs or []] == ["one "]


def test_what_was_held_back_in_vain_comes_at_the_end() -> None:
    chunks, _ = ask(events(event("the EN"), event("", "stop"), DONE), stop=["END"])
    assert [chunk.text for chunk in chunks] == ["the ", "EN"]


@pytest.mark.parametrize(
    ("text", "schema", "fact"),
    [
        ('{"age": 3}', {"type": "object", "required": ["age"]}, None),
        ('{"name": 3}', {"type": "object", "required": ["age"]}, "the JSON does not fit it"),
        ('{"age": 3', {"type": "object"}, "no JSON came"),
        ("3", {"$ref": "http://127.0.0.1:9/elsewhere.json"}, None),
    ],
)
def test_json_is_held_against_the_schema(text: str, schema: dict[str, Any], fact: str | None) -> None:
    asked = Asked("m", DecodingConfig(), json_schema=schema)
    found = flaw(asked, Answer(text, "stop"), "server")
    assert (found and found.fact) == (fact and f"the server ignores --json-schema: {fact}")
