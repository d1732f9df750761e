"""From a record to the requests of its sequences: raw prompt, messages, template or task.

Knows what the user asked for and how this model is to be asked; no engine and no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from textgen_cli.config import PromptConfig
from textgen_cli.errors import InputError, UsageError
from textgen_cli.generate.messages import check_messages
from textgen_cli.generate.request import Request, derive_seed
from textgen_cli.text.presets import PRESETS, Preset, Prompt, Reader, needed, prompt_for
from textgen_cli.text.records import Record
from textgen_cli.text.template import fill, read_template

# Options that fill a field, and the task that reads it.
READERS = {"from": "--task translate", "to": "--task translate", "question": "--task qa"}


def asked_for(config: PromptConfig, *, plain: bool = False) -> Preset | str | None:
    """The task, or the template's text; None where prompts go as they are. Checked before a model loads.

    `plain`: records have nothing but a `prompt`. Raises UsageError for a broken template, an option that
    nothing reads and a field that nothing gives.
    """
    asked = _asked_for(config)
    options = _options(config)
    reads = () if asked is None else needed(asked)
    for name, meant in READERS.items():
        if name in options and name not in reads:
            raise UsageError("E-CONFLICT", f"--{name}", f"needs {meant} or a template with {{{name}}}")
    if plain and isinstance(asked, Preset):
        for name, default in asked.fields.items():
            if default is None and name != asked.main and name not in options:
                raise UsageError("E-CONFLICT", f"--task {asked.name}", f"needs --{name}")
    elif plain and isinstance(asked, str):
        _check_plain(asked, options)
    return asked


def _check_plain(template: str, options: Mapping[str, str]) -> None:
    try:
        fill(template, {"text": "", "prompt": "", **options})
    except InputError as error:
        fact = f"field {{{error.subject}}} is given by nothing; a prompt is {{prompt}} or {{text}}"
        raise UsageError("E-TEMPLATE", "template", fact) from error


def _options(config: PromptConfig) -> dict[str, str]:
    """The fields that the command line gives to every record."""
    given = {"from": config.from_, "to": config.to, "question": config.question, "system": config.system}
    return {name: value for name, value in given.items() if value is not None}


def _asked_for(config: PromptConfig) -> Preset | str | None:
    given = [name for name in ("task", "template", "template_file") if getattr(config, name) is not None]
    if len(given) > 1:
        first, second = (f"--{name.replace('_', '-')}" for name in given[:2])
        raise UsageError("E-CONFLICT", second, f"cannot be used with {first}")
    if config.task is not None:
        return PRESETS[config.task]
    template = config.template
    if config.template_file is not None:
        template = read_template(config.template_file)
    if template is not None and not needed(template):
        raise UsageError("E-TEMPLATE", "template", "has no field for the prompt", hint="write {text}")
    return template


def wants_chat(config: PromptConfig) -> bool:
    """Whether prompts are a user's messages."""
    return config.chat or config.system is not None or config.task == "chat"


@dataclass(frozen=True)
class Prompter:
    """Asks one model what one command line wants."""

    config: PromptConfig
    asked: Preset | str | None
    reader: Reader
    seed: int
    num_return_sequences: int

    def __call__(self, record: Record) -> list[Request]:
        """The requests of a record, one a sequence; InputError where a field is missing or unusable."""
        prompt = self.prompt(record.fields)
        return [
            Request(
                index=record.index,
                sequence=sequence,
                prompt=prompt.text,
                messages=prompt.messages,
                pair=prompt.pair,
                seed=derive_seed(self.seed, record.index, sequence),
                stop=prompt.stop,
                trim=prompt.trim,
                source_code=prompt.source_code,
                target_code=prompt.target_code,
            )
            for sequence in range(self.num_return_sequences)
        ]

    def prompt(self, fields: Mapping[str, Any]) -> Prompt:
        """What the model will see of a record."""
        if "messages" in fields and (self.asked is None or self.config.task == "chat"):
            return Prompt(messages=self._with_system(check_messages(fields["messages"])))
        if self.asked is not None:
            return prompt_for(self.asked, self.reader, fields, _options(self.config))
        text = fields.get("prompt")
        if not isinstance(text, str):
            raise InputError("E-FIELD", "prompt", "is missing" if text is None else "is not a text")
        if not wants_chat(self.config):
            return Prompt(text=text)
        return Prompt(messages=self._with_system([{"role": "user", "content": text}]))

    def _with_system(self, messages: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
        """The messages under the system message of the command line, unless they bring their own."""
        if self.config.system is None or messages[0]["role"] == "system":
            return tuple(messages)
        return ({"role": "system", "content": self.config.system}, *messages)
