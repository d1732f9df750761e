"""The five applications as data: what each says to an instruct model, a base model and an encoder-decoder.

From a task (or a template of the user's) and the fields of a record to the prompt of one family of models.
It knows no model: the caller tells the family, whether it follows instructions, and its language codes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from textgen_cli.errors import InputError, TextgenError, UsageError
from textgen_cli.text.languages import Codes, code, language, tag
from textgen_cli.text.template import fill, template_fields, text_of

Family = Literal["causal", "seq2seq", "masked", "question-answering"]


@dataclass(frozen=True)
class Preset:
    """One application. Its templates are filled with its fields, from options, the record or the default."""

    name: str
    main: str  # the field that plain input (a prompt, a line, stdin) fills
    fields: Mapping[str, str | None]  # name -> default; None: must be given
    instruction: str  # the user's message for a model that follows instructions
    few_shot: str  # what a base model continues
    stop: tuple[str, ...] = ()  # templates too; where a base model's answer ends
    encoder: str = (
        ""  # the input of an encoder-decoder trained with prefixes, as T5; "": the main field alone
    )
    spans: bool = False  # an extractive model can do it from (question, context)


@dataclass(frozen=True)
class Prompt:
    """What a model will see: exactly one of text, messages and pair is set."""

    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    pair: tuple[str, str] | None = None  # question, context
    stop: tuple[str, ...] = ()
    trim: bool = False  # the text continues a label such as "Answer:"; blanks around it are not part of it
    source_code: str | None = None  # the tokenizer's src_lang
    target_code: str | None = None  # its tgt_lang, the first token generated


@dataclass(frozen=True)
class Reader:
    """What of a model decides how it is to be asked."""

    family: Family
    instruct: bool = False  # it is to be spoken to in messages: it has a chat template, and a chat is meant
    prefixes: bool = False  # an encoder-decoder trained with task prefixes: T5 and its kin
    codes: Codes | None = None  # an encoder-decoder that is told languages by code: NLLB, M2M100, mBART-50
    tags: frozenset[str] = frozenset()  # one that is told its target by a token before the text: Marian
    pair: tuple[str | None, str | None] = (None, None)  # what it translates from and into, where it says so

    @property
    def knows_target(self) -> bool:
        """Whether the language wanted reaches it, or can be compared with its own."""
        return bool(
            self.family != "seq2seq"
            or self.codes
            or self.prefixes
            or self.tags
            or language(self.pair[1] or "")
        )


PREFIXED = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers"})


def reader(
    family: Family,
    *,
    instruct: bool,
    model_type: str,
    vocabulary: Collection[str],
    pair: tuple[str | None, str | None] = (None, None),
) -> Reader:
    """How a model is to be asked, from its config's model_type, its tokenizer's vocabulary and language pair."""
    signs: dict[str, Codes] = {"eng_Latn": "flores", "__en__": "m2m", "en_XX": "mbart"}
    codes = next((kind for sign, kind in signs.items() if family == "seq2seq" and sign in vocabulary), None)
    tags = [word for word in vocabulary if word.startswith(">>") and word.endswith("<<")]
    return Reader(
        family,
        instruct=instruct,
        prefixes=model_type in PREFIXED,
        codes=codes,
        tags=frozenset(tags if model_type == "marian" else ()),
        pair=pair,
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="translate",
            main="text",
            fields={"text": None, "from": "English", "to": None},
            instruction="Translate the following text from {from} to {to}. "
            "Answer with the translation only.\n\n{text}",
            few_shot="The same text in {from} and in {to}.\n\n{from}: {text}\n{to}:",
            stop=("\n\n", "\n{from}:", "\n{to}:"),
            encoder="translate {from} to {to}: {text}",
        ),
        Preset(
            name="summarize",
            main="text",
            fields={"text": None},
            instruction="Summarize the following text in a few sentences. "
            "Answer with the summary only.\n\n{text}",
            few_shot="Text: The city council met on Tuesday for four hours. After a long debate it voted to "
            "close the old bridge to cars from May on, because repairs would cost more than a new one. "
            "Cyclists and walkers may still use it.\n"
            "Summary: The council will close the old bridge to cars in May, as repairs cost too much; "
            "cyclists and walkers may still cross it.\n\n"
            "Text: {text}\nSummary:",
            stop=("\n\n", "\nText:"),
            encoder="summarize: {text}",
        ),
        Preset(
            name="qa",
            main="context",
            fields={"context": None, "question": None},
            instruction="Answer the question from the text below. Answer briefly.\n\nText:\n{context}\n\n"
            "Question: {question}",
            few_shot="Text: The lighthouse was built in 1887 and stands 41 metres tall.\n"
            "Question: When was the lighthouse built?\nAnswer: In 1887.\n\n"
            "Text: {context}\nQuestion: {question}\nAnswer:",
            stop=("\n",),
            encoder="question: {question} context: {context}",
            spans=True,
        ),
        Preset(
            name="chat",
            main="prompt",
            fields={"prompt": None},
            instruction="{prompt}",
            few_shot="A conversation between a user and a helpful assistant.\n\nUser: {prompt}\nAssistant:",
            stop=("\nUser:",),
        ),
        Preset(
            name="story",
            main="prompt",
            fields={"prompt": None},
            instruction="Write a short story. It begins with, or is about, the following.\n\n{prompt}",
            few_shot="{prompt}",
        ),
    )
}


def needed(asked: Preset | str) -> list[str]:
    """The fields a task or template reads; UsageError E-TEMPLATE for a broken one, before a model loads."""
    return list(asked.fields) if isinstance(asked, Preset) else template_fields(asked)


def prompt_for(
    asked: Preset | str, model: Reader, record: Mapping[str, Any], options: Mapping[str, str]
) -> Prompt:
    """The prompt of one record for a task, or for a template of the user's.

    A field comes from the options, else from the record, else from its default; a record that has only a
    `prompt` gives it as the main field (`text` for a template). The option `system` is a system message.
    Raises InputError E-FIELD for a missing or unusable field, UsageError E-TASK where the model can't do
    the task, E-TEMPLATE, and E-LANGUAGE for a language without a code (InputError where the record names it).
    """
    if isinstance(asked, str):
        text = fill(asked, {**_with_main(record, "text"), **options})
        return _message(text, options) if model.instruct and model.family == "causal" else Prompt(text=text)
    fields = _fields(asked, record, options)
    match model.family:
        case "causal":
            if model.instruct:
                return _message(fill(asked.instruction, fields), options)
            stop = tuple(fill(string, fields) for string in asked.stop)
            return Prompt(text=fill(asked.few_shot, fields), stop=stop, trim=bool(stop))
        case "seq2seq":
            return _for_encoder(asked, model, fields, record, options)
        case "question-answering" if asked.spans:
            return Prompt(pair=(fields["question"], fields["context"]))
        case _:
            raise UsageError("E-TASK", f"--task {asked.name}", f"a {model.family} model cannot do it")


def _with_main(record: Mapping[str, Any], main: str) -> dict[str, Any]:
    return {main: record["prompt"], **record} if "prompt" in record else dict(record)


def _fields(preset: Preset, record: Mapping[str, Any], options: Mapping[str, str]) -> dict[str, str]:
    """The preset's fields as text; languages by their names."""
    defaults = {name: value for name, value in preset.fields.items() if value is not None}
    found = {**defaults, **_with_main(record, preset.main), **options}
    fields = {name: text_of(found, name) for name in preset.fields}
    for name in ("from", "to"):
        if name in fields and (known := language(fields[name])):
            fields[name] = known.name
    return fields


