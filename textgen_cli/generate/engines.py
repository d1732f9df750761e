"""Which engine answers, and what its answers depend on: the one place that chooses.

Everything that can be refused is refused before a model loads. Engines are imported where they are opened.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from textgen_cli.config import DecodingConfig, GenerateConfig
from textgen_cli.errors import ModelError, UsageError
from textgen_cli.events import Notice, Report
from textgen_cli.generate import prompts
from textgen_cli.generate.prompts import Prompter
from textgen_cli.generate.request import Engine, Request
from textgen_cli.text.presets import Reader, reader
from textgen_cli.text.words import read_words

if TYPE_CHECKING:
    from textgen_cli.generate.grammar import Constraint
    from textgen_cli.generate.local import LocalEngine
    from textgen_cli.model.load import Model


@dataclass(frozen=True)
class Opened:
    """An engine, the prompter that speaks to it, and how a request looks to it."""

    engine: Engine
    prompter: Prompter
    rendered: Callable[[Request], str]


def check(config: GenerateConfig, *, plain: bool) -> None:
    """UsageError for a command line that no model can obey; `plain`: records have nothing but a `prompt`."""
    prompts.asked_for(config.prompting, plain=plain)
    _constraint(config)
    if config.decoding.bad_words is not None:
        read_words(config.decoding.bad_words)


def open_engine(config: GenerateConfig, seed: int, report: Report, date: datetime | None = None) -> Opened:
    """The engine that the command line asks for, ready to answer; `date`: what chat templates see as today.

    Raises UsageError for options that cannot go together, and what `model.load` raises.
    """
    asked = prompts.asked_for(config.prompting)
    count = config.decoding.num_return_sequences
    if config.endpoint.endpoint is not None:
        engine = _remote(config, report)
        known = Reader(
            "causal", instruct=prompts.wants_chat(config.prompting) or config.prompting.task is not None
        )
        return Opened(engine, Prompter(config.prompting, asked, known, seed, count), _as_sent)
    constraint = _constraint(config)
    from textgen_cli.model.load import load

    model = load(config.model, "generate", report)
    if date is not None:
        model.tokenizer.date = date
    _check_chat(config, model)
    _hint_chat(config, model, report)
    engine = ENGINES[model.family](config, model, constraint, report)
    prompter = Prompter(config.prompting, asked, _reader(config, model), seed, count)
    return Opened(engine, prompter, lambda request: _as_seen(model, request))


def _reader(config: GenerateConfig, model: "Model") -> Reader:
    """How this model is to be asked: in messages where it has a template and a chat or a task is meant."""
    chat = prompts.wants_chat(config.prompting) or config.prompting.task is not None
    vocabulary = model.tokenizer.backend.get_vocab() if config.prompting.task == "translate" else {}
    return reader(
        _FAMILY_OF.get(model.family, "causal"),
        instruct=model.tokenizer.has_template and chat,
        model_type=str(model.net.config.model_type),
        vocabulary=vocabulary,
    )


_FAMILY_OF: dict[str, Any] = {
    "causal": "causal",
    "seq2seq": "seq2seq",
    "masked": "masked",
    "question-answering": "question-answering",
}


def _check_chat(config: GenerateConfig, model: "Model") -> None:
    """A system message or a chat must reach the model: one without a template would never see it."""
    option = "--system" if config.prompting.system is not None else "--chat"
    wanted = config.prompting.chat or config.prompting.system is not None
    if prompts.wants_chat(config.prompting) and config.prompting.truncate:
        raise UsageError("E-CONFLICT", "--truncate", "would cut a conversation's control tokens")
    if wanted and model.family != "causal":
        raise UsageError("E-FAMILY", option, f"means nothing to a {model.family} model such as {model.name}")
    if wanted and not model.tokenizer.has_template:
        hint = f"drop {option} to continue the text as it is"
        raise ModelError("E-TEMPLATE", model.name, f"has no chat template, which {option} needs", hint=hint)


def _hint_chat(config: GenerateConfig, model: "Model", report: Report) -> None:
    plain = not prompts.wants_chat(config.prompting) and config.prompting.task is None
    if plain and model.family == "causal" and model.tokenizer.has_template:
        report(Notice(f"{model.name} has a chat template; --chat uses it", name="hint"))


def _constraint(config: GenerateConfig) -> "Constraint | None":
    """The grammar the text must obey, checked; nothing heavy is imported where none is asked for."""
    given = {name: value for name, value in asdict(config.constraint).items() if value not in (None, False)}
    if not given:
        return None
    from textgen_cli.generate import grammar

    found = grammar.requested(**given)
    if found is not None:
        grammar.check(found)
        decoding = config.decoding
        if decoding.stop:
            raise UsageError("E-CONFLICT", "--stop", "cannot be used with a constraint, which ends by itself")
        grammar.refuse(
            num_beams=decoding.num_beams,
            prompt_lookup=decoding.prompt_lookup,
            draft_model=decoding.draft_model,
        )
    return found


# --- one function a family


def open_local(
    config: GenerateConfig, model: "Model", constraint: "Constraint | None", report: Report
) -> "LocalEngine":
    """The engine of models that write text: causal and encoder-decoder."""
    from textgen_cli.generate import sampling
    from textgen_cli.generate.local import LocalEngine

    if config.prompting.top != 1:
        raise UsageError(
            "E-FAMILY",
            "--top",
            f"means nothing to a {model.family} model such as {model.name}",
            hint="--logprobs K shows alternatives",
        )
    plan = sampling.plan(config.decoding, model, report)
    constrainer = None
    if constraint is not None:
        from textgen_cli.generate.constrain import Constrainer

        grammar_refused(plan.settings.num_beams)
        if plan.speculates:
            raise UsageError(
                "E-CONFLICT", "--set prompt_lookup_num_tokens", "cannot be used with a constraint"
            )
        rows = model.net.get_output_embeddings().weight.shape[0]
        constrainer = Constrainer(
            model.tokenizer.fast, rows, plan.eos, constraint, text_start=model.family == "seq2seq"
        )
    draft = _draft(config, model, report)
    rows, cut = config.batch.rows, config.prompting.truncate
    return LocalEngine(model, plan, constrainer, draft, rows, cut, report)


def talker(config: GenerateConfig, report: Report) -> Callable[[DecodingConfig], "LocalEngine"]:
    """Opens an engine for each change of settings, on a model that is loaded once."""
    loaded: list[Model] = []

    def reopen(decoding: DecodingConfig) -> "LocalEngine":
        if config.endpoint.endpoint is not None:
            raise UsageError(
                "E-CONFLICT",
                "--endpoint",
                "has no interactive conversation yet",
                hint="pipe records with messages in",
            )
        from textgen_cli.generate.prefix import Kept
        from textgen_cli.model.load import load

        if not loaded:
            loaded.append(load(config.model, "generate", report))
        if ENGINES[loaded[0].family] is not open_local:
            raise UsageError("E-FAMILY", loaded[0].name, "holds no conversation")
        changed = replace(config, decoding=decoding)
        return replace(open_local(changed, loaded[0], _constraint(changed), report), kept=Kept())

    return reopen


def grammar_refused(num_beams: int | None) -> None:
    """UsageError where a model's own settings ask for beams and the user for a constraint."""
    if (num_beams or 1) > 1:
        raise UsageError(
            "E-CONFLICT",
            "constraint",
            "cannot be used with the beams of this model's settings",
            hint="add --num-beams 1",
        )


