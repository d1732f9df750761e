"""By what prompts and texts are judged: the lists and the classifier that the command line names.

Imports nothing heavy where nothing is judged, and no torch unless there is a classifier.
"""

from typing import TYPE_CHECKING, Any

from textgen_cli.config import GenerateConfig
from textgen_cli.errors import UsageError
from textgen_cli.events import Report, silent
from textgen_cli.text import flow

if TYPE_CHECKING:
    from textgen_cli.generate.guarded import Classifies
    from textgen_cli.text.safety import Rules

    Judges = tuple[Rules | None, Classifies | None]


def rules(config: GenerateConfig) -> "Rules | None":
    """The lists of --safety, each read again: they are short, and a wrong one is told before a model loads."""
    if not config.guarding.safety:
        return None
    from textgen_cli.text.safety import read_rules

    return read_rules(config.guarding.safety)


def check_draws(config: GenerateConfig, draws: bool) -> None:
    """UsageError where an unsafe text is to be drawn again by what would give the same again."""
    if config.guarding.on_unsafe == "retry" and not draws:
        raise UsageError("E-CONFLICT", "--on-unsafe retry", "would draw the same text without sampling")


def opened(config: GenerateConfig, report: Report) -> "Judges | None":
    """By what texts are judged, where they are; raises what `model.load` and `classifier` raise."""
    lists = rules(config)
    if not config.guarding.judges or config.prompting.show_prompt:
        return None
    if config.guarding.safety_model is None:
        return lists, None
    from textgen_cli.model.lean import load

    model = load(config.judge(), "score", report)
    from textgen_cli.generate.classified import classifier  # behind it, since it brings the library's code in

    return lists, classifier(model, config.guarding, report)


def guarded(
    config: GenerateConfig,
    judges: "Judges | None",
    engine: Any,
    report: Report,
    *,
    alone: bool,
    continues: bool = True,
    talks: bool = False,
) -> Any:
    """The engine, judged where anything judges; records of JSONL tell their verdicts themselves."""
    if judges is None:
        return engine
    from textgen_cli.generate.guarded import GuardedEngine
    from textgen_cli.text.safety import Rules

    lists, classifier = judges
    told = silent if flow.writes_jsonl(config.batch) else report
    action = config.guarding.on_unsafe
    return GuardedEngine(
        engine, lists or Rules(), action, told, classifier, continues=continues, alone=alone, talks=talks
    )
