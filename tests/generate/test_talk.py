"""A conversation without a terminal: what is kept between turns, and that it changes no answer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from parts.models import CHAT_TEMPLATE

from textgen_cli.config import DecodingConfig, ModelConfig
from textgen_cli.errors import TextgenError
from textgen_cli.events import silent
from textgen_cli.generate import sampling
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
        size, _ = conversation.engine.measure(asked)
        if number:
            # All but the last answer's end and the new message stands in the cache already.
            new = size - conversation.engine.measure(before[:-1])[0]
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
    chunks.close()  # type: ignore[attr-defined]
    assert conversation.messages[-1] == {"role": "assistant", "content": first}
    computed.clear()
    asked = [*conversation.messages, {"role": "user", "content": "a third"}]
    assert text(conversation.ask("a third")) == alone(model, asked, greedy=True, min_new_tokens=8)
    assert computed[0] < conversation.engine.measure(asked)[0] // 2


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
    chunks.close()  # type: ignore[attr-defined]
    with pytest.raises(TextgenError):
        text(conversation.ask("word " * 300))
    for name, value in (("temperature", "-1"), ("set", "no_such_field=1"), ("bad_words", "/nonexistent")):
        with pytest.raises(TextgenError):
            conversation.set(name, value)
    assert conversation.messages == before
    assert conversation.decoding == DecodingConfig(max_new_tokens=8, greedy=True)
    chunks = conversation.retry()
    chunks.close()  # type: ignore[attr-defined]
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