def _draft(config: GenerateConfig, model: "Model", report: Report) -> Any:
    """The network that guesses tokens; it must read the same ids."""
    if config.decoding.draft_model is None:
        return None
    from textgen_cli.model.load import load

    guess = load(replace(config.model, model=config.decoding.draft_model, adapter=()), "generate", report)
    if guess.tokenizer.backend.get_vocab() != model.tokenizer.backend.get_vocab():
        raise UsageError("E-DRAFT", f"--draft-model {guess.name}", "has another vocabulary than the model")
    return guess.net


def _open_fill(
    config: GenerateConfig, model: "Model", constraint: "Constraint | None", report: Report
) -> Engine:
    from textgen_cli.generate.fill import FillEngine

    _refuse_decoding(config, model)
    return FillEngine(model, config.prompting.top, config.batch.rows)


def _open_extract(
    config: GenerateConfig, model: "Model", constraint: "Constraint | None", report: Report
) -> Engine:
    from textgen_cli.generate.extract import ExtractEngine

    _refuse_decoding(config, model)
    if config.prompting.task != "qa":
        raise UsageError(
            "E-FAMILY", model.name, "answers questions about a text", hint="use --task qa --question TEXT"
        )
    return ExtractEngine(model, config.prompting.top)


def _refuse_decoding(config: GenerateConfig, model: "Model") -> None:
    """A model that draws no tokens obeys no decoding option: say so rather than ignore one."""
    default = DecodingConfig()
    chosen = asdict(config.decoding) | {"seed": default.seed}
    given = [name for name, value in chosen.items() if value != getattr(default, name)]
    given += [name for name, value in asdict(config.constraint).items() if value]
    given += ["truncate"] if config.prompting.truncate else []
    if given:
        option = "--" + given[0].replace("_", "-")
        raise UsageError("E-FAMILY", option, f"means nothing to a {model.family} model such as {model.name}")


