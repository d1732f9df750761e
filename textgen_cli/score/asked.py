"""From a record to the question a model is asked about it: text, context, choices and the right answer.

Knows no model. Plain input has a text alone; records have fields, which options name.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from textgen_cli.config import ScoringConfig, option_name
from textgen_cli.errors import InputError, UsageError
from textgen_cli.score.pairs import pair_of
from textgen_cli.score.request import Asked
from textgen_cli.text.records import Record, text_field
from textgen_cli.text.template import fill, read_template, template_fields

FIELD = re.compile(r"[A-Za-z_][\w.-]*")


def is_field(context: str, *, plain: bool) -> bool:
    """Whether --context names a field: a single word where the input has fields."""
    return not plain and FIELD.fullmatch(context) is not None


class Questioner:
    """Turns records into questions as the command line has it; `plain`: records have nothing but a text."""

    def __init__(self, config: ScoringConfig, *, plain: bool, named: bool = True) -> None:
        """`named`: results tell the name of the text's field. UsageError for options that would do nothing."""
        self.config, self.plain = config, plain
        self.template = config.template
        if config.template_file is not None:
            self.template = read_template(config.template_file)
        if self.template is not None and not template_fields(self.template):
            raise UsageError("E-TEMPLATE", "template", "has no field", hint="write {text}")
        self.labels = config.label_list()
        if plain:
            _check_plain(config, template_fields(self.template or ""), named=named)
        self._check_context(named=named)

    def _check_context(self, *, named: bool) -> None:
        """UsageError for a context that leaves out what it should show, and for what means nothing beside one."""
        config, plain = self.config, self.plain
        chooses = self.labels or config.choices is not None
        if self.template is not None and not chooses and config.text_field in template_fields(self.template):
            fact = f"shows {{{config.text_field}}}, which is what is scored"
            raise UsageError(
                "E-TEMPLATE", "template", fact, hint="a template is the context, or asks for a choice"
            )
        if config.context is not None and not plain and re.search(r"\{\w+\}", config.context):
            raise UsageError("E-CONFLICT", "--context", "has fields in braces", hint="--template fills them")
        if self.labels and config.context is not None and not is_field(config.context, plain=plain):
            fact = "leaves out the text"
            raise UsageError(
                "E-CONFLICT", "--context", fact, hint="--template joins both, as in 'Review: {text}'"
            )
        joined = self.template is not None or config.context is not None
        if config.text_field != ScoringConfig.text_field and chooses and joined and named and not plain:
            fact = "is not read: choices stand behind the context"
            raise UsageError("E-CONFLICT", "--text-field", fact)
        if config.stride is not None and config.context and not is_field(config.context, plain=plain):
            fact = "cannot be used with --context: no text behind one slides"
            raise UsageError("E-CONFLICT", "--stride", fact)

    def __call__(self, record: Record) -> Asked:
        """The question of one record. InputError E-FIELD for a field that is missing or unusable."""
        config = self.config
        if config.pairs:
            return Asked(record.index, "", pair=pair_of(record.fields))
        choices = self._choices(record)
        context = self._context(record, choosing=choices is not None)
        text = "" if choices is not None else text_field(record, config.text_field)
        gold = None if config.gold is None else _field(record, config.gold)
        return Asked(record.index, text, context, choices, gold)

    def _context(self, record: Record, *, choosing: bool) -> str | None:
        config = self.config
        if self.template is not None:
            context: str | None = fill(self.template, record.fields)
        elif config.context is None:
            # What is chosen for is the text itself.
            context = text_field(record, config.text_field) if choosing else None
        elif is_field(config.context, plain=self.plain):
            context = text_field(record, config.context)
        else:
            context = config.context
        return context if context is None or choosing else context + (config.delimiter or "")

    def _choices(self, record: Record) -> tuple[str, ...] | None:
        if self.labels:
            return self.labels
        if self.config.choices is None:
            return None
        found = _field(record, self.config.choices)
        if isinstance(found, str):  # a cell of CSV
            with suppress(json.JSONDecodeError):
                found = json.loads(found)
        if not isinstance(found, list) or len(found) < 2 or not all(isinstance(c, str) and c for c in found):
            raise InputError("E-FIELD", self.config.choices, "is not a list of two texts at least")
        if len(set(found)) < len(found):
            raise InputError("E-FIELD", self.config.choices, "holds a text twice")
        return tuple(found)


def _check_plain(config: ScoringConfig, shown: Sequence[str], *, named: bool) -> None:
    """UsageError for a field that is named where texts have none; `shown`: those of the template."""
    hint = "give records with fields: --jsonl or --csv"
    if config.pairs and config.second is None:
        raise UsageError("E-CONFLICT", "--pairs", "needs records of two texts, or --second FILE", hint=hint)
    for name in ("gold", "choices"):
        if getattr(config, name) is not None:
            raise UsageError(
                "E-CONFLICT", option_name(name), "names a field, and plain text has none", hint=hint
            )
    if unknown := [name for name in shown if name != config.text_field]:
        fact = f"shows {{{unknown[0]}}}, and plain text has {{{config.text_field}}} alone"
        raise UsageError("E-TEMPLATE", "template", fact, hint=hint)
    if config.text_field != ScoringConfig.text_field and not (named or shown):
        fact = "names a field, and plain text has none"
        raise UsageError("E-CONFLICT", "--text-field", fact, hint=hint)


def _field(record: Record, name: str) -> Any:
    if name not in record.fields:
        raise InputError("E-FIELD", name, "is missing")
    return record.fields[name]
