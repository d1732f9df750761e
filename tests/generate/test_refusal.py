"""What a server's refusals become."""

import pytest
from parts.endpoint import Step, ask, fails, final, prompts, refuse, reply, text_of, whole

from textgen_cli.config import DecodingConfig
from textgen_cli.errors import ModelError, NetworkError, TextgenError, UsageError

# Refusals.


@pytest.mark.parametrize(
    ("step", "kind", "name", "subject"),
    [
        (refuse(400, "bad", param="temperature"), UsageError, "E-ENDPOINT-OPTION", "--temperature"),
        (refuse(400, "'logprobs' is not supported"), UsageError, "E-ENDPOINT-OPTION", "--logprobs"),
        (refuse(400, "seed: unknown field"), UsageError, "E-ENDPOINT-OPTION", "--seed"),
        (
            reply(422, '{"detail": [{"loc": ["body", "stop"], "msg": "Extra inputs are not permitted"}]}'),
            UsageError,
            "E-ENDPOINT-OPTION",
            "--stop",
        ),
        (
            reply(422, '{"detail": "Unexpected fields in the request: {\'seed\'}"}'),
            UsageError,
            "E-ENDPOINT-OPTION",
            "--seed",
        ),
        (refuse(400, "no such model", param="model"), ModelError, "E-ENDPOINT-MODEL", "m"),
        (refuse(404, "The model `m` does not exist."), ModelError, "E-ENDPOINT-MODEL", "m"),
        (reply(404, "", "text/html"), NetworkError, "E-ENDPOINT-PATH", ""),
        (refuse(401, "no key"), NetworkError, "E-ENDPOINT-KEY", ""),
        (refuse(403, "no"), NetworkError, "E-ENDPOINT-KEY", ""),
        (refuse(410, "gone"), NetworkError, "E-ENDPOINT", ""),
        (refuse(429, "pay", code="insufficient_quota"), NetworkError, "E-ENDPOINT-BUSY", ""),
        (reply(307, "", Location="http://192.0.2.1/v1?sig=1"), NetworkError, "E-REDIRECT", ""),
        (reply(200, "<html>log in</html>", "text/html"), NetworkError, "E-ENDPOINT-ANSWER", ""),
    ],
)
def test_a_refusal_is_told_at_once(step: Step, kind: type[TextgenError], name: str, subject: str) -> None:
    error, stub = fails(step, decoding=DecodingConfig(temperature=0.5), stop=["x"], logprobs=1)
    assert isinstance(error, kind)
    assert error.name == name
    assert error.subject == (subject or stub.url)
    assert len(stub.calls) == 1
    assert "sig=1" not in str(error)


@pytest.mark.parametrize(
    "words", ["please stop sending this prompt", "n is a letter; a seed grows", "content policy"]
)
def test_a_refusal_that_names_no_option_concerns_the_record(words: str) -> None:
    chunks, _ = ask(refuse(400, words), stop=["x"])
    error = final(chunks).error
    assert error is not None
    assert error.name == "E-ENDPOINT-REFUSED"


def test_a_server_that_wants_other_names_for_our_own_fields_gets_them() -> None:
    steps = (
        refuse(400, "Extra inputs: stream_options"),
        refuse(400, "Use 'max_completion_tokens' instead.", param="max_tokens"),
        whole("ok"),
    )
    chunks, stub = ask(*steps)
    assert text_of(chunks) == "ok"
    assert stub.calls[-1].body["max_completion_tokens"] == 256
    assert not {"max_tokens", "stream_options"} & set(stub.calls[-1].body)


def test_logprobs_and_schemas_that_are_ignored_are_errors() -> None:
    for requests in (prompts("a"), prompts("a", "b")):
        for options, text in (({"logprobs": 1}, "hello"), ({"json_schema": {}}, "no json")):
            chunks, _ = ask(whole(text), requests=requests, **options)
            error = final(chunks[-1:]).error
            assert error is not None
            assert error.name == "E-ENDPOINT-IGNORED"
    assert final(ask(whole('{"a": 1}'), json_schema={})[0]).error is None
    assert final(ask(whole('{"a": ', finish="length"), json_schema={})[0]).error is None
