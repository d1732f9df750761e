"""Settings that several commands share: which model, which records; and how a value's range is checked."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from textgen_cli.errors import UsageError

DEFAULT_MODEL = "smollm2-135m-instruct"

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def option_name(field_name: str) -> str:
    """`max_new_tokens` -> `--max-new-tokens`."""
    return "--" + field_name.rstrip("_").replace("_", "-")


def check_range(
    config: object,
    name: str,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
) -> None:
    """Raise UsageError unless the field is None or a finite number in [low, high] (or (low, high])."""
    value = getattr(config, name)
    if value is None:
        return
    above = value > low if open_low else value >= low
    if not (math.isfinite(value) and above and value <= high):
        sign = ">" if open_low else ">="
        bounds = f"{sign} {low:g}" if high == math.inf else f"{sign} {low:g} and <= {high:g}"
        raise UsageError("E-RANGE", option_name(name), f"must be {bounds}, not {value}")


def listed(text: str | None) -> tuple[str, ...]:
    """`a,b, a` -> a and b; nothing for None."""
    return tuple(dict.fromkeys(filter(None, (part.strip() for part in (text or "").split(",")))))


def check_key(key: str | None) -> None:
    """UsageError E-RANGE for the key of a watermark that anybody would guess."""
    if key == "":
        raise UsageError("E-RANGE", "--watermark", "is empty")


def split_weight(adapter: str) -> tuple[str, float]:
    """`./folder=0.5` -> the folder and 0.5; weight 1 where none is given. UsageError E-RANGE if wild."""
    name, equals, text = adapter.rpartition("=")
    try:
        weight = float(text) if equals else 1.0
    except ValueError:
        return adapter, 1.0  # a folder whose name holds the sign
    if not abs(weight) <= 1000:
        raise UsageError("E-RANGE", "--adapter", f"weight must be from -1000 to 1000, not {text}")
    return (name if equals else adapter), weight


@dataclass(frozen=True)
class ModelConfig:
    """Which model, from where, and what it runs on."""

    model: str = DEFAULT_MODEL  # catalogue name, hub name, folder or GGUF file
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    dtype: Dtype = "auto"
    threads: int | None = None  # CPU threads; None: what torch chooses
    adapter: tuple[str, ...] = ()  # LoRA adapters, folder or hub name, each with =WEIGHT or with weight 1
    quantize: Literal["int8", "int4"] | None = None  # weights in fewer bits, made while loading
    offline: bool = False  # open no connection at all
    mirror: str | None = None  # address of a mirror of the Hub; None: HF_ENDPOINT, else the Hub
    locked: Path | None = None  # a file of `download --lock`: the models in it, to the byte, and no others
    cache_dir: Path | None = None  # converted models; None: the platform's cache folder

    def __post_init__(self) -> None:
        check_range(self, "threads", 1, 1024)
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", self.device):
            raise UsageError(
                "E-DEVICE",
                "--device",
                f"unknown device {self.device!r}",
                hint="one of auto, cpu, cuda, cuda:N, mps",
            )
        if not self.model:
            raise UsageError("E-MODEL-NAME", "--model", "is empty")
        if self.mirror is not None and not re.match(r"https?://[^/?#]", self.mirror):
            raise UsageError("E-ENDPOINT", "--mirror", "is not an http or https address")
        for adapter in self.adapter:
            split_weight(adapter)


@dataclass(frozen=True)
class BatchConfig:
    """Many records: where they come from, where results go, and when to give up."""

    input: Path | None = None  # "-": standard input
    output: Path | None = None
    lines: bool = False  # one prompt a line
    jsonl: bool = False  # JSONL out, and in where no other form is named
    csv: bool = False  # CSV in
    resume: bool = False
    restart: bool = False
    strict: bool = False  # stop at the first record that cannot be read
    unique_ids: bool = False  # refuse an input in which an id comes twice
    max_failures: str | None = None  # N or P%
    max_time: float | None = None  # seconds
    shard: str | None = None  # I/N
    batch_size: str = "auto"  # sequences computed together at most, or "auto"; a token budget holds besides

    def __post_init__(self) -> None:
        check_range(self, "max_time", 0, open_low=True)
        if self.batch_size != "auto" and not re.fullmatch(r"[1-9]\d{0,5}", self.batch_size):
            raise UsageError(
                "E-RANGE", "--batch-size", f"must be 'auto' or at least 1, not {self.batch_size!r}"
            )
        if self.output == Path("-"):
            raise UsageError("E-RANGE", "-o -", "is no file", hint="results go to stdout without -o")
        if self.lines and self.csv:
            raise UsageError("E-CONFLICT", "--csv", "cannot be used with --lines")
        if self.resume and self.restart:
            raise UsageError("E-CONFLICT", "--restart", "cannot be used with --resume")
        if (self.resume or self.restart) and self.output is None:
            raise UsageError("E-CONFLICT", "--resume" if self.resume else "--restart", "needs -o")
        self.sharding()

    @property
    def rows(self) -> int | None:
        """Sequences computed together at most; None: what the engine holds for best."""
        return None if self.batch_size == "auto" else int(self.batch_size)

    def sharding(self) -> tuple[int, int]:
        """(I, N): this run takes every N-th record from the I-th on."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", self.shard or "1/1")
        number, of = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= number <= of:
            raise UsageError("E-RANGE", "--shard", f"must be I/N with I from 1 to N, not {self.shard!r}")
        return number, of
