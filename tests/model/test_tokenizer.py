"""Text that appears token by token, with tokenizers that fall back to bytes."""

import random

import pytest
from parts.models import byte_tokenizer, piece_tokenizer, word_tokenizer
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from textgen_cli.model.tokenizer import Tokenizer

TEXTS = ["hé 你好 🙂🙂🙂 abc", "a", "", "你", "x 🙂 y ñ", "the end, and the rest."]


def falling_back() -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma have it: letters as pieces, all else as bytes."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    bpe = Fast(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", eos_token="</s>")


@pytest.fixture(scope="module")
def bytewise() -> Tokenizer:
    return Tokenizer(falling_back(), "fallback")


def streamed(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    stream = tokenizer.stream(prompt)
    return "".join([*map(stream.feed, ids), stream.end()])


@pytest.mark.parametrize("make", [falling_back, byte_tokenizer, piece_tokenizer, word_tokenizer])
def test_pieces_make_the_whole(make: type[PreTrainedTokenizerFast]) -> None:
    tokenizer = Tokenizer(make(), "any")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids)
        assert streamed(tokenizer, [], ids) == whole
        for cut in range(len(ids)):
            before = tokenizer.decode(ids[:cut])
            if whole.startswith(before):  # no character is cut there
                assert streamed(tokenizer, ids[:cut], ids[cut:]) == whole[len(before) :], (text, cut)


def test_a_context_that_begins_amid_a_character(bytewise: Tokenizer) -> None:
    """Of a prompt of emoji only the last bytes are looked at; what follows is whole all the same."""
    for end in ("", "é", "好", "好é", "好a", "好好"):
        prompt = bytewise.encode("🙂" * 5 + end)
        for text in ("🙂 b", "é", "好a"):
            assert streamed(bytewise, prompt, bytewise.encode_literal(text)[1:]) == text, end


def test_a_prompt_that_ends_amid_a_character(bytewise: Tokenizer) -> None:
    ids = bytewise.encode("a🙂b")
    assert streamed(bytewise, ids[:-3], ids[-3:]) == "🙂b"


def test_bytes_that_are_no_character(bytewise: Tokenizer) -> None:
    """Whatever a model says, nothing fails, and what can be read is there."""
    chance = random.Random(1)
    for _ in range(300):
        prompt = [chance.randrange(2, 285) for _ in range(chance.randrange(12))]
        ids = [
            chance.randrange(2, 258) if chance.random() < 0.7 else chance.randrange(258, 285)
            for _ in range(20)
        ]
        text = streamed(bytewise, prompt, [*ids, *bytewise.encode_literal("abc")[1:]])
        assert text.endswith("abc")
    good, bad = bytewise.encode_literal("好")[1:], [2 + 0xF0]
    assert streamed(bytewise, good, [*bad, *bytewise.encode_literal("a")[1:]]).endswith("a")
