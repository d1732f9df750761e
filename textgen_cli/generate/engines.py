"""Which engine answers, and what its answers depend on: the one place that chooses.

Everything that can be refused is refused before a model loads. Engines are imported where they are opened.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from textgen_cli.config import DecodingConfig, GenerateConfig, ModelConfig
from textgen_cli.errors import ModelError, UsageError
from textgen_cli.events import Notice, Report
from textgen_cli.generate import judging, prompts
from textgen_cli.generate.prompts import Prompter
from textgen_cli.generate.request import Engine, Request
from textgen_cli.text.presets import Reader, reader
from textgen_cli.text.words import read_words

if TYPE_CHECKING:
    from textgen_cli.generate.constrain import Constrainer
    from textgen_cli.generate.grammar import Constraint
    from textgen_cli.generate.local import LocalEngine
    from textgen_cli.generate.remote import RemoteEngine
    from textgen_cli.generate.sampling import Plan
    from textgen_cli.generate.talk import Talker
    from textgen_cli.model.load import Model

    Load = Callable[[ModelConfig], Model]


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
    judging.rules(config)


def open_engine(
    config: GenerateConfig, seed: int, report: Report, date: datetime | None = None, *, alone: bool = False
) -> Opened:
    """The engine that the command line asks for, ready to answer.

    `date`: what chat templates see as today; `alone`: there is one prompt, which a compiled model answers faster.

    Raises UsageError for options that cannot go together, and what `model.load` raises.
    """
    asked = prompts.asked_for(config.prompting)
    count = config.decoding.num_return_sequences
    if config.endpoint.endpoint is not None:
        known = Reader(
            "causal", instruct=prompts.wants_chat(config.prompting) or config.prompting.task is not None
        )
        prompter = Prompter(config.prompting, asked, known, seed, count)
        judges = judging.opened(config, report)
        engine = judging.guarded(config, judges, _remote(config, report), report, alone=alone)
        return Opened(engine, prompter, _as_sent)
    constraint = _constraint(config)
    judges = judging.opened(
        config, report
    )  # first: what is wrong with it is told before a greater model loads
    found = None
    compiles = config.engine == "compiled" or (config.engine == "auto" and alone)
    if compiles and config.explaining.explain is None:
        found = _compiled(config, constraint, report)
    engine, model = found or _eager(config, constraint, report)
    if date is not None:
        model.tokenizer.date = date
    _check_chat(config, model)
    _hint_chat(config, model, report)
    if config.explaining.explain is not None:
        engine = _explained(config, engine, model, report)
    engine = judging.guarded(config, judges, engine, report, alone=alone, continues=model.family == "causal")
    if asked is None and model.family == "seq2seq" and model.stamp is not None:
        asked = model.stamp.source_template  # what stood around every source in training
    prompter = Prompter(config.prompting, asked, _reader(config, model, report), seed, count)
    return Opened(engine, prompter, lambda request: _as_seen(model, request))


def _eager(config: GenerateConfig, constraint: "Constraint | None", report: Report) -> "tuple[Engine, Model]":
    from textgen_cli.model.lean import load

    model = load(config.model, "generate" if config.explaining.explain is None else "explain", report)
    return ENGINES[model.family](config, model, constraint, report), model


def _compiled(
    config: GenerateConfig, constraint: "Constraint | None", report: Report
) -> "tuple[Engine, Model] | None":
    """The engine on a compiled model, where there is one and the command line asks for nothing else."""
    from textgen_cli.generate import compiled

    model = compiled.open_if_fit(config, report)
    if model is None:
        return None
    engine = compiled.engine(config, model, report)
    if engine is None or constraint is None:
        return None if engine is None else (engine, model)
    return replace(engine, constrainer=_constrainer(constraint, model, engine.plan)), model


def _constrainer(constraint: "Constraint", model: "Model", plan: "Plan") -> "Constrainer":
    from textgen_cli.generate.constrain import Constrainer

    rows = model.net.get_output_embeddings().weight.shape[0]
    seq2seq = model.family == "seq2seq"
    return Constrainer(model.tokenizer.fast, rows, plan.eos, constraint, text_start=seq2seq)


def _explained(config: GenerateConfig, engine: Engine, model: "Model", report: Report) -> Engine:
    """The engine whose completions are explained."""
    from textgen_cli.explain.methods import Explainer
    from textgen_cli.generate.explained import CASES, ExplainedEngine
    from textgen_cli.generate.local import LocalEngine

    if model.family not in CASES:
        raise UsageError(
            "E-FAMILY", "--explain", f"cannot explain a {model.family} model such as {model.name}"
        )
    start = engine.plan.settings.decoder_start_token_id if isinstance(engine, LocalEngine) else None
    return ExplainedEngine(engine, Explainer(config.explaining, model, report), start)


def _reader(config: GenerateConfig, model: "Model", report: Report) -> Reader:
    """How this model is to be asked: in messages where it has a template and a chat or a task is meant."""
    chat = prompts.wants_chat(config.prompting) or config.prompting.task is not None
    translates, backend = config.prompting.task == "translate", model.tokenizer.backend
    found = reader(
        _FAMILY_OF.get(model.family, "causal"),
        instruct=model.tokenizer.has_template and chat,
        model_type=str(model.net.config.model_type),
        vocabulary=backend.get_vocab() if translates else {},
        pair=(getattr(backend, "source_lang", None), getattr(backend, "target_lang", None)),
    )
    if translates and not found.knows_target:
        fact = f"{model.name}: cannot be told the languages, it translates as it was trained"
        report(Notice(fact, name="W-LANGUAGE"))
    return found


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
    in_template = model.family == "causal" and model.tokenizer.has_template
    if prompts.wants_chat(config.prompting) or (config.prompting.task is not None and in_template):
        _refuse_cut(config)
    if wanted and model.family != "causal":
        raise UsageError("E-FAMILY", option, f"means nothing to a {model.family} model such as {model.name}")
    if wanted and not model.tokenizer.has_template:
        hint = f"drop {option} to continue the text as it is"
        raise ModelError("E-TEMPLATE", model.name, f"has no chat template, which {option} needs", hint=hint)


def _refuse_cut(config: GenerateConfig) -> None:
    if config.prompting.truncate:
        raise UsageError("E-CONFLICT", "--truncate", "would cut a conversation's control tokens")


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
    config: GenerateConfig,
    model: "Model",
    constraint: "Constraint | None",
    report: Report,
    load: "Load | None" = None,
) -> "LocalEngine":
    """The engine of models that write text: causal and encoder-decoder; `load` gets the model that guesses."""
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
    judging.check_draws(config, plan.sample)
    constrainer = None
    if constraint is not None:
        grammar_refused(plan.settings.num_beams)
        if plan.speculates:
            raise UsageError(
                "E-CONFLICT", "--set prompt_lookup_num_tokens", "cannot be used with a constraint"
            )
        constrainer = _constrainer(constraint, model, plan)
    draft = _draft(config, model, load or _loader(report))
    rows, cut = config.batch.rows, config.prompting.truncate
    return LocalEngine(model, plan, constrainer, draft, rows, cut, report)


def talker(config: GenerateConfig, report: Report) -> "Callable[[DecodingConfig], Talker]":
    """Opens an engine for each change of settings; models that are still wanted are not loaded again."""

    judges = judging.opened(config, report)

    def guarded(engine: Any) -> "Talker":
        talking: Talker = judging.guarded(config, judges, engine, report, alone=True, talks=True)
        return talking

    if config.endpoint.endpoint is not None:
        return lambda decoding: guarded(_remote_talker(replace(config, decoding=decoding), report))
    _refuse_cut(config)
    if config.engine == "compiled":
        raise UsageError("E-ENGINE", "--engine compiled", "does not hold a conversation")
    loaded: dict[ModelConfig, Model] = {}

    def reopen(decoding: DecodingConfig) -> "Talker":
        nonlocal loaded
        wanted: dict[ModelConfig, Model] = {}

        def once(which: ModelConfig) -> "Model":
            from textgen_cli.model.lean import load

            wanted[which] = loaded.get(which) or load(which, "generate", report)
            return wanted[which]

        model = once(config.model)
        engine = _talking(replace(config, decoding=decoding), model, report, once)
        loaded = wanted
        return guarded(engine)

    return reopen


def _talking(config: GenerateConfig, model: "Model", report: Report, load: "Load") -> "LocalEngine":
    """An engine that keeps what it has computed for the next turn."""
    from textgen_cli.generate.prefix import Kept

    if ENGINES[model.family] is not open_local:
        raise UsageError("E-FAMILY", model.name, "holds no conversation")
    return replace(open_local(config, model, _constraint(config), report, load), kept=Kept())


def _remote_talker(config: GenerateConfig, report: Report) -> "RemoteEngine":
    """An engine whose options this server is known to obey, since a person waits for the answer."""
    engine = _remote(config, report)
    engine.settle()
    return engine


def grammar_refused(num_beams: int | None) -> None:
    """UsageError where a model's own settings ask for beams and the user for a constraint."""
    if (num_beams or 1) > 1:
        raise UsageError(
            "E-CONFLICT",
            "constraint",
            "cannot be used with the beams of this model's settings",
            hint="add --num-beams 1",
        )


def _loader(report: Report) -> "Load":
    from textgen_cli.model.lean import load

    return lambda which: load(which, "generate", report)


def _draft(config: GenerateConfig, model: "Model", load: "Load") -> Any:
    """The network that guesses tokens; it must read the same ids."""
    if config.decoding.draft_model is None:
        return None
    guess = load(replace(config.model, model=config.decoding.draft_model, adapter=()))
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
    return ExtractEngine(model, config.prompting.top, config.batch.rows)


def _refuse_decoding(config: GenerateConfig, model: "Model") -> None:
    """A model that draws no tokens obeys no decoding option: say so rather than ignore one."""
    default = DecodingConfig()
    chosen = asdict(config.decoding) | {"seed": default.seed}
    given = [name for name, value in chosen.items() if value != getattr(default, name)]
    given += [name for name, value in asdict(config.constraint).items() if value]
    given += ["truncate"] if config.prompting.truncate else []
    judging.check_draws(config, draws=False)
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


def _remote(config: GenerateConfig, report: Report) -> "RemoteEngine":
    from textgen_cli.generate.remote import open_remote

    return open_remote(config, _constraint(config), report)


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
