"""Which family of networks a config.json belongs to, by its architecture's name. Imports no library of models."""

from collections.abc import Mapping
from typing import Any, Literal

from textgen_cli.errors import ModelError

Family = Literal[
    "causal", "seq2seq", "masked", "sequence-classification", "token-classification", "question-answering"
]

# The transformers class of each family, and the endings of config.architectures[0] that mean it.
FAMILIES: dict[Family, tuple[str, tuple[str, ...]]] = {
    "masked": ("AutoModelForMaskedLM", ("ForMaskedLM", "ForPreTraining", "WithLMHeadModel")),
    "causal": ("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel")),
    "sequence-classification": ("AutoModelForSequenceClassification", ("ForSequenceClassification",)),
    "token-classification": ("AutoModelForTokenClassification", ("ForTokenClassification",)),
    "question-answering": ("AutoModelForQuestionAnswering", ("ForQuestionAnswering",)),
    "seq2seq": ("AutoModelForSeq2SeqLM", ("ForConditionalGeneration", "MTModel")),
}


def family_of(config: Mapping[str, Any], name: str) -> Family:
    """Which family a config.json belongs to; ModelError E-ARCH when it is none that textgen runs."""
    architecture = next(iter(config.get("architectures") or []), "")
    if config.get("is_encoder_decoder") and architecture.endswith(FAMILIES["seq2seq"][1]):
        return "seq2seq"
    for family, (_, endings) in FAMILIES.items():
        if architecture.endswith(endings):
            return "causal" if family == "seq2seq" else family
    raise ModelError("E-ARCH", name, f"architecture {architecture or 'unnamed'} is not one that textgen runs")
