"""The five tasks and templates, for each family of models; language codes against transformers' own."""

from typing import Any

import pytest
from transformers.models.m2m_100 import tokenization_m2m_100 as m2m
from transformers.models.mbart50 import tokenization_mbart50 as mbart50
from transformers.models.nllb import tokenization_nllb as nllb

from textgen_cli.errors import InputError, UsageError
from textgen_cli.text.languages import LANGUAGES, code, language
from textgen_cli.text.presets import PRESETS, Preset, Prompt, Reader, needed, prompt_for, reader
from textgen_cli.text.template import template_fields

INSTRUCT = Reader("causal", instruct=True)
BASE = Reader("causal")
T5 = Reader("seq2seq", prefixes=True)
MARIAN = Reader("seq2seq")
EXTRACTIVE = Reader("question-answering")

RECORD: dict[str, dict[str, Any]] = {
    "translate": {"text": "Good morning.", "to": "French"},
    "summarize": {"text": "A long text."},
    "qa": {"question": "Who?", "context": "Ann did it."},
    "chat": {"prompt": "Hello"},
    "story": {"prompt": "A dark night."},
}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_templates_use_the_declared_fields_and_no_other(preset: Preset) -> None:
    assert preset.main in preset.fields
    for template in (preset.instruction, preset.few_shot):
        assert set(template_fields(template)) == set(preset.fields)
    for template in (*preset.stop, preset.encoder):
        assert set(template_fields(template)) <= set(preset.fields)
    assert needed(preset) == list(preset.fields)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("model", [INSTRUCT, BASE, T5, MARIAN])
def test_every_task_reaches_every_generating_model(name: str, model: Reader) -> None:
    prompt = prompt_for(PRESETS[name], model, RECORD[name], {})
    seen = prompt.text or prompt.messages[-1]["content"]  # type: ignore[index]
    assert all(value in seen or model is MARIAN for value in RECORD[name].values())
    assert RECORD[name][PRESETS[name].main] in seen
    assert [prompt.text, prompt.messages, prompt.pair].count(None) == 2


def test_a_base_models_own_example_ends_before_a_stop_string() -> None:
    """The stop strings are those of the pattern: each shown answer would end at one of them."""
    for name in ("summarize", "qa"):
        prompt = prompt_for(PRESETS[name], BASE, RECORD[name], {})
        assert prompt.text is not None
        label = prompt.text.rsplit("\n", 1)[1]  # "Summary:" or "Answer:"
        shown = prompt.text.split(label, 1)[1]
        assert min(shown.find(stop) for stop in prompt.stop if stop in shown) > 0
        assert prompt.text.endswith(label)
        assert prompt.trim


@pytest.mark.parametrize(
    ("name", "model", "expected"),
    [
        ("translate", T5, Prompt(text="translate English to French: Good morning.")),
        ("summarize", T5, Prompt(text="summarize: A long text.")),
        ("qa", T5, Prompt(text="question: Who? context: Ann did it.")),
        ("qa", MARIAN, Prompt(text="question: Who? context: Ann did it.")),
        ("translate", MARIAN, Prompt(text="Good morning.")),
        ("summarize", MARIAN, Prompt(text="A long text.")),
        ("qa", EXTRACTIVE, Prompt(pair=("Who?", "Ann did it."))),
        ("story", BASE, Prompt(text="A dark night.")),
        ("chat", INSTRUCT, Prompt(messages=({"role": "user", "content": "Hello"},))),
    ],
)
def test_forms(name: str, model: Reader, expected: Prompt) -> None:
    assert prompt_for(PRESETS[name], model, RECORD[name], {}) == expected


def test_stop_strings_name_the_languages() -> None:
    prompt = prompt_for(PRESETS["translate"], BASE, {"text": "Hallo {to}", "to": "fr"}, {"from": "deu_Latn"})
    assert prompt.text is not None
    assert prompt.text.endswith("German: Hallo {to}\nFrench:")
    assert "\nGerman:" in prompt.stop


@pytest.mark.parametrize(
    ("codes", "expected"),
    [("flores", ("eng_Latn", "zho_Hans")), ("m2m", ("en", "zh")), ("mbart", ("en_XX", "zh_CN"))],
)
def test_translation_by_code(codes: Any, expected: tuple[str, str]) -> None:
    prompt = prompt_for(
        PRESETS["translate"], Reader("seq2seq", codes=codes), {"text": "Hi"}, {"to": "chinese"}
    )
    assert prompt == Prompt(text="Hi", source_code=expected[0], target_code=expected[1])


def test_a_language_without_a_code() -> None:
    model = Reader("seq2seq", codes="mbart")
    with pytest.raises(UsageError, match=r"E-LANGUAGE.*--to"):
        prompt_for(PRESETS["translate"], model, {"text": "Hi"}, {"to": "Klingon"})
    with pytest.raises(InputError, match=r"E-LANGUAGE.*Danish"):
        prompt_for(PRESETS["translate"], model, {"text": "Hi", "to": "Danish"}, {})
    text = prompt_for(PRESETS["translate"], T5, {"text": "Hi"}, {"to": "Klingon"}).text
    assert text == "translate English to Klingon: Hi"  # words may name any language


