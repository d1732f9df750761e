"""Models worth knowing, for `--catalog`: what each is good for and what it takes. Data only.

Each has its weights as safetensors and an architecture that textgen runs. Parameters are counted from the published
config.json; licence, languages and use are those of the model's card, whose address is `source`.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

Use = Literal["base", "instruct", "masked", "seq2seq", "translation", "classification", "tagging", "answers"]
USES: tuple[Use, ...] = get_args(Use)

# What a run loads in 16 bits; the others are judges and load in 32.
_GENERATING = ("base", "instruct", "seq2seq", "translation")
LIBRARIES = 500_000_000  # bytes of torch, transformers and what a run holds besides the weights
SPARE = 1.1  # a cache and activations, as a share of the weights


@dataclass(frozen=True)
class Known:
    """One model."""

    name: str  # as --model takes it
    use: Use
    parameters: int
    context: int | None  # tokens; None: no limit of its own
    licence: str  # SPDX, or the name of a licence of the publisher's own
    languages: tuple[str, ...]  # ISO 639-1; "many": more than ten
    good_for: str
    gated: bool = False  # the Hub asks for consent to the licence first

    @property
    def source(self) -> str:
        """The address of the model's card."""
        repo = "HuggingFaceTB/SmolLM2-135M-Instruct" if "/" not in self.name else self.name
        return f"https://huggingface.co/{repo}"

    @property
    def memory(self) -> int:
        """Bytes of its weights as the commands load them: in 16 bits to generate, in 32 to judge."""
        return self.parameters * (2 if self.use in _GENERATING else 4)

    def fits(self, free: int | None) -> bool | None:
        """Whether it runs in so many bytes of memory; None where these are not known."""
        return None if free is None else self.memory * SPARE + LIBRARIES <= free

    def fields(self, free: int | None) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "model": self.name,
            "use": self.use,
            "parameters": self.parameters,
            "memory": self.memory,
            "fits": self.fits(free),
            "context": self.context,
            "licence": self.licence,
            "languages": list(self.languages),
            "good_for": self.good_for,
            "gated": self.gated,
            "source": self.source,
        }


_EN = ("en",)
_MANY = ("many",)
_T5 = ("en", "fr", "de", "ro")