def _open_none(
    config: GenerateConfig, model: "Model", constraint: "Constraint | None", report: Report
) -> Engine:
    raise UsageError("E-FAMILY", model.name, f"is a {model.family} model and generates no text")


ENGINES: dict[str, Callable[..., Engine]] = {
    "causal": open_local,
    "seq2seq": open_local,
    "masked": _open_fill,
    "question-answering": _open_extract,
    "sequence-classification": _open_none,
    "token-classification": _open_none,
}


def _remote(config: GenerateConfig, report: Report) -> Engine:
    """A server; what it cannot be asked for is an error."""
    import json

    from textgen_cli.generate.remote import RemoteEngine

    if config.model.offline:
        raise UsageError("E-CONFLICT", "--endpoint", "cannot be used with --offline")
    given = [name for name, value in asdict(config.constraint).items() if value and name != "json_schema"]
    given += [name for name in ("adapter", "quantize") if getattr(config.model, name)]
    given += [name for name in ("truncate",) if getattr(config.prompting, name)]
    given += ["top"] if config.prompting.top != 1 else []
    if given:
        option = "--" + given[0].replace("_", "-")
        raise UsageError("E-ENDPOINT-OPTION", option, "cannot be asked of a server")
    schema = None
    constraint = _constraint(config)
    if constraint is not None:
        schema = json.loads(constraint.text)
    return RemoteEngine(
        config.endpoint.endpoint or "",
        config.model.model,
        config.decoding,
        stop=config.decoding.stop,
        logprobs=config.decoding.logprobs,
        json_schema=schema,
        concurrency=config.endpoint.concurrency,
        split_sequences=config.endpoint.split_sequences,
        server=config.endpoint.endpoint_server,
        report=report,
    )


# --- what a request looks like


def _as_sent(request: Request) -> str:
    if request.messages is not None:
        return "\n".join(f"{message['role']}: {message['content']}" for message in request.messages)
    return request.prompt or ""


def _as_seen(model: "Model", request: Request) -> str:
    tokenizer = model.tokenizer
    if request.messages is not None:
        return tokenizer.render(request.messages)
    if request.pair is not None:
        return "\n\n".join(request.pair)
    return str(tokenizer.backend.decode(tokenizer.encode(request.prompt or "", language=request.source_code)))