def _message(text: str, options: Mapping[str, str]) -> Prompt:
    system = ({"role": "system", "content": options["system"]},) if options.get("system") else ()
    return Prompt(messages=(*system, {"role": "user", "content": text}))


def _for_encoder(
    preset: Preset,
    model: Reader,
    fields: Mapping[str, str],
    record: Mapping[str, Any],
    options: Mapping[str, str],
) -> Prompt:
    main = fields[preset.main]
    if preset.name == "translate":
        if model.codes:
            source, target = (_code(fields[name], name, model.codes, options) for name in ("from", "to"))
            return Prompt(text=main, source_code=source, target_code=target)
        into = None if model.tags else model.pair[1]
        _check_pair((model.pair[0], into), {**record, **options}, options)
        if model.tags:
            mark = tag(fields["to"], model.tags)
            if mark is None:
                raise _no_language("to", f"this model has no token for {fields['to']!r}", options)
            return Prompt(text=f"{mark} {main}")
    # A question must reach the model in any case; else one trained for a single task takes the bare text.
    if preset.encoder and (model.prefixes or preset.spans):
        return Prompt(text=fill(preset.encoder, fields))
    return Prompt(text=main)


def _check_pair(
    pair: tuple[str | None, str | None], given: Mapping[str, Any], options: Mapping[str, str]
) -> None:
    """E-LANGUAGE where a model of one pair of languages is asked for another, which it could not be told."""
    for name, word, own in zip(("from", "to"), ("from", "into"), pair, strict=True):
        known = language(own or "")
        if known is not None and name in given and language(str(given[name])) != known:
            raise _no_language(name, f"this model translates {word} {known.name}", options)


def _code(word: str, name: str, codes: Codes, options: Mapping[str, str]) -> str:
    found = code(word, codes)
    if found is not None:
        return found
    raise _no_language(name, f"this model has no code for {word!r}", options)


def _no_language(name: str, fact: str, options: Mapping[str, str]) -> TextgenError:
    """The command line is wrong where it names the language, else the record."""
    if name in options:
        return UsageError("E-LANGUAGE", f"--{name}", fact)
    return InputError("E-LANGUAGE", name, fact)
