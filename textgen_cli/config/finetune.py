"""Settings of `textgen finetune`: which data, which way of training, and when to stop."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from textgen_cli.config.shared import ModelConfig, check_range, option_name
from textgen_cli.errors import UsageError

FinetuneTask = Literal[
    "clm", "mlm", "chat", "seq2seq", "text-classification", "token-classification", "question-answering"
]


@dataclass(frozen=True)
class DataConfig:
    """What is learnt from."""

    task: FinetuneTask | None = None  # None: told by the data's fields
    format: Literal["text", "lines", "jsonl", "csv", "tsv", "parquet", "conll", "squad"] | None = None
    text_field: str | None = None  # None: what the task looks for, such as text, prompt or source
    pair_field: str | None = None  # text-classification: a second text
    label_field: str | None = None  # text-classification: label; token-classification: tags; seq2seq: target
    source_prefix: str = ""  # seq2seq: what stands before every source, as T5 knows its tasks by
    valid: tuple[Path, ...] = ()  # held-out data; none: a share of the data
    valid_share: float = 0.05
    skip_bad: int = 0  # bad rows that may be left out
    max_length: int | None = None  # tokens of an example at most; None: the model's context, 1,024 at most
    truncate: bool = False  # cut what is longer instead of refusing it
    pack: bool = False  # several short examples in one row
    whole_words: bool = False  # mlm: hide whole words
    mlm_probability: float = 0.15
    check: bool = False  # read and tell of the data, train nothing

    def __post_init__(self) -> None:
        check_range(self, "valid_share", 0, 0.5)
        check_range(self, "skip_bad", 0, 1_000_000_000)
        check_range(self, "max_length", 2, 10_000_000)
        check_range(self, "mlm_probability", 0, 1, open_low=True)
        if self.task not in (None, "mlm"):
            for name in ("whole_words", "mlm_probability"):
                if getattr(self, name) != getattr(type(self), name):
                    raise UsageError("E-CONFLICT", option_name(name), "needs --task mlm")


@dataclass(frozen=True)
class WayConfig:
    """Which weights learn."""

    lora: int | None = None  # rank of a LoRA adapter; None: all weights learn
    lora_alpha: float | None = None  # None: twice the rank
    lora_dropout: float = 0.0
    lora_targets: str | None = None  # a,b,c: names of layers; None: all linear ones
    rslora: bool = False
    dora: bool = False
    merge: bool = False  # fold the adapter into the weights, and prove it
    freeze: int = 0  # layers from the input on that do not learn; the embeddings with them
    from_scratch: str | None = None  # a config.json or a preset: weights begin at random
    tokenizer: str | None = None  # from scratch: a model whose tokenizer is taken; None: one is trained
    vocab_size: int = 8192  # from scratch: of the trained tokenizer

    def __post_init__(self) -> None:
        check_range(self, "lora", 1, 4096)
        check_range(self, "lora_alpha", 0, 100_000, open_low=True)
        check_range(self, "lora_dropout", 0, 0.9)
        check_range(self, "freeze", 0, 10_000)
        check_range(self, "vocab_size", 300, 1_000_000)
        needs_lora = [n for n in ("lora_alpha", "lora_targets") if getattr(self, n) is not None]
        needs_lora += [n for n in ("lora_dropout", "rslora", "dora", "merge") if getattr(self, n)]
        if needs_lora and self.lora is None:
            raise UsageError("E-CONFLICT", option_name(needs_lora[0]), "needs --lora RANK")
        if self.lora is not None and (self.freeze or self.from_scratch):
            other = "--freeze" if self.freeze else "--from-scratch"
            raise UsageError("E-CONFLICT", other, "cannot be used with --lora")
        for name in ("tokenizer", "vocab_size"):
            if self.from_scratch is None and getattr(self, name) != getattr(type(self), name):
                raise UsageError("E-CONFLICT", option_name(name), "needs --from-scratch")
        if self.tokenizer is not None and self.vocab_size != type(self).vocab_size:
            raise UsageError("E-CONFLICT", "--vocab-size", "cannot be used with --tokenizer")


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast."""

    learning_rate: float | None = (
        None  # None: 2e-4 with LoRA, 5e-5 for encoders, 2e-5 else, 5e-4 from scratch
    )
    epochs: float = 3.0
    max_steps: int | None = None
    max_time: float | None = None  # seconds
    batch_size: str = "auto"  # examples of one step, or "auto"
    accumulate: int = 1  # steps whose gradients are added up
    order: Literal["length", "random"] | None = None  # of the rows; None: by length, from scratch at random
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.03  # share of the steps, or from 1 on their number
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    recompute: bool = False  # gradient checkpointing: less memory, more time
    eval_steps: int | None = None  # None: once an epoch
    save_steps: int | None = None  # None: as often as it is evaluated
    patience: int | None = None  # evaluations without a better one after which it stops
    keep: int = 2  # checkpoints besides the best
    seed: int = 0
    report_to: str = "none"  # passed through to the Trainer

    def __post_init__(self) -> None:
        check_range(self, "learning_rate", 0, 100, open_low=True)
        check_range(self, "epochs", 0, 1_000_000, open_low=True)
        check_range(self, "max_steps", 1, 1_000_000_000)
        check_range(self, "max_time", 0, open_low=True)
        check_range(self, "accumulate", 1, 1_000_000)
        check_range(self, "warmup", 0, 1_000_000)
        check_range(self, "weight_decay", 0, 100)
        check_range(self, "max_grad_norm", 0, 1_000_000)
        check_range(self, "eval_steps", 1, 1_000_000_000)
        check_range(self, "save_steps", 1, 1_000_000_000)
        check_range(self, "patience", 1, 1_000_000)
        check_range(self, "keep", 1, 1000)
        check_range(self, "seed", 0, 2**32 - 1)
        if self.batch_size != "auto" and not re.fullmatch(r"[1-9]\d{0,5}", self.batch_size):
            raise UsageError(
                "E-RANGE", "--batch-size", f"must be 'auto' or at least 1, not {self.batch_size!r}"
            )


@dataclass(frozen=True)
class FinetuneConfig:
    """`textgen finetune`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    way: WayConfig = field(default_factory=WayConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    output: Path | None = None  # the folder of the finished model
    resume: bool = False  # go on from the newest checkpoint
    resume_previous: bool = False  # where that is damaged, from the one before it
    restart: bool = False  # begin anew in a folder of ours
    verbose: bool = False  # tell what is chosen and done

    def __post_init__(self) -> None:
        if self.model.quantize is not None:
            self._check_quantized()
        if self.training.patience is not None and not (self.data.valid or self.data.valid_share):
            raise UsageError("E-CONFLICT", "--patience", "needs held-out examples", hint="give --valid FILE")

    def _check_quantized(self) -> None:
        """UsageError where nothing is there that could learn beside quantised weights."""
        if self.way.from_scratch is not None:
            raise UsageError("E-CONFLICT", "--quantize", "cannot be used with --from-scratch")
        if self.way.lora is None:
            fact = "needs --lora RANK: quantised weights do not learn themselves"
            raise UsageError("E-CONFLICT", "--quantize", fact)
        if self.way.dora:
            fact = "cannot be used with --quantize: it needs the lengths of weights that learn"
            raise UsageError("E-CONFLICT", "--dora", fact)