def test_a_marian_model_is_told_its_target_or_asked_for_its_own_pair() -> None:
    """What it cannot be told it is not asked for: the text would be in another language and look right."""
    tags = frozenset({">>fra<<", ">>de<<", ">>cmn_Hans<<", ">>pt_br<<"})
    several = Reader("seq2seq", tags=tags, pair=("en", "zh"))

    def text(model: Reader, record: dict[str, str], **options: str) -> str | None:
        return prompt_for(PRESETS["translate"], model, {"text": "Hi", **record}, options).text

    for word, mark in (("fr", "fra"), ("German", "de"), ("zho_Hans", "cmn_Hans"), ("pt_br", "pt_br")):
        assert text(several, {"to": word}) == text(several, {}, to=word) == f">>{mark}<< Hi"
    with pytest.raises(UsageError, match=r"E-LANGUAGE.*--to.*no token for 'Danish'"):
        text(several, {}, to="da")
    with pytest.raises(InputError, match=r"E-LANGUAGE.*from.*translates from English"):
        text(several, {"from": "German", "to": "fr"})

    one = Reader("seq2seq", pair=("de", "en"))
    assert text(one, {}, to="English") == text(one, {"from": "deu_Latn"}, to="en") == "Hi"
    for record, options in (({}, {"to": "French"}), ({"to": "Klingon"}, {})):
        with pytest.raises((UsageError, InputError), match="translates into English"):
            text(one, record, **options)
    assert text(Reader("seq2seq", pair=("mul", "ROMANCE")), {"from": "x", "to": "y"}) == "Hi"
    known = [m.knows_target for m in (several, one, T5, BASE, Reader("seq2seq", codes="m2m"), MARIAN)]
    assert known == [True] * 5 + [False]


def test_options_come_before_the_record_and_the_record_before_the_default() -> None:
    record = {"text": "Hi", "from": "German", "to": "Dutch"}
    text = prompt_for(PRESETS["translate"], T5, record, {"to": "French"}).text
    assert text == "translate German to French: Hi"


def test_plain_input_fills_the_main_field() -> None:
    assert prompt_for(PRESETS["summarize"], T5, {"prompt": "Text"}, {}).text == "summarize: Text"
    assert prompt_for(PRESETS["summarize"], T5, {"prompt": "no", "text": "yes"}, {}).text == "summarize: yes"
    assert prompt_for("<{text}>", BASE, {"prompt": "Text"}, {}).text == "<Text>"


@pytest.mark.parametrize(
    ("record", "name"), [({"text": "Hi"}, "to"), ({"to": "French"}, "text"), ({"text": 1, "to": []}, "to")]
)
def test_missing_and_unusable_fields_are_named(record: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError) as caught:
        prompt_for(PRESETS["translate"], BASE, record, {})
    assert (caught.value.name, caught.value.subject) == ("E-FIELD", name)


@pytest.mark.parametrize(
    ("name", "family"), [("translate", "masked"), ("qa", "masked"), ("summarize", "question-answering")]
)
def test_a_task_that_the_model_cannot_do(name: str, family: Any) -> None:
    with pytest.raises(UsageError, match="E-TASK"):
        prompt_for(PRESETS[name], Reader(family), RECORD[name], {})


def test_templates_are_text_or_a_message() -> None:
    record, options = {"text": "Hi"}, {"to": "French", "system": "Be brief."}
    assert prompt_for("{to}: {text}", BASE, record, options) == Prompt(text="French: Hi")
    messages = prompt_for("{to}: {text}", INSTRUCT, record, options).messages
    assert messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "French: Hi"},
    )
    assert prompt_for("{text} [MASK]", Reader("masked"), record, {}) == Prompt(text="Hi [MASK]")
    assert needed("{to}: {text}") == ["to", "text"]


def test_codes_are_those_of_the_models() -> None:
    assert {lang.flores for lang in LANGUAGES} <= set(nllb.FAIRSEQ_LANGUAGE_CODES)
    assert {lang.mbart for lang in LANGUAGES} - {""} <= set(mbart50.FAIRSEQ_LANGUAGE_CODES)
    known = set(m2m.FAIRSEQ_LANGUAGE_CODES["m2m100"])
    assert {lang.m2m for lang in LANGUAGES} - {""} <= known
    assert {lang.iso for lang in LANGUAGES if not lang.m2m} & known == set()


def test_words_are_unambiguous() -> None:
    assert len({lang.flores for lang in LANGUAGES}) == len(LANGUAGES) >= 60
    for lang in LANGUAGES:
        for word in (lang.name, lang.name.upper(), lang.iso, lang.flores, lang.mbart):
            assert not word or language(word) == lang
    assert code("Farsi", "flores") == "pes_Arab"
    assert code("nonsense", "flores") is None


@pytest.mark.parametrize(
    ("sign", "codes"), [("eng_Latn", "flores"), ("__en__", "m2m"), ("en_XX", "mbart"), ("other", None)]
)
def test_reader_knows_the_codes_by_the_vocabulary(sign: str, codes: str | None) -> None:
    found = reader("seq2seq", instruct=False, model_type="m2m_100", vocabulary={sign: 5})
    assert found == Reader("seq2seq", codes=codes)  # type: ignore[arg-type]
    assert reader("seq2seq", instruct=False, model_type="t5", vocabulary={}).prefixes
