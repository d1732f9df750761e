"""Settings: frozen dataclasses, one a command plus the shared ones. Each default stands here once.

A field is an option: `max_new_tokens` is `--max-new-tokens` and TEXTGEN_MAX_NEW_TOKENS; its flags and
help text stand in `cli/options.py`. None means "not given": the model's own generation config and then
`BUILT_IN` decide. Values are checked on creation; a bad one is a UsageError that names the option.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from textgen_cli.errors import UsageError

DEFAULT_MODEL = "smollm2-135m-instruct"

Task = Literal["translate", "summarize", "qa", "chat", "story"]
Server = Literal["vllm", "sglang", "llamacpp"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# Decoding settings where neither the user nor the model says anything.
BUILT_IN: dict[str, Any] = {"max_new_tokens": 256, "temperature": 0.8, "top_p": 0.95}

# The options that are fields of transformers' GenerationConfig under the same name.
GENERATION_FIELDS = (
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "num_beams",
    "length_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
)

SEED_LIMIT = 2**63


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
        for adapter in self.adapter:
            split_weight(adapter)


@dataclass(frozen=True)
class DecodingConfig:
    """How text is drawn from a model; the names are those of transformers' GenerationConfig."""

    max_new_tokens: int | None = None  # tokens to generate at most
    max_length: int | None = None  # tokens of prompt and text together at most
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    min_new_tokens: int | None = None  # no end before this many tokens
    num_beams: int | None = None
    length_penalty: float | None = None  # beams: above 0 favours longer texts
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    num_return_sequences: int = 1
    greedy: bool = False
    seed: str = "0"  # a number, or "random"
    stop: tuple[str, ...] = ()  # strings that end the text and are cut off
    bad_words: Path | None = None  # words and phrases never generated, one a line
    bias: tuple[str, ...] = ()  # TEXT=X: added to the score of TEXT's last token
    logprobs: int | None = None  # alternatives reported for each token
    prompt_lookup: int | None = None  # tokens guessed from the prompt and checked at once
    draft_model: str | None = None  # a smaller model that guesses tokens
    set: tuple[str, ...] = ()  # KEY=VALUE: any other field of GenerationConfig

    def __post_init__(self) -> None:
        check_range(self, "max_new_tokens", 1, 10_000_000)
        check_range(self, "max_length", 1, 10_000_000)
        check_range(self, "temperature", 0, 100)
        check_range(self, "top_k", 0, 10_000_000)
        check_range(self, "top_p", 0, 1, open_low=True)
        check_range(self, "min_p", 0, 1)
        check_range(self, "typical_p", 0, 1, open_low=True)
        check_range(self, "min_new_tokens", 0, 10_000_000)
        check_range(self, "num_beams", 1, 1024)
        check_range(self, "length_penalty", -100, 100)
        check_range(self, "logprobs", 0, 1000)
        check_range(self, "prompt_lookup", 1, 1000)
        check_range(self, "repetition_penalty", 0, 100, open_low=True)
        check_range(self, "no_repeat_ngram_size", 0, 10_000)
        check_range(self, "num_return_sequences", 1, 100_000)
        self._check_seed()
        if (self.min_new_tokens or 0) > (self.max_new_tokens or math.inf):
            raise UsageError("E-CONFLICT", "--min-new-tokens", "is more than --max-new-tokens")
        if "" in self.stop:
            raise UsageError("E-RANGE", "--stop", "is empty")
        guesses = [name for name in ("draft_model", "prompt_lookup") if getattr(self, name) is not None]
        if len(guesses) > 1 or (guesses and (self.num_beams or 1) > 1):
            other = "--num-beams" if len(guesses) == 1 else "--prompt-lookup"
            raise UsageError("E-CONFLICT", option_name(guesses[0]), f"cannot be used with {other}")
        if self.greedy and self.num_return_sequences > 1:
            raise UsageError(
                "E-CONFLICT",
                "--greedy",
                "gives one sequence only",
                hint="drop --greedy or --num-return-sequences",
            )

    def _check_seed(self) -> None:
        if self.seed == "random":
            return
        if not re.fullmatch(r"\d{1,19}", self.seed) or int(self.seed) >= SEED_LIMIT:
            raise UsageError(
                "E-RANGE", "--seed", f"must be 'random' or a number from 0 to 2^63-1, not {self.seed!r}"
            )

    def given(self) -> dict[str, Any]:
        """The decoding fields the user set, by name."""
        pairs = ((name, getattr(self, name)) for name in GENERATION_FIELDS)
        return {name: value for name, value in pairs if value is not None}


@dataclass(frozen=True)
class PromptConfig:
    """What becomes of a prompt or record before a model sees it."""

    chat: bool = False  # treat the prompt as a user's message and apply the chat template
    system: str | None = None  # system message; implies chat
    task: Task | None = None
    from_: str | None = None  # translate: the language of the text
    to: str | None = None  # translate: the language wanted
    question: str | None = None  # qa
    template: str | None = None  # with {named} fields
    template_file: Path | None = None
    show_prompt: bool = False  # print what the model would see, and stop
    top: int = 1  # fillings or answers shown for each gap or question
    truncate: Literal["left", "right"] | None = None  # where a prompt that is too long is cut

    def __post_init__(self) -> None:
        check_range(self, "top", 1, 1000)


@dataclass(frozen=True)
class ConstraintConfig:
    """What the text must match; one of them at most."""

    json_schema: str | None = None  # a file, or JSON that begins with a brace
    json: bool = False  # any JSON
    regex: str | None = None
    choices: str | None = None  # a,b,c
    grammar: str | None = None  # a file


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


@dataclass(frozen=True)
class EndpointConfig:
    """A server that generates in this machine's place; its key comes from TEXTGEN_API_KEY alone."""

    endpoint: str | None = None  # address of an OpenAI-compatible API
    endpoint_server: Server | None = None  # None: what its model list says
    concurrency: int = 8  # calls at one time
    split_sequences: bool = False  # one call a sequence, for servers without `n`

    def __post_init__(self) -> None:
        check_range(self, "concurrency", 1, 1024)


@dataclass(frozen=True)
class GenerateConfig:
    """`textgen generate`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    prompting: PromptConfig = field(default_factory=PromptConfig)
    constraint: ConstraintConfig = field(default_factory=ConstraintConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    no_stdin: bool = False  # leave standard input alone
    verbose: bool = False  # tell what is chosen and done


@dataclass(frozen=True)
class DownloadConfig:
    """`textgen download`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    verbose: bool = False  # tell what is chosen and done
