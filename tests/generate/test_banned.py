"""--bad-words: the words never stand in a text, whatever tokens would spell them."""

import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from textgen_cli.config import DecodingConfig, ModelConfig
from textgen_cli.events import silent
from textgen_cli.generate import sampling
from textgen_cli.generate.banned import Banned, token_texts
from textgen_cli.generate.local import LocalEngine
from textgen_cli.generate.request import Request, derive_seed
from textgen_cli.model.load import load
from textgen_cli.model.loaded import Model

PROMPTS = ("Once upon a time", "The quick brown", "a", "Numbers such as 1, 2, 3 and 42")


def opened(folder: Path) -> Model:
    return load(ModelConfig(model=str(folder), dtype="float32", device="cpu"), "generate", silent)


def texts(model: Model, count: int, words: Path | None, **decoding: Any) -> list[str]:
    """So many short texts behind the prompts in turn; each with its own stream."""
    given = {"max_new_tokens": 24, "temperature": 4.0, "top_p": 1.0} | decoding
    plan = sampling.plan(DecodingConfig(bad_words=words, **given), model, silent)
    engine = LocalEngine(model, plan)
    found = [""] * count
    requests = [Request(i, 0, PROMPTS[i % len(PROMPTS)], None, derive_seed(0, i, 0)) for i in range(count)]
    for chunk in engine.stream(requests):
        assert chunk.final is None or chunk.final.error is None
        found[chunk.index] += chunk.text
    return found


def common(found: list[str], size: int) -> list[str]:
    """The strings of letters that most texts hold, in any case."""
    grams: Counter[str] = Counter()
    for text in found:
        low = text.casefold()
        grams.update({low[at : at + size] for at in range(len(low) - size + 1)})
    return [gram for gram, _ in grams.most_common() if gram.isalpha() and gram.isascii()][:3]


def hold(found: list[str], words: list[str]) -> int:
    return sum(any(word in text.casefold() for word in words) for text in found)


@pytest.mark.parametrize("architecture", ["llama", "llama-pieces", "gpt2-word-pieces", "t5"])
def test_a_banned_word_never_appears(
    small_model: Callable[..., Path], tmp_path: Path, architecture: str
) -> None:
    model = opened(small_model(architecture))
    free = texts(model, 200, None)
    words = common(free, 2)
    assert hold(free, words) > 20
    (tmp_path / "words").write_text("\n".join(words))
    assert hold(texts(model, 100, tmp_path / "words"), words) == 0


@pytest.mark.parametrize(
    "way",
    [
        {"num_beams": 4, "temperature": None, "top_p": None},
        {"num_beams": 3, "set": ("temperature=3.0",), "temperature": None},
        {"prompt_lookup": 4},
        {"prompt_lookup": 4, "temperature": None, "top_p": None, "greedy": True},
    ],
    ids=["beams", "sampled-beams", "lookup", "greedy-lookup"],
)
def test_beams_and_speculation_obey(
    small_model: Callable[..., Path], tmp_path: Path, way: dict[str, Any]
) -> None:
    model = opened(small_model("llama"))
    free = texts(model, 12, None, **way)
    words = common(free, 1) + common(free, 2)
    assert hold(free, words) > 3
    (tmp_path / "words").write_text("\n".join(words))
    assert hold(texts(model, 12, tmp_path / "words", **way), words) == 0


def test_speculation_gives_what_plain_decoding_gives(
    small_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = opened(small_model("llama"))
    greedy: dict[str, Any] = {"temperature": None, "top_p": None, "greedy": True}
    (tmp_path / "words").write_text("\n".join(common(texts(model, 4, None, **greedy), 2)))
    plain = texts(model, 4, tmp_path / "words", **greedy)
    assert texts(model, 4, tmp_path / "words", prompt_lookup=4, **greedy) == plain


def test_exactly_the_tokens_that_complete_a_word_are_forbidden() -> None:
    """Against trying every token behind every text."""
    draw = random.Random(2)
    vocabulary = [b"", b"\xc3", b"\xa9", b"\x89", b"a\xc3", b"\xe2\x80", b"\x8b", b"\x8bb", b"\xc2", b"\xad"]
    vocabulary += [
        text.encode() for text in ("\u200b", "a\u2060\u200b", "\u200bb", "b\ufeff", "\u200d\u200d")
    ]
    vocabulary += [
        "".join(draw.choices("abAB\u00e9\u00c9 ", k=draw.randint(1, 4))).encode() for _ in range(150)
    ]
    words = ["ab", "a\u00e9b", "bb a", "aabb"]
    banned = Banned(words, vocabulary)

    def holds(text: bytes) -> bool:
        visible = re.sub("[\u200b\u200d\u2060\ufeff\u00ad]", "", text.decode(errors="replace"))
        return any(word in visible.lower() for word in words)

    tried = 0
    for _ in range(150):
        ids: list[int] = []
        for _ in range(12):
            behind = b"".join(vocabulary[token] for token in ids)
            scores = banned(torch.tensor([[0, *ids]]), torch.zeros(1, len(vocabulary)))[0]
            wrong = [holds(behind + text) and bool(text) for text in vocabulary]
            assert scores.isinf().tolist() == wrong, (behind, words)
            tried += sum(wrong)
            ids.append(draw.choice([token for token, no in enumerate(wrong) if not no]))
    assert tried > 1000


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("Bad", "bAD"),
        ("bad", "ｂａｄ"),
        ("caf\u00e9", "CAFE\u0301"),
        ("stra\u00dfe", "STRASSE"),
        ("\u4f60\u597d", "\u4f60 \u597d"),
        ("e.g.", "e. g."),
        ("bad word", "bad\nWord"),
        ("bad", "b\u200b\u00ad\u200b\ufeffad"),
        ("b\u200bad", "bad"),
        ("\u4f60\u597d", "\u4f60\u2060\u597d"),
    ],
)
def test_spellings(word: str, text: str) -> None:
    data = text.encode()
    banned = Banned([word], [bytes([byte]) for byte in range(256)])
    scores = banned(torch.tensor([list(data[:-1])]), torch.zeros(1, 256))[0]
    assert scores[data[-1]].isinf()
    assert not banned(torch.tensor([list(data[:-2])]), torch.zeros(1, 256))[0].isinf().any()


@pytest.mark.parametrize("architecture", ["llama", "llama-pieces", "gpt2-word-pieces"])
def test_texts_of_tokens_add_up_to_what_is_decoded(
    small_model: Callable[..., Path], architecture: str
) -> None:
    tokenizer = opened(small_model(architecture)).tokenizer
    spelled = token_texts(tokenizer, tokenizer.size)
    draw = random.Random(1)
    usable = [token for token, text in enumerate(spelled) if text.decode(errors="ignore").encode() == text]
    (first,) = tokenizer.encode_literal("a")
    for _ in range(200):
        ids = [first, *draw.choices(usable, k=12)]
        joined = b"".join(spelled[token] for token in ids).decode(errors="replace")
        assert joined.strip() == tokenizer.decode(ids).strip()


@pytest.mark.slow
def test_the_default_model_never_writes_it(default_model: Path, tmp_path: Path) -> None:
    model = opened(default_model)
    words = ["the", "an", "to be"]
    (tmp_path / "words").write_text("\n".join(words))
    more: dict[str, Any] = {"temperature": 1.5, "max_new_tokens": 5}
    assert hold(texts(model, 24, None, **more), words) > 2
    assert hold(texts(model, 100, tmp_path / "words", **more), words) == 0
