"""Settings of `textgen generate`: what becomes of a prompt, how text is drawn, what form it must have.

None means "not given": the model's own generation config and then `BUILT_IN` decide.
"""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from textgen_cli.config.explain import ExplainConfig, check_gradients
from textgen_cli.config.shared import BatchConfig, ModelConfig, check_key, check_range, listed, option_name
from textgen_cli.errors import UsageError

Task = Literal["translate", "summarize", "qa", "chat", "story"]
Server = Literal["vllm", "sglang", "llamacpp"]

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
    watermark: str | None = None  # the key of a green-list watermark
    watermark_bias: float = 2.0  # added to the scores of its green tokens
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
        check_range(self, "watermark_bias", 0, 100, open_low=True)
        check_key(self.watermark)
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
class EndpointConfig:
    """A server that generates in this machine's place; its key comes from TEXTGEN_API_KEY alone."""

    endpoint: str | None = None  # address of an OpenAI-compatible API
    endpoint_server: Server | None = None  # None: what its model list says
    concurrency: int = 8  # calls at one time
    split_sequences: bool = False  # one call a sequence, for servers without `n`

    def __post_init__(self) -> None:
        check_range(self, "concurrency", 1, 1024)


@dataclass(frozen=True)
class SafetyConfig:
    """What must not be in prompts and texts, and what becomes of one in which it is."""

    safety: tuple[Path, ...] = ()  # lists of words, phrases and patterns
    safety_model: str | None = None  # a sequence classifier that judges too
    safety_labels: str | None = None  # a,b,c: the labels of it that are unsafe
    safety_threshold: float = 0.5  # from this probability of one of them on
    on_unsafe: Literal["flag", "redact", "drop", "retry"] = "flag"

    def __post_init__(self) -> None:
        check_range(self, "safety_threshold", 0, 1, open_low=True)
        if self.on_unsafe != "flag" and not self.judges:
            raise UsageError("E-CONFLICT", "--on-unsafe", "needs --safety FILE or --safety-model MODEL")
        if self.safety_model is None:
            for name in ("safety_labels", "safety_threshold"):
                if getattr(self, name) != getattr(SafetyConfig, name):
                    raise UsageError("E-CONFLICT", option_name(name), "needs --safety-model MODEL")
        elif not self.label_list():
            hint = "name the labels that are unsafe: --safety-labels toxic,insult"
            raise UsageError("E-CONFLICT", "--safety-model", "needs --safety-labels", hint=hint)

    @property
    def judges(self) -> bool:
        """Whether anything is judged."""
        return bool(self.safety) or self.safety_model is not None

    def label_list(self) -> tuple[str, ...]:
        """The labels of --safety-labels; none where it is not given."""
        return listed(self.safety_labels)


@dataclass(frozen=True)
class GenerateConfig:
    """`textgen generate`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    prompting: PromptConfig = field(default_factory=PromptConfig)
    constraint: ConstraintConfig = field(default_factory=ConstraintConfig)
    explaining: ExplainConfig = field(default_factory=ExplainConfig)
    guarding: SafetyConfig = field(default_factory=SafetyConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    html: Path | None = None  # the explanation as a page
    engine: Literal["auto", "eager", "compiled"] = "auto"  # which loop decodes; auto: compiled for one prompt
    no_stdin: bool = False  # leave standard input alone
    verbose: bool = False  # tell what is chosen and done

    def __post_init__(self) -> None:
        check_gradients(self.explaining, self.model)
        if self.html is not None and self.explaining.explain is None:
            raise UsageError("E-CONFLICT", "--html", "needs --explain")
        if self.explaining.explain is not None:
            self._check_explain()
        if self.guarding.judges:
            self._check_safety()

    def judge(self) -> ModelConfig:
        """The model of --safety-model: from where and on what the writing one is, but plain, and as exact as scores."""
        assert self.guarding.safety_model is not None
        return replace(self.model, model=self.guarding.safety_model, adapter=(), quantize=None, dtype="auto")

    def _check_safety(self) -> None:
        if self.prompting.top != 1:
            option = "--safety" if self.guarding.safety else "--safety-model"
            raise UsageError("E-CONFLICT", option, "cannot be used with --top, whose texts are many")
        if self.guarding.on_unsafe == "retry" and (self.decoding.greedy or self.decoding.temperature == 0):
            raise UsageError("E-CONFLICT", "--on-unsafe retry", "would draw the same text without sampling")

    def _check_explain(self) -> None:
        conflicts = {
            "--endpoint": self.endpoint.endpoint is not None,
            "--show-prompt": self.prompting.show_prompt,
            "--engine compiled": self.engine == "compiled",
        }
        for option, given in conflicts.items():
            if given:
                hint = "the weights of a server's model are not here" if option == "--endpoint" else None
                raise UsageError("E-CONFLICT", "--explain", f"cannot be used with {option}", hint=hint)
