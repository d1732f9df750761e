"""The loop on a compiled network: one sequence at a time, the same rows and steps, no library of models.

Owns which settings it obeys and the samplers it has of its own; all others are for the loop on transformers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from textgen_cli.config import DecodingConfig, GenerateConfig, option_name
from textgen_cli.errors import UsageError
from textgen_cli.events import Notice, Report
from textgen_cli.generate import judging, sampling
from textgen_cli.generate.local import LocalEngine
from textgen_cli.generate.lookup import Lookup
from textgen_cli.generate.rows import Row, Step, draw
from textgen_cli.generate.sampling import Plan
from textgen_cli.model import compiled

if TYPE_CHECKING:
    from textgen_cli.generate.constrain import Constrainer
    from textgen_cli.model.compiled import Network
    from textgen_cli.model.loaded import Model

# Decoding options that this loop obeys; any other that is given means the loop on transformers.
_OBEYED = {"max_new_tokens", "max_length", "temperature", "top_k", "top_p", "min_p", "greedy", "seed"}
_OBEYED |= {"num_return_sequences", "stop", "logprobs", "prompt_lookup"}
# Guesses that are checked together as long as not all are right: up to so many cost half a step more.
FEW = 3
# Fields of GenerationConfig that change nothing here, at any value or at these.
_IDLE = {
    "bos_token_id",
    "pad_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "length_penalty",
    "early_stopping",
}
_NEUTRAL = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
}
_TAKEN = {"do_sample", "temperature", "top_k", "top_p", "min_p", "prompt_lookup_num_tokens"}
_NEUTRAL |= {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


@dataclass(frozen=True)
class Settings:
    """What of GenerationConfig this loop obeys, by its names, and what is asked of any settings."""

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    prompt_lookup_num_tokens: int | None = None
    num_beams: None = None
    assistant_early_exit: None = None
    repetition_penalty: None = None
    no_repeat_ngram_size: None = None
    encoder_repetition_penalty: None = None
    encoder_no_repeat_ngram_size: None = None
    sequence_bias: None = None
    watermarking_config: None = None


def settings_of(**fields: Any) -> Settings:
    """Settings for this loop; ValueError names one that it does not obey."""
    plain = {name: value for name, value in fields.items() if name not in _IDLE and value is not None}
    for name, value in plain.items():
        if name not in _TAKEN and value != _NEUTRAL.get(name, plain):
            raise ValueError(f"the compiled engine does not obey {name}")
    return Settings(**{name: value for name, value in plain.items() if name in _TAKEN})


def unfit(config: GenerateConfig) -> str | None:
    """Why a command line is not for this engine, by the first option that is not; None where it fits."""
    default = DecodingConfig()
    for name in DecodingConfig.__dataclass_fields__:
        if name not in _OBEYED and getattr(config.decoding, name) != getattr(default, name):
            return option_name(name)
    if config.prompting.top != 1:
        return "--top"
    return "--adapter" if config.model.adapter else None


def open_if_fit(config: GenerateConfig, report: Report) -> "Model | None":
    """The compiled model that the command line asks for or may use; None: the engine on transformers answers.

    Raises UsageError E-ENGINE where --engine compiled cannot be obeyed, and what `find` and `open_model` raise.
    """
    why = unfit(config)
    folder: Path | None = None if why else compiled.find(config.model, report)
    if folder is not None:
        model = compiled.open_model(folder, config.model)
        report(Notice(f"{model.name}: compiled model on {model.placement}"))
        return model
    fact = f"does not obey {why}" if why else f"there is no compiled form of {config.model.model}"
    if config.engine == "compiled":
        hint = (
            "drop one of them"
            if why
            else "textgen download --compile makes one, with the same --dtype and --quantize"
        )
        raise UsageError("E-ENGINE", "--engine compiled", fact, hint=hint)
    report(Notice(f"eager engine: the compiled one {fact}" if why else f"eager engine: {fact}"))
    return None


def engine(config: GenerateConfig, model: "Model", report: Report) -> LocalEngine | None:
    """The engine on a compiled model; None where the model's own settings ask for more than this loop has."""
    try:
        plan = sampling.plan(config.decoding, model, report, settings_of)
    except UsageError as error:
        if error.name != "E-DECODING" or config.engine == "compiled":
            raise
        report(Notice(f"eager engine: {error.fact}"))
        return None
    judging.check_draws(config, plan.sample)
    cut = config.prompting.truncate
    return LocalEngine(model, plan, batch_rows=1, truncate=cut, report=report, steps=steps)


@torch.inference_mode()
def steps(
    net: "Network", rows: list[Row], plan: Plan, constrainer: "Constrainer | None" = None, kept: Any = None
) -> Iterator[Step]:
    """Decode one row step by step until it is done.

    Guesses are checked together: what is drawn behind each is what would have been drawn without it, and the first
    that is another token ends them (prompt lookup; speculative decoding, Leviathan et al., arXiv:2211.17192).
    """
    (row,) = rows
    lookup, settings = Lookup(), cast("Settings", plan.settings)
    most = settings.prompt_lookup_num_tokens or 0
    count = min(most, FEW)
    while not row.done:
        ids, before = [*row.prompt, *row.tokens], len(row.tokens)
        guess = lookup.guess(ids, min(count, row.room - before - 1)) if most else []
        yield from _behind(net, ids, guess, row, plan, constrainer)
        if guess:
            right = len(row.tokens) - before > len(guess)
            count = min(most, 2 * count + 1 if right else FEW)


def _behind(
    net: "Network", ids: list[int], guess: list[int], row: Row, plan: Plan, constrainer: "Constrainer | None"
) -> Iterator[Step]:
    """A step behind `ids`, and behind each guessed token as long as the guess is what was drawn."""
    for logits, expected in zip(net.logits(ids, guess).unbind(), [*guess, None], strict=True):
        token = _next(logits, row, plan, constrainer)
        yield Step([row], [token], [bool(logits.amax().isfinite())], logits[None])
        if row.done or token != expected:
            return


def _next(logits: torch.Tensor, row: Row, plan: Plan, constrainer: "Constrainer | None") -> int:
    scores = logits.clone()[None]  # (1, V)
    if constrainer is not None and row.state is not None:
        constrainer.apply([row.state], scores)
    if plan.sample:
        return int(draw(_sampled(scores[0], plan.settings)[None], [row.stream]))
    return int(scores.argmax())


def _sampled(scores: torch.Tensor, settings: Any) -> torch.Tensor:
    """Scores (V,) after temperature, top-k, top-p and min-p, in transformers' order; what is cut is -inf."""
    if settings.temperature is not None:
        scores = scores / settings.temperature
    if settings.top_k:
        least = scores.topk(min(settings.top_k, scores.shape[0])).values[-1]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if settings.top_p is not None and settings.top_p < 1:
        scores = scores.masked_fill(~_nucleus(scores, settings.top_p), -torch.inf)
    if settings.min_p:
        chances = scores.softmax(dim=-1)
        scores = scores.masked_fill(chances < settings.min_p * chances.amax(), -torch.inf)
    return scores


def _nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Which of (V,) are the fewest whose chances together reach `top_p`; a full sort is the last resort."""
    chances = scores.softmax(dim=-1)
    size = 64
    while True:
        size = min(size, scores.shape[0])
        best, places = chances.topk(size)
        before = best.cumsum(dim=-1) - best  # what more likely ones come to
        if size == scores.shape[0] or float(before[-1] + best[-1]) >= top_p:
            kept = torch.zeros_like(scores, dtype=torch.bool)
            kept[places[before < top_p]] = True
            return kept
        size *= 8
