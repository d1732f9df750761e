"""Constrained decoding: random weights write only what the grammar allows, and bad grammars are refused."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from textgen_cli.errors import ModelError, TextgenError, UsageError
from textgen_cli.generate import constrain, grammar
from textgen_cli.generate.constrain import Constrainer, State
from textgen_cli.generate.grammar import Constraint, from_choices, from_json_schema, from_regex
from textgen_cli.model.past import CACHE

CORPUS = [
    '{"name": "Ann", "age": 31, "tags": ["a", "b"], "ok": true, "none": null}',
    "The quick brown fox jumps over the lazy dog. Der schnelle Fuchs. Ça va très bien! 你好",
    "yes no maybe positive negative neutral red green blue 2026-11-23 1.5e-3",
]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


def sentencepiece_bytes() -> Tokenizer:
    """As Llama 2 and Gemma: BPE over blanks written as U+2581, unknown letters as bytes."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["</s>", "<unk>", *fallback], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())  # training marks the bytes as special, real models don't
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """As T5: pieces with blanks written as U+2581, and no bytes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[SEP]", "[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def suffixed() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(vocab_size=300, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


END = 0  # the first special token of each tokenizer above
V = 448  # wider than any of them


@cache
def built(make: Callable[[], Tokenizer]) -> Tokenizer:
    return make()


@cache
def random_llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def sample(
    net: Any, constrainer: Constrainer, prompt: Sequence[int], count: int, limit: int, eos: set[int]
) -> list[tuple[list[int], State]]:
    """`count` samples of at most `limit` tokens after one prompt."""
    states = [constrainer.start() for _ in range(count)]
    texts: list[list[int]] = [[] for _ in states]
    ids = torch.tensor([list(prompt)] * count)
    cache_ = None
    for _ in range(limit):
        out = net(input_ids=ids, use_cache=True, **{CACHE: cache_})
        cache_, scores = out[CACHE], out.logits[:, -1].float()
        constrainer.apply(states, scores)
        chosen = torch.multinomial(scores.softmax(-1), 1)
        for text, state, token in zip(texts, states, chosen.flatten().tolist(), strict=True):
            if not state.finished and token not in eos:
                text.append(token)
        constrainer.advance(states, chosen.flatten().tolist())
        ids = chosen
        if all(state.finished for state in states):
            break
    return list(zip(texts, states, strict=True))


def sample_texts(
    constraint: Constraint, make: Callable[[], Tokenizer] = byte_level, count: int = 100, limit: int = 400
) -> list[str]:
    """The texts of samples from random weights; every one must be complete."""
    tokenizer = built(make)
    constrainer = Constrainer(tokenizer, V, [END], constraint)
    torch.manual_seed(1)
    samples = sample(random_llama(), constrainer, [3, 4], count, limit, {END})
    assert all(state.finished and not state.failure for _, state in samples)
    # After a token of the prompt, as text is decoded when it continues one: no first blank is dropped.
    context = tokenizer.encode("a", add_special_tokens=False).ids
    before = tokenizer.decode(context)
    return [tokenizer.decode(context + ids).removeprefix(before) for ids, _ in samples]


SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "ok": {"type": "boolean"},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "array": {
        "type": "array",
        "items": {"enum": ["a", "é", "你", '"\\\n', 1, None]},
        "minItems": 1,
        "maxItems": 5,
    },
    "numbers": {
        "type": "array",
        "prefixItems": [
            {"type": "integer", "multipleOf": 7, "minimum": -5, "maximum": 500},
            {"type": "null"},
        ],
        "items": {"type": "number", "exclusiveMinimum": 0, "maximum": 2.5},
        "minItems": 2,
        "maxItems": 4,
    },
    "pattern": {"type": "string", "pattern": "^[a-c]{2}(-[0-9]{1,3})?$"},
    "unanchored": {"type": "string", "pattern": "[xy]z", "maxLength": 12},
    "format": {"type": "string", "format": "date"},
    "ref": {
        "$defs": {"leaf": {"const": {"x": [1, "é"]}}},
        "anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "object", "maxProperties": 0}],
    },
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^k[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    "old draft": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {
            "pair": {"type": "array", "items": [{"type": "null"}, {"enum": [1, 2]}], "additionalItems": False}
        },
        "allOf": [{"$ref": "#/definitions/pair"}, {"minItems": 2}],
    },
}


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("make", [byte_level, sentencepiece_bytes])
def test_json_of_random_weights_validates(name: str, make: Callable[[], Tokenizer]) -> None:
    validator = jsonschema.validators.validator_for(SCHEMAS[name])(
        SCHEMAS[name], format_checker=jsonschema.FormatChecker()
    )
    texts = sample_texts(from_json_schema(json.dumps(SCHEMAS[name])), make)
    for text in texts:
        validator.validate(json.loads(text))
    assert len(set(texts)) > 1


def test_json_stands_on_one_line_without_blanks() -> None:
    for text in sample_texts(from_json_schema(json.dumps(SCHEMAS["object"]))):
        assert text == json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":")) or "\\" in text
        assert "\n" not in text


@pytest.mark.parametrize(
    "pattern",
    [
        "[a-z]{1,5}@[a-z]{1,5}\\.(com|org)",
        "^(yes|no)$",
        "\\d{4}-\\d{2}",
        "(?i)ok/?",
        "a|ab|abc",
        "[^a]{1,6}",
        "é{1,3}你?",
        "x\\n?y",
        "[☃🙂]{2}",
    ],
)
@pytest.mark.parametrize("make", [byte_level, sentencepiece_bytes])
def test_regex_matches_the_whole_text(pattern: str, make: Callable[[], Tokenizer]) -> None:
    for text in sample_texts(from_regex(pattern), make):
        assert re.fullmatch(pattern, text), text


CHOICES = ["yes", "no", "maybe, or not", "yes no", "y", "naïve", "你好", "a\nb", "<|end|>", 'q"', "back\\"]


@pytest.mark.parametrize("make", [byte_level, sentencepiece_bytes])
def test_choices_are_given_whole_and_each_is_reached(make: Callable[[], Tokenizer]) -> None:
    quoted = ",".join('"' + choice.replace('"', '""') + '"' for choice in CHOICES)
    assert set(sample_texts(from_choices(quoted), make, count=400)) == set(CHOICES)


def test_choices_without_quotes_lose_the_blank_after_the_comma() -> None:
    assert json.loads(from_choices('yes, no," maybe"').text) == ["yes", "no", " maybe"]


def test_an_encoder_decoder_may_begin_with_the_blank_that_decoding_drops() -> None:
    tokenizer = built(unigram)
    constraint = from_choices("yes,no,red")
    strict = Constrainer(tokenizer, V, [END], constraint)
    free = Constrainer(tokenizer, V, [END], constraint, text_start=True)
    blank = tokenizer.token_to_id("▁")
    assert not strict.mask(strict.start())[blank]
    assert free.mask(free.start())[blank]
    torch.manual_seed(1)
    samples = sample(random_llama(), free, [3], 100, 50, {END})
    texts = [tokenizer.decode(ids) for ids, _ in samples]
    assert set(texts) == {"yes", "no", "red"}
    assert any((tokenizer.id_to_token(ids[0]) or "").startswith("▁") for ids, _ in samples)


def test_text_start_changes_nothing_for_byte_level_tokens() -> None:
    tokenizer = built(byte_level)
    masks = []
    for text_start in (False, True):
        constrainer = Constrainer(tokenizer, V, [END], from_regex("[a-z]+"), text_start=text_start)
        masks.append(constrainer.mask(constrainer.start()))
    assert (masks[0] == masks[1]).all()


GBNF = r"""
root ::= expr
expr ::= term ("+" term){0,3}
term ::= [0-9] | "(" [a-z]{1,2} ")"
"""
LARK = """
start: expr
expr: term | expr "+" term
term: /[0-9]/ | "(" /[a-z]{1,2}/ ")"
"""


@pytest.mark.parametrize(("name", "text"), [("sum.gbnf", GBNF), ("sum.lark", LARK)])
def test_grammar_files(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    for found in sample_texts(grammar.from_grammar(str(path))):
        assert re.fullmatch(r"([0-9]|\([a-z]{1,2}\))(\+([0-9]|\([a-z]{1,2}\)))*", found), found


def test_any_json_is_an_object_or_an_array() -> None:
    constrainer = Constrainer(built(byte_level), V, [END], grammar.from_json())
    mask = constrainer.mask(constrainer.start())
    first = {built(byte_level).decode([int(token)])[0] for token in np.flatnonzero(mask)}
    assert first == {"{", "["}


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def consume(constrainer: Constrainer, tokenizer: Tokenizer, text: str) -> State:
    state = constrainer.start()
    for token in ids_of(tokenizer, text):
        constrainer.advance([state], [token])
    return state


def test_end_is_allowed_exactly_where_the_text_may_end() -> None:
    tokenizer = built(byte_level)
    constrainer = Constrainer(tokenizer, V, [END, 1], from_regex("a(bc)*d?"))
    for text, may_end, finished in [
        ("", False, False),
        ("a", True, False),
        ("ab", False, False),
        ("ad", True, True),
    ]:
        state = consume(constrainer, tokenizer, text)
        mask = constrainer.mask(state)
        assert (mask[END], mask[1], constrainer.finished(state)) == (may_end, may_end, finished), text
        assert state.failure is None


def test_end_token_finishes() -> None:
    tokenizer = built(byte_level)
    constrainer = Constrainer(tokenizer, V, [END], from_regex("a+"))
    state = consume(constrainer, tokenizer, "a")
    constrainer.advance([state], [END])
    assert state.finished
    assert state.failure is None


def test_without_an_end_token_the_text_ends_where_nothing_can_follow() -> None:
    tokenizer = built(byte_level)
    constrainer = Constrainer(tokenizer, V, [], from_choices("ab,abc"))
    assert not consume(constrainer, tokenizer, "ab").finished
    done = consume(constrainer, tokenizer, "abc")
    assert done.finished
    assert done.failure is None
    assert constrainer.mask(constrainer.start()).shape == (V,)


def test_only_text_tokens_are_ever_allowed() -> None:
    tokenizer = built(byte_level)
    constrainer = Constrainer(tokenizer, V, [END], from_regex("(?s:.*)"))
    allowed = {int(token) for token in np.flatnonzero(constrainer.mask(constrainer.start()))}
    size = tokenizer.get_vocab_size()
    assert size < V
    assert max(allowed) == size - 1  # no padded row
    assert tokenizer.token_to_id("<think>") in allowed  # an added token that is text
    assert tokenizer.token_to_id("<|start|>") not in allowed
    assert END in allowed


def test_a_narrow_model_loses_the_tokens_beyond_its_scores() -> None:
    constrainer = Constrainer(built(byte_level), 300, [END, 350], from_regex("(?s:.*)"))
    scores = torch.zeros(1, 300)
    constrainer.apply([constrainer.start()], scores)
    assert scores.isfinite().sum() > 200


def test_apply_masks_what_mask_says_and_leaves_the_rest() -> None:
    tokenizer = built(byte_level)
    constrainer = Constrainer(tokenizer, V, [END], from_regex("[a-m]{2}"))
    states = [consume(constrainer, tokenizer, text) for text in ("", "a", "ab")]
    scores = torch.randn(3, V)
    before = scores.clone()
    constrainer.apply(states, scores)
    for row in range(2):
        mask = torch.from_numpy(constrainer.mask(states[row]))
        assert torch.equal(scores[row][mask], before[row][mask])
        assert bool((scores[row][~mask] == -torch.inf).all())
    assert torch.equal(scores[2], before[2])  # finished


def test_the_grammar_wins_over_a_ban_of_all_that_it_allows() -> None:
    tokenizer = built(byte_level)
    constrainer = Constrainer(tokenizer, V, [END], from_regex("[ab]c"))
    scores = torch.randn(2, V)
    a, b = ids_of(tokenizer, "a")[0], ids_of(tokenizer, "b")[0]
    scores[0, [a, b]] = -torch.inf
    scores[1, a] = -torch.inf
    on_device = scores.clone()
    states = [constrainer.start(), constrainer.start()]
    constrainer.apply(states, scores)
    constrain._mask_on_device([state.mask for state in states], [0, 1], on_device)
    for found in (scores, on_device):
        assert found[0].isfinite().nonzero().flatten().tolist() == sorted([a, b])
        assert found[1].isfinite().nonzero().flatten().tolist() == [b]


def test_device_masking_equals_cpu_masking() -> None:
    """The path of other devices, run here on CPU tensors."""
    tokenizer = built(byte_level)
    constrainer = Constrainer(tokenizer, V, [END], from_regex("(?s:.*)"))
    states = [consume(constrainer, tokenizer, text) for text in ("", "a")]
    first = torch.randn(3, V)
    second = first.clone()
    constrainer.apply(states, first[1:])
    constrain._mask_on_device([state.mask for state in states], [1, 2], second)
    assert torch.equal(first, second)


def test_rows_do_not_share_state() -> None:
    tokenizer = built(byte_level)
    constrainer = Constrainer(tokenizer, V, [END], from_regex("(a|b)c"))
    left, right = constrainer.start(), constrainer.start()
    a, c = (ids_of(tokenizer, letter)[0] for letter in "ac")
    constrainer.advance([left], [a])
    assert constrainer.mask(left)[c]
    assert constrainer.mask(right)[a]
    assert not constrainer.mask(right)[c]


def test_a_token_that_is_not_allowed_fails_its_row_alone(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = built(byte_level)
    constrainer = Constrainer(tokenizer, V, [END], from_regex("ab+"))
    states = [constrainer.start(), constrainer.start()]
    constrainer.advance(states, [*ids_of(tokenizer, "z"), *ids_of(tokenizer, "a")])
    assert [state.finished for state in states] == [True, False]
    assert isinstance(states[0].failure, ModelError)
    assert states[1].failure is None
    assert capfd.readouterr() == ("", "")


def error_of(call: Callable[[], object]) -> TextgenError:
    with pytest.raises(TextgenError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("make", [word_piece, suffixed])
def test_tokenizers_that_are_no_sum_of_their_tokens_are_refused(make: Callable[[], Tokenizer]) -> None:
    error = error_of(lambda: Constrainer(built(make), V, [END], from_regex("a+")))
    assert (type(error), error.name) == (ModelError, "E-CONSTRAINT")


def test_a_tokenizer_that_decodes_otherwise_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip("H", 1, 0)])
    assert error_of(lambda: Constrainer(tokenizer, V, [END], from_regex("a+"))).name == "E-CONSTRAINT"


def test_a_grammar_that_no_token_can_begin_is_refused() -> None:
    error = error_of(lambda: Constrainer(built(unigram), V, [END], from_regex("☃")))
    assert (type(error), error.name) == (ModelError, "E-CONSTRAINT")


BROKEN = [
    (from_regex("a(b"), "column 2: unclosed group"),
    (from_regex("a(?=b)"), "column 2: look-around, including look-ahead and look-behind, is not supported"),
    (from_regex("(a)\\1"), "column 4: backreferences are not supported"),
    (from_regex(""), "is empty"),
    (from_regex("a\udcff"), "is not UTF-8 text"),
    (from_choices(""), "is empty"),
    (from_choices("a,,b"), "has an empty choice"),
    (from_json_schema('{"type":\n "object",}'), "line 2, column 11"),
    (from_json_schema('{"type": "strnig"}'), "Invalid type: strnig"),
    (
        from_json_schema('{"type": "object", "requried": ["a"]}'),
        "#: 'requried' is not a keyword of JSON Schema",
    ),
    (
        from_json_schema('{"properties": {"a/b": {"items": [{"not": {}}]}}}'),
        "#/properties/a~1b/items/0: 'not' is not supported",
    ),
    (
        from_json_schema('{"$defs": {"x": {"uniqueItems": true}}}'),
        "#/$defs/x: 'uniqueItems' is not supported",
    ),
    (from_json_schema('{"x-guidance": {"lenient": true}, "type": "null"}'), "'x-guidance' is not a keyword"),
    (from_json_schema('{"type": "string", "format": "colour"}'), "Unknown format: colour"),
    (from_json_schema('{"type": "string", "pattern": "(?!a)"}'), "invalid regex: look-around"),
    (from_json_schema('{"$ref": "#/$defs/none"}'), "does not exist"),
    (from_json_schema('{"$ref": "https://example.org/schema"}'), "is not present in a registry"),
    (from_json_schema('{"minProperties": 3, "required": ["a"]}'), "'minProperties' is not supported beyond"),
    (from_json_schema('{"const": "\\ud800"}'), "unexpected end of hex escape"),
    (from_json_schema('{"items": ' * 5000 + "{}" + "}" * 5000), "is nested too deeply"),
    (Constraint("grammar", 'start: a\na: "b" | c\n', "g"), 'line 2, column 4: unknown name: "c"'),
    (Constraint("grammar", 'start: "a\n', "g"), "line 1, column 10: lexer error"),
    (Constraint("grammar", "start: /[/\n", "g"), "line 1, column 8: invalid regex: unclosed character class"),
    (Constraint("grammar", "", "g"), "Empty grammar"),
    (Constraint("grammar", 'root ::= "a"\nx ::= (', "g"), "line 2, column 8: Expected ')'"),
    (Constraint("grammar", "root ::= bar", "g"), "Rule 'bar' not found"),
]


@pytest.mark.parametrize(("constraint", "fact"), BROKEN, ids=[fact[:40] for _, fact in BROKEN])
def test_broken_grammars_are_refused_before_a_model_is_needed(constraint: Constraint, fact: str) -> None:
    error = error_of(lambda: grammar.check(constraint))
    assert (type(error), error.name) == (UsageError, "E-GRAMMAR")
    assert fact in error.fact
    assert "\n" not in error.fact


def test_a_special_token_that_the_tokenizer_lacks_is_refused() -> None:
    constraint = Constraint("grammar", 'start: "a" <|nope|>', "g")
    error = error_of(lambda: Constrainer(built(byte_level), V, [END], constraint))
    assert error.name == "E-GRAMMAR"
    assert "<|nope|>" in error.fact


def test_every_annotation_of_a_schema_is_accepted() -> None:
    notes = {
        "title": "t",
        "default": {"nonsense": 1},
        "examples": [{"not": 1}],
        "x-order": 1,
        "deprecated": True,
    }
    assert grammar.check(from_json_schema(json.dumps({"type": "integer", "$comment": "c", **notes})))


@pytest.mark.parametrize(
    ("data", "fact"), [(b"\xff{", "is not UTF-8 text"), (None, "cannot be read: No such file or directory")]
)
def test_files_that_cannot_be_read(tmp_path: Path, data: bytes | None, fact: str) -> None:
    path = tmp_path / "schema.json"
    if data is not None:
        path.write_bytes(data)
    for read in (from_json_schema, grammar.from_grammar):
        error = error_of(lambda read=read: read(str(path)))  # type: ignore[misc]
        assert (error.name, error.fact) == ("E-GRAMMAR", fact)


def test_schema_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "null"}', encoding="utf-8-sig")
    assert sample_texts(from_json_schema(str(path)), count=2) == ["null", "null"]


def test_requested_reads_one_option_and_refuses_two() -> None:
    assert grammar.requested() is None
    assert grammar.requested(json=True) == grammar.from_json()
    assert grammar.requested(choices="a,b") == from_choices("a,b")
    error = error_of(lambda: grammar.requested(regex="a", json=True))
    assert (error.name, error.subject) == ("E-CONFLICT", "--regex")
    empty = grammar.requested(choices="")
    assert empty is not None  # given, though unusable


@pytest.mark.parametrize(
    ("setting", "option"),
    [
        ({"num_beams": 2}, "--num-beams"),
        ({"prompt_lookup": 3}, "--prompt-lookup"),
        ({"draft_model": "x"}, "--draft-model"),
    ],
)
def test_beams_and_speculation_are_refused(setting: dict[str, Any], option: str) -> None:
    none: dict[str, Any] = {"num_beams": None, "prompt_lookup": None, "draft_model": None}
    grammar.refuse(**{**none, "num_beams": 1})
    error = error_of(lambda: grammar.refuse(**{**none, **setting}))
    assert (type(error), error.name, error.subject) == (UsageError, "E-CONFLICT", option)


def test_checking_needs_no_torch() -> None:
    code = "import sys; import textgen_cli.generate.grammar; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_json_of_the_default_model_validates(default_model: Path) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 10}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
    people = [
        "a baker",
        "a pilot",
        "Ann Lee",
        "the king of Spain",
        "my neighbour's cat",
        "小明",
        "nobody",
        '"x"',
        "42",
        "🙂",
    ]
    asked = "".join(
        json.dumps({"prompt": f"Describe {person} as JSON, case {n}."}) + "\n"
        for n in range(10)
        for person in people
    )
    done = through_the_program(default_model, asked, "--json-schema", json.dumps(schema), "-n", "120")
    assert len(done) == 100
    for record in done:
        assert record["finish_reason"] == "stop", record
        jsonschema.validate(json.loads(record["text"]), schema)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_choices_of_the_default_model_are_the_given_strings(default_model: Path) -> None:
    asked = "".join(json.dumps({"prompt": f"Is {n} more than fifty?"}) + "\n" for n in range(100))
    done = through_the_program(default_model, asked, "--choices", "yes,no,yes and no")
    assert len(done) == 100 and {record["text"] for record in done} <= {"yes", "no", "yes and no"}


def through_the_program(model: Path, records: str, *options: str) -> list[dict[str, Any]]:
    """What `textgen generate --jsonl --chat` writes for these records."""
    command = [
        sys.executable,
        "-m",
        "textgen_cli",
        "generate",
        "--jsonl",
        "--chat",
        "-m",
        str(model),
        *options,
    ]
    done = subprocess.run(command, input=records.encode(), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    return [json.loads(line) for line in done.stdout.splitlines()]