KNOWN: tuple[Known, ...] = (
    Known("smollm2-135m-instruct", "instruct", 134_515_008, 8192, "Apache-2.0", _EN,
          "the default: a first try, tests, machines with little memory"),
    Known("HuggingFaceTB/SmolLM2-360M-Instruct", "instruct", 361_821_120, 8192, "Apache-2.0", _EN,
          "short answers and rewriting on a laptop"),
    Known("Qwen/Qwen2.5-0.5B-Instruct", "instruct", 494_032_768, 32768, "Apache-2.0", _MANY,
          "the smallest that answers in many languages, JSON"),
    Known("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "instruct", 1_100_048_384, 2048, "Apache-2.0", _EN,
          "chat with the architecture and tokenizer of Llama 2"),
    Known("meta-llama/Llama-3.2-1B-Instruct", "instruct", 1_235_814_400, 131072, "llama3.2",
          ("en", "de", "fr", "it", "pt", "hi", "es", "th"), "summaries and rewriting of long texts", gated=True),
    Known("Qwen/Qwen2.5-1.5B-Instruct", "instruct", 1_543_714_304, 32768, "Apache-2.0", _MANY,
          "chat, extraction and JSON in many languages"),
    Known("HuggingFaceTB/SmolLM2-1.7B-Instruct", "instruct", 1_711_376_384, 8192, "Apache-2.0", _EN,
          "chat, summaries and rewriting"),
    Known("google/gemma-2-2b-it", "instruct", 2_614_341_888, 8192, "gemma", _EN,
          "good answers for its size", gated=True),
    Known("microsoft/Phi-3-mini-4k-instruct", "instruct", 3_821_079_552, 4096, "MIT", _EN,
          "reasoning, mathematics and code"),
    Known("mistralai/Mistral-7B-Instruct-v0.3", "instruct", 7_248_023_552, 32768, "Apache-2.0", _EN,
          "chat and tools on a GPU"),
    Known("Qwen/Qwen2.5-7B-Instruct", "instruct", 7_615_616_512, 32768, "Apache-2.0", _MANY,
          "chat, code, mathematics and long texts in many languages"),
    Known("meta-llama/Llama-3.1-8B-Instruct", "instruct", 8_030_261_248, 131072, "llama3.1",
          ("en", "de", "fr", "it", "pt", "hi", "es", "th"), "chat, tools and very long texts", gated=True),
    Known("openai-community/gpt2", "base", 124_439_808, 1024, "MIT", _EN,
          "comparison with the literature; the model of most tutorials"),
    Known("openai-community/gpt2-large", "base", 774_030_080, 1024, "MIT", _EN,
          "perplexity as the literature reports it"),
    Known("HuggingFaceTB/SmolLM2-135M", "base", 134_515_008, 8192, "Apache-2.0", _EN,
          "a base for finetuning on one CPU"),
    Known("HuggingFaceTB/SmolLM2-360M", "base", 361_821_120, 8192, "Apache-2.0", _EN,
          "a base for finetuning on one small GPU"),
    Known("EleutherAI/pythia-160m", "base", 162_322_944, 2048, "Apache-2.0", _EN,
          "research: training data and checkpoints of all steps are public"),
    Known("EleutherAI/pythia-1.4b", "base", 1_414_647_808, 2048, "Apache-2.0", _EN,
          "research: the same recipe at ten times the size"),
    Known("Qwen/Qwen2.5-0.5B", "base", 494_032_768, 32768, "Apache-2.0", _MANY,
          "a base for finetuning in languages besides English"),
    Known("mistralai/Mistral-7B-v0.1", "base", 7_241_732_096, 32768, "Apache-2.0", _EN,
          "a strong base for LoRA on a GPU"),
    Known("google-bert/bert-base-uncased", "masked", 109_514_298, 512, "Apache-2.0", _EN,
          "filling gaps; a base for classifiers"),
    Known("FacebookAI/roberta-base", "masked", 124_697_433, 512, "MIT", _EN,
          "pseudo-log-likelihood, minimal pairs; a better base for classifiers"),
    Known("distilbert/distilbert-base-uncased", "masked", 66_985_530, 512, "Apache-2.0", _EN,
          "a base for classifiers that must be fast"),
    Known("google-bert/bert-base-multilingual-cased", "masked", 177_974_523, 512, "Apache-2.0", _MANY,
          "gaps and classifiers in 104 languages"),
    Known("FacebookAI/xlm-roberta-base", "masked", 278_295_186, 512, "MIT", _MANY,
          "classifiers that carry over between 100 languages"),
    Known("google-t5/t5-small", "seq2seq", 60_506_624, 512, "Apache-2.0", _T5,
          "a base for text to text; English to German, French, Romanian by its prefixes"),
    Known("google/flan-t5-small", "seq2seq", 76_961_152, 512, "Apache-2.0", _EN,
          "simple instructions with little memory"),
    Known("google/flan-t5-base", "seq2seq", 247_577_856, 512, "Apache-2.0", _EN,
          "questions, summaries and simple instructions"),
    Known("facebook/bart-large-cnn", "seq2seq", 406_290_432, 1024, "MIT", _EN, "summaries of news"),
    Known("google-t5/t5-base", "translation", 222_903_552, 512, "Apache-2.0", _T5,
          "English to German, French and Romanian"),
    Known("google/madlad400-3b-mt", "translation", 2_940_372_992, None, "Apache-2.0", _MANY,
          "translation between more than 400 languages"),
    Known("distilbert/distilbert-base-uncased-finetuned-sst-2-english", "classification", 66_955_010, 512,
          "Apache-2.0", _EN, "is a sentence positive or negative"),
    Known("facebook/bart-large-mnli", "classification", 407_344_131, 1024, "MIT", _EN,
          "does a text entail a statement: labels without training"),
    Known("dslim/bert-base-NER", "tagging", 107_726_601, 512, "MIT", _EN,
          "persons, places, organisations and other names in a text"),
    Known("deepset/roberta-base-squad2", "answers", 124_056_578, 512, "CC-BY-4.0", _EN,
          "the span of a text that answers a question, or that there is none"),
    Known("distilbert/distilbert-base-cased-distilled-squad", "answers", 65_192_450, 512, "Apache-2.0", _EN,
          "spans that answer a question, twice as fast"),
)  # fmt: skip


def chosen(use: str | None) -> list[Known]:
    """The models for a use, or all; those for the same use by size."""
    found = [model for model in KNOWN if use is None or model.use == use]
    return sorted(found, key=lambda model: (USES.index(model.use), model.parameters))
