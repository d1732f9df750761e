"""A conversation without a terminal: what is kept between turns, and that it changes no answer."""

import json
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from parts.endpoint import Call, Stub, engine, refuse, reply, whole
from parts.models import CHAT_TEMPLATE

from textgen_cli.config import DecodingConfig, EndpointConfig, GenerateConfig, ModelConfig
from textgen_cli.errors import NetworkError, TextgenError, UsageError
from textgen_cli.events import Event, Progress, silent
from textgen_cli.generate import engines, sampling
from textgen_cli.generate.local import LocalEngine
from textgen_cli.generate.prefix import Kept
from textgen_cli.generate.request import Chunk, Request, derive_seed
from textgen_cli.generate.talk import Conversation
from textgen_cli.model.load import Model, load


@pytest.fixture(scope="module")
def model(small_model: Any) -> Model:
    folder = small_model("llama", CHAT_TEMPLATE)
    return load(ModelConfig(model=str(folder), dtype="float32", device="cpu"), "generate", silent)


@pytest.fixture
def computed(model: Model) -> Iterator[list[int]]:
    """The number of tokens of each forward pass."""
    sizes: list[int] = []
    hook = model.net.register_forward_pre_hook(
        lambda net, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    yield sizes
    hook.remove()


def talk(model: Model, **decoding: Any) -> Conversation:
    def reopen(settings: DecodingConfig) -> LocalEngine:
        return LocalEngine(model, sampling.plan(settings, model, silent), kept=Kept())

    settings = DecodingConfig(**{"max_new_tokens": 8, **decoding})
    return Conversation(settings, reopen, int(settings.seed))


def text(chunks: Iterator[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def tokens(model: Model, messages: list[dict[str, Any]]) -> int:
    return len(model.tokenizer.encode_chat(messages))


def alone(model: Model, messages: list[dict[str, Any]], **decoding: Any) -> str:
    """The answer of an engine that has seen nothing before."""
    seed = int(decoding.get("seed", 0))
    settings = DecodingConfig(**{"max_new_tokens": 8, **decoding})
    engine = LocalEngine(model, sampling.plan(settings, model, silent), kept=Kept())
    return text(engine.stream([Request(0, 0, None, tuple(messages), derive_seed(seed, 0, 0))]))


@pytest.mark.parametrize(
    "decoding", [{"greedy": True}, {"temperature": 1.2, "top_k": 30, "seed": "9"}], ids=str
)
def test_the_past_is_computed_once_and_changes_nothing(
    model: Model, computed: list[int], decoding: dict[str, Any]
) -> None:
    conversation = talk(model, **decoding)
    for number, said in enumerate(["hello you small model and quick brown fox", "and then?", "what else"]):
        before = list(conversation.messages)
        computed.clear()
        answer = text(conversation.ask(said))
        asked = [*before, {"role": "user", "content": said}]
        size = tokens(model, asked)
        if number:
            # All but the last answer's end and the new message stands in the cache already.
            new = size - tokens(model, before[:-1])
            assert computed[0] <= new + 2 < size
        else:
            assert computed[0] == size
        assert set(computed[1:]) <= {1}
        assert answer == alone(model, asked, **decoding)


def test_a_stopped_answer_is_gone_on_from(model: Model, computed: list[int]) -> None:
    conversation = talk(model, greedy=True, min_new_tokens=8)
    text(conversation.ask("a first question, of some length"))
    chunks = conversation.ask("a second one")
    first = next(chunks).text
    chunks.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": first}
    computed.clear()
    asked = [*conversation.messages, {"role": "user", "content": "a third"}]
    assert text(conversation.ask("a third")) == alone(model, asked, greedy=True, min_new_tokens=8)
    assert computed[0] < tokens(model, asked) // 2


def test_an_answer_stopped_amid_a_pass_spoils_nothing(model: Model) -> None:
    """Ctrl-C comes between two layers: the first has one position more than the second."""
    conversation = talk(model, greedy=True, min_new_tokens=8)
    text(conversation.ask("a first question, of some length"))
    passes = 0

    def interrupt(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 3:
            raise KeyboardInterrupt

    hook = model.net.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        text(conversation.ask("a second one"))
    hook.remove()
    asked = [*conversation.messages, {"role": "user", "content": "a third"}]
    assert text(conversation.ask("a third")) == alone(model, asked, greedy=True, min_new_tokens=8)


def test_what_does_not_come_about_leaves_no_trace(model: Model) -> None:
    conversation = talk(model, greedy=True)
    text(conversation.ask("hello"))
    before = list(conversation.messages)
    chunks = conversation.ask("never looked at")
    chunks.close()
    with pytest.raises(TextgenError):
        text(conversation.ask("word " * 300))
    for name, value in (("temperature", "-1"), ("set", "no_such_field=1"), ("bad_words", "/nonexistent")):
        with pytest.raises(TextgenError):
            conversation.set(name, value)
    assert conversation.messages == before
    assert conversation.decoding == DecodingConfig(max_new_tokens=8, greedy=True)
    chunks = conversation.retry()
    chunks.close()
    assert conversation.messages == before


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", "0.5", 0.5),
        ("temperature", "none", None),
        ("top-k", "7", 7),
        ("greedy", "True", True),
        ("stop", ".", (".",)),
        ("stop", "none", ()),
        ("max_new_tokens", "none", None),
    ],
)
def test_settings(model: Model, name: str, value: str, expected: Any) -> None:
    conversation = talk(model)
    conversation.set(name, value)
    assert getattr(conversation.decoding, name.replace("-", "_")) == expected


def test_saved_and_loaded(model: Model, tmp_path: Path) -> None:
    conversation = talk(model, greedy=True)
    conversation.system = "Sei kurz. 你好"
    text(conversation.ask("grüß dich"))
    conversation.save(tmp_path / "talk.jsonl")
    other = talk(model, greedy=True)
    other.load(tmp_path / "talk.jsonl")
    assert other.system == conversation.system
    assert other.messages == conversation.messages
    (tmp_path / "talk.jsonl").write_text('{"messages": [{"role": "user", "content": "a\\udcffb"}]}')
    other.load(tmp_path / "talk.jsonl")
    text(other.ask("half a character is none"))
    assert other.messages[0]["content"] == "a\N{REPLACEMENT CHARACTER}b"


def test_what_only_the_engine_refuses_drops_the_oldest_turns_too(model: Model) -> None:
    """--max-length holds less than the context."""
    conversation = talk(model, greedy=True, max_new_tokens=None, max_length=40)
    dropped = []
    for said in ("hello you small model", "and then what", "what else is there"):
        text(conversation.ask(said))
        dropped.append(conversation.dropped)
    assert dropped[0] == 0
    assert dropped[-1] > 0
    assert dropped[-1] % 2 == 0
    assert len(conversation.messages) == 6
    with pytest.raises(TextgenError, match="E-CONTEXT"):
        text(conversation.ask("word " * 40))
    assert len(conversation.messages) == 6


def test_models_are_loaded_once(small_model: Any, tmp_path: Path) -> None:
    """Those that an answer needs, the one that guesses too, whatever is set in between."""
    folder = str(small_model("llama", CHAT_TEMPLATE))
    seen: list[Event] = []
    decoding = DecodingConfig(draft_model=str(small_model("tiny", CHAT_TEMPLATE)), greedy=True)
    config = GenerateConfig(model=ModelConfig(model=folder, device="cpu"), decoding=decoding)
    reopen: Any = engines.talker(config, seen.append)
    first = reopen(decoding)
    assert first.draft is not None
    for wrong in (replace(decoding, draft_model="./absent"), replace(decoding, set=("no_such_field=1",))):
        with pytest.raises(TextgenError):
            reopen(wrong)
    again = reopen(replace(decoding, max_new_tokens=3))
    assert (again.model, again.draft) == (first.model, first.draft)
    without = reopen(replace(decoding, draft_model=None))
    assert (without.model, without.draft) == (first.model, None)
    loads = [event.subject for event in seen if isinstance(event, Progress) and event.stage == "load"]
    assert len(loads) == 2


# --- through a server


def remote_talk(stub: Stub, **options: Any) -> Conversation:
    return Conversation(DecodingConfig(), lambda decoding: engine(stub, decoding), 0, **options)


def roomy(limit: int) -> Any:
    """A server that takes so many messages and says when there are more."""

    def step(handler: BaseHTTPRequestHandler, call: Call) -> None:
        many = len(call.body["messages"]) > limit
        full = refuse(400, "This model's maximum context length is 8 tokens", code="context_length_exceeded")
        (full if many else whole())(handler, call)

    return step


def sent(call: Call) -> list[str]:
    return [message["content"] for message in call.body["messages"]]


def test_a_server_that_is_full_makes_the_oldest_turns_go() -> None:
    with Stub([roomy(4)]) as stub:
        conversation = remote_talk(stub, system="S")
        dropped = []
        for said in ("ab", "cd", "ef", "gh"):
            assert text(conversation.ask(said)) == said[::-1]
            dropped.append(conversation.dropped)
        assert dropped == [0, 0, 2, 4]
        # What was refused once is not sent again.
        assert [sent(call) for call in stub.calls[2:]] == [
            ["S", "ab", "ba", "cd", "dc", "ef"],
            ["S", "cd", "dc", "ef"],
            ["S", "cd", "dc", "ef", "fe", "gh"],
            ["S", "ef", "fe", "gh"],
        ]
        assert len(conversation.messages) == 8
        conversation.reset()
        text(conversation.ask("ij"))
        assert (conversation.dropped, sent(stub.calls[-1])) == (0, ["S", "ij"])


def test_a_message_that_no_server_takes_is_taken_back() -> None:
    with Stub([whole(), roomy(0)]) as stub:
        conversation = remote_talk(stub)
        text(conversation.ask("ab"))
        before = list(conversation.messages)
        with pytest.raises(NetworkError, match="E-CONTEXT"):
            text(conversation.ask("cd"))
        assert conversation.messages == before
        assert [len(sent(call)) for call in stub.calls] == [1, 3, 1]


def owner(name: str) -> Any:
    return reply(200, json.dumps({"data": [{"id": "m", "owned_by": name}]}))


@pytest.mark.parametrize(
    ("kind", "setting", "refused"),
    [
        ("vllm", {"top_k": 5}, ""),
        ("llamacpp", {"min_p": 0.1}, ""),
        ("llamacpp", {"repetition_penalty": 1.1}, "llamacpp at .* has no such option"),
        ("somebody", {"top_k": 5}, "is of unknown kind"),
        ("vllm", {"num_beams": 4}, "cannot be sent"),
        ("vllm", {"set": ("top_h=0.5",)}, "cannot be sent"),
        ("somebody", {"temperature": 0.5, "stop": (".",)}, ""),
    ],
    ids=str,
)
def test_a_setting_that_a_server_lacks_is_refused_when_it_is_set(
    kind: str, setting: dict[str, Any], refused: str
) -> None:
    with Stub([whole("a.b")], models=owner(kind)) as stub:
        config = GenerateConfig(model=ModelConfig(model="m"), endpoint=EndpointConfig(endpoint=stub.url))
        reopen = engines.talker(config, silent)
        changed = replace(config.decoding, **setting)
        if refused:
            with pytest.raises(UsageError, match=refused):
                reopen(changed)
            return
        conversation = Conversation(changed, reopen, 0)
        assert text(conversation.ask("x")) == ("a" if "stop" in setting else "a.b")
        body = stub.calls[-1].body
        assert {name: body[name] for name in setting} == {
            name: list(value) if isinstance(value, tuple) else value for name, value in setting.items()
        }
