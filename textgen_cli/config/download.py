"""Settings of `textgen download`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from textgen_cli.config.shared import ModelConfig, check_range, option_name
from textgen_cli.errors import UsageError

# What a run may do instead of fetching a model; one of them.
MODES = ("list", "verify", "remove", "clean", "info", "for_", "catalog")

_FILES = ("include", "exclude", "all_files", "lock")
_OPTIONS = (*_FILES, "to", "compile", "convert", "quantize", "adapter", "dry_run")
_ALL = tuple(name for name in _OPTIONS if name != "dry_run")
# What goes with none of the things that a run may do.
EXCLUDED = {
    "list": _OPTIONS,
    "verify": _OPTIONS,
    "remove": _ALL,
    "clean": _ALL,
    "info": tuple(name for name in _OPTIONS if name != "include"),
    "for_": tuple(name for name in _OPTIONS if name not in ("include", "quantize")),
    "catalog": _OPTIONS,
    "compile": (*_FILES, "to", "convert", "adapter", "dry_run"),
    "convert": (*_FILES, "dry_run"),
    "quantize": (*_FILES, "dry_run"),
}


@dataclass(frozen=True)
class GettingConfig:
    """Which files come, and where they go."""

    include: tuple[str, ...] = ()  # patterns; these files alone
    exclude: tuple[str, ...] = ()
    all_files: bool = False  # all that runs no code, not only what loading needs
    to: Path | None = None  # a folder of the user's own; None: the cache
    lock: Path | None = None  # write which model it was, to the byte
    dry_run: bool = False  # tell what would be done, and do nothing

    @property
    def chooses(self) -> str | None:
        """The option that chooses among the files of a repository, if one does."""
        given = {"--include": self.include, "--exclude": self.exclude, "--all-files": self.all_files}
        return next((option for option, value in given.items() if value), None)


@dataclass(frozen=True)
class KeepingConfig:
    """What becomes of the models that are here."""

    list: bool = False
    verify: bool = False
    remove: bool = False
    clean: bool = False
    convert: bool = False  # a copy in another form, in the folder `to`
    compile: bool = False  # native code for this machine, in the cache


@dataclass(frozen=True)
class KnowingConfig:
    """What is asked about a model before it comes."""

    info: bool = False
    for_: Literal["generate", "score", "finetune"] | None = None  # what it takes to do this with it
    method: Literal["full", "lora", "qlora"] | None = None  # finetune: which weights learn; None: all
    batch: int | None = None  # rows computed together; None: what the command chooses on a CPU
    length: int | None = None  # tokens of a row; None: the context, 1,024 at most
    recompute: bool = False  # finetune: gradient checkpointing
    catalog: bool = False  # models worth knowing

    def __post_init__(self) -> None:
        check_range(self, "batch", 1, 1_000_000)
        check_range(self, "length", 1, 100_000_000)
        of_any = {"batch": self.batch, "length": self.length}
        of_training = {"method": self.method, "recompute": self.recompute}
        for name, value in {**of_any, **of_training}.items():
            if value and self.for_ is None:
                raise UsageError("E-CONFLICT", option_name(name), "needs --for")
            if value and name in of_training and self.for_ != "finetune":
                raise UsageError("E-CONFLICT", option_name(name), "needs --for finetune")


@dataclass(frozen=True)
class DownloadConfig:
    """`textgen download`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    getting: GettingConfig = field(default_factory=GettingConfig)
    keeping: KeepingConfig = field(default_factory=KeepingConfig)
    knowing: KnowingConfig = field(default_factory=KnowingConfig)
    json: bool = False  # one JSON object a line
    verbose: bool = False  # tell what is chosen and done

    def __post_init__(self) -> None:
        done = self._does()
        parts = (self.getting, self.keeping, self.model)
        given = {name for part in parts for name in _OPTIONS if getattr(part, name, None)}
        for name in (name for name in _OPTIONS if name in given and name != done):
            if name in EXCLUDED.get(done or "", ()):
                raise _conflict(name, str(done))
        copies = done in ("convert", "quantize")
        if "adapter" in given and not copies:
            raise UsageError("E-CONFLICT", "--adapter", "needs --convert or --quantize")
        if copies and self.getting.to is None:
            raise UsageError("E-CONFLICT", option_name(str(done)), "needs a folder", hint="add --to DIR")
        if self.model.locked is not None and "lock" in given:
            raise _conflict("lock", "locked")
        if self.model.locked is not None and self.getting.chooses:
            raise UsageError("E-CONFLICT", self.getting.chooses, "cannot be used with --locked")

    @property
    def modes(self) -> list[str]:
        """Those of MODES that are asked for; no config that was made has more than one."""
        parts = (self.keeping, self.knowing)
        return [name for name in MODES if any(getattr(part, name, None) for part in parts)]

    def _does(self) -> str | None:
        """What a run does, by the option that says it; None: it fetches a model."""
        modes = self.modes
        if len(modes) > 1:
            raise _conflict(modes[1], modes[0])
        others = [name for name in ("compile", "convert") if getattr(self.keeping, name)]
        return next(iter([*modes, *others, *(["quantize"] if self.model.quantize else [])]), None)


def _conflict(name: str, other: str) -> UsageError:
    return UsageError("E-CONFLICT", option_name(name), f"cannot be used with {option_name(other)}")
