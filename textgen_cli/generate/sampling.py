"""Which tokens may come next and how one is taken: decoding settings made whole.

Settings come from the user, then from the model's own generation_config.json (known fields within bounds only),
then from BUILT_IN. Knows nothing of text.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from textgen_cli.config import BUILT_IN, GENERATION_FIELDS, DecodingConfig, option_name
from textgen_cli.errors import InputError, UsageError
from textgen_cli.events import Notice, Report
from textgen_cli.generate import fields, wording
from textgen_cli.text.words import read_words

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from textgen_cli.generate.banned import Banned
    from textgen_cli.model.loaded import Model
    from textgen_cli.model.watermark import Marker

# Fields of a model's generation_config.json that are taken, each within bounds; that file is foreign.
_MODEL_NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_k": (0, 1_000_000),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "epsilon_cutoff": (0.0, 1.0),
    "eta_cutoff": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "length_penalty": (-100.0, 100.0),
    "no_repeat_ngram_size": (0, 1000),
    "encoder_no_repeat_ngram_size": (0, 1000),
    "num_beams": (1, 64),
    "min_length": (0, 100_000),
    "max_length": (1, 10_000_000),
    "max_new_tokens": (1, 10_000_000),
}
_MODEL_FLAGS = ("do_sample", "early_stopping")
_MODEL_TOKENS = ("bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
_MODEL_TOKEN_LISTS = ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")

_SAMPLERS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True)
class Plan:
    """Decoding settings with nothing left open."""

    settings: "GenerationConfig"  # what transformers' processors are built from
    sample: bool
    max_new_tokens: int | None
    max_length: int | None  # prompt and text together
    context: int | None  # the model's own limit
    eos: frozenset[int]
    pad: int
    bos: int | None = None  # begins a text of no prompt, where the user names it; else the tokenizer's own
    num_return_sequences: int = 1
    stops: tuple[str, ...] = ()  # strings that end the text and are not part of it
    logprobs: int | None = None  # alternatives reported for each token; 0: only the token's own
    banned: "Banned | None" = None  # words that are never written
    marker: "Marker | None" = None  # favours the tokens of a watermark

    @property
    def speculates(self) -> bool:
        """Whether guessed tokens are checked several at a time."""
        settings = self.settings
        return settings.prompt_lookup_num_tokens is not None or settings.assistant_early_exit is not None

    @property
    def reads_prompts(self) -> bool:
        """Whether a processor takes padding for a part of the prompt, so that only prompts of one length may meet."""
        settings = self.settings
        sizes = (settings.encoder_no_repeat_ngram_size, settings.no_repeat_ngram_size == 1)
        return any((*sizes, settings.encoder_repetition_penalty, settings.watermarking_config))

    @property
    def counts_padding(self) -> bool:
        """Whether a processor reads the ids themselves, so that padding amid a prompt would change its verdict."""
        settings = self.settings
        if self.banned is not None and self.banned.adds(self.pad):
            return True
        return any((settings.repetition_penalty, settings.no_repeat_ngram_size, settings.sequence_bias))

    def room(self, prompt_tokens: int) -> int:
        """How many tokens may follow a prompt; InputError E-CONTEXT when there is no room for one."""
        limits = []
        if self.context is not None:
            limits.append((self.context - prompt_tokens, f"the model takes {self.context:,}"))
        if self.max_new_tokens is not None:
            limits.append((self.max_new_tokens, ""))
        if self.max_length is not None:
            limits.append((self.max_length - prompt_tokens, f"--max-length is {self.max_length:,}"))
        room, why = min(limits)
        if room < 1:
            raise InputError("E-CONTEXT", "prompt", f"{prompt_tokens:,} tokens leave no room, {why}")
        return room

    def check_source(self, source_tokens: int) -> None:
        """InputError E-CONTEXT when an encoder's input is longer than the model takes."""
        if self.context is not None and source_tokens > self.context:
            raise InputError(
                "E-CONTEXT", "prompt", f"{source_tokens:,} tokens, the model takes {self.context:,}"
            )


def _library(**fields: Any) -> "GenerationConfig":
    """The settings as transformers' processors take them; it costs seconds to import."""
    from transformers import GenerationConfig

    return GenerationConfig(**fields)


def plan(
    decoding: DecodingConfig, model: "Model", report: Report, settings_of: Callable[..., Any] = _library
) -> Plan:
    """Settle every decoding setting for this model; UsageError when the library refuses a combination.

    `settings_of`: what becomes of the fields of GenerationConfig, for an engine that does without the library.
    """
    own = _model_settings(model, report)
    user = decoding.given() | _by_name(decoding, model) | _words(decoding, model)
    own_samples = own.get("do_sample") is True or any(name in own for name in _SAMPLERS)
    base = {} if own_samples else {k: BUILT_IN[k] for k in ("temperature", "top_p")}
    chosen = {**base, **own, **user}
    sample = _samples(decoding, user, own, model, chosen.get("num_beams", 1))
    _refuse_idle(decoding, user, chosen)
    _refuse_alone(decoding, user, chosen, model)
    lengths = _lengths(user, own)
    eos = _eos(chosen, model)
    if not eos:
        report(Notice(f"{model.name}: has no end-of-text token; text runs to the limit", name="W-NO-EOS"))
    pad = chosen.get("pad_token_id")
    pad = pad if isinstance(pad, int) and pad >= 0 else min(eos, default=0)
    taken = {k: v for k, v in chosen.items() if k not in ("max_new_tokens", "max_length", "do_sample")}
    if not sample:
        taken = {k: v for k, v in taken.items() if k not in _SAMPLERS}
    # 0 is "no top-k"; left open, the library would put 50 there.
    taken.update(do_sample=sample, eos_token_id=sorted(eos) or None, pad_token_id=pad)
    if sample:
        taken.setdefault("top_k", 0)
    try:
        settings = settings_of(**taken)
    except (ValueError, TypeError) as error:
        raise UsageError("E-DECODING", "decoding options", str(error).splitlines()[0]) from error
    return Plan(
        settings=settings,
        sample=sample,
        eos=frozenset(eos),
        pad=pad,
        bos=user.get("bos_token_id"),
        context=model.context,
        num_return_sequences=decoding.num_return_sequences,
        stops=decoding.stop,
        logprobs=decoding.logprobs,
        banned=_banned(decoding, model),
        marker=_marker(decoding, model),
        **lengths,
    )


def _banned(decoding: DecodingConfig, model: "Model") -> "Banned | None":
    """The words that are never written."""
    words = read_words(decoding.bad_words) if decoding.bad_words is not None else []
    if not words:
        return None
    from textgen_cli.generate.banned import Banned, token_texts

    rows = model.net.get_output_embeddings().weight.shape[0]
    return Banned(words, token_texts(model.tokenizer, rows))


def _by_name(decoding: DecodingConfig, model: "Model") -> dict[str, Any]:
    """What --set gives, within the bounds of the options of the same names."""
    if not decoding.set:
        return {}
    found = fields.assignments(decoding.set, model.net.get_output_embeddings().weight.shape[0])
    replace(decoding, set=(), **{k: v for k, v in found.items() if k in GENERATION_FIELDS})
    return found


def _refuse_idle(decoding: DecodingConfig, user: dict[str, Any], chosen: dict[str, Any]) -> None:
    """UsageError for settings that would have no effect together, or that the library refuses."""
    count, beams = decoding.num_return_sequences, chosen.get("num_beams") or 1
    guessing = ("prompt_lookup_num_tokens", "assistant_early_exit")
    guesses = bool(decoding.draft_model or any(chosen.get(name) for name in guessing))
    if count > 1 and (1 < beams < count or guesses):
        raise UsageError(
            "E-CONFLICT", "--num-return-sequences", "is more than the beams, or meets speculation"
        )
    if count > 1 and beams == 1 and user.get("temperature") == 0:
        raise UsageError("E-CONFLICT", "--temperature", "0 gives one sequence only")
    if beams > 1 and guesses:
        raise UsageError("E-CONFLICT", "speculation", "cannot be used with beams", hint="add --num-beams 1")
    if decoding.logprobs is not None and (beams > 1 or guesses):
        raise UsageError("E-CONFLICT", "--logprobs", "cannot be used with beams or speculation")
    if decoding.watermark is not None and (beams > 1 or guesses):
        raise UsageError("E-CONFLICT", "--watermark", "cannot be used with beams or speculation")


def _refuse_alone(
    decoding: DecodingConfig, user: dict[str, Any], chosen: dict[str, Any], model: "Model"
) -> None:
    """UsageError for the first field that has no effect without what is not there."""
    present = {
        "beams": (chosen.get("num_beams") or 1) > 1,
        "--prompt-lookup": bool(chosen.get("prompt_lookup_num_tokens")),
        "--draft-model": decoding.draft_model is not None,
        "an encoder-decoder model": model.family == "seq2seq",
        "a model without an encoder": model.family != "seq2seq",
    }
    for name, needed in fields.NEEDS.items():
        if user.get(name) is not None and not present[needed]:
            option = option_name(name) if name in GENERATION_FIELDS else f"--set {name}"
            hint = "add --num-beams N" if needed == "beams" else None
            raise UsageError("E-CONFLICT", option, f"needs {needed}", hint=hint)


def _marker(decoding: DecodingConfig, model: "Model") -> "Marker | None":
    """The watermark's part in the scores; its module is as heavy as the library."""
    if decoding.watermark is None:
        return None
    from textgen_cli.model.watermark import Marker, vocabulary_of

    vocabulary = vocabulary_of(model.net.config.to_dict(), model.name)
    return Marker(decoding.watermark, decoding.watermark_bias, vocabulary)


def _words(decoding: DecodingConfig, model: "Model") -> dict[str, Any]:
    """The settings that need the tokenizer or have another name in the library."""
    found: dict[str, Any] = {}
    if decoding.bias:
        found["sequence_bias"] = wording.sequence_bias(decoding.bias, model.tokenizer)
    if decoding.prompt_lookup is not None:
        found["prompt_lookup_num_tokens"] = decoding.prompt_lookup
    return {name: value for name, value in found.items() if value}


def _samples(
    decoding: DecodingConfig, user: dict[str, Any], own: dict[str, Any], model: "Model", num_beams: int
) -> bool:
    if decoding.greedy or {**own, **user}.get("temperature") == 0:
        return False
    if any(name in user for name in _SAMPLERS):
        return True
    if num_beams > 1:
        return bool(own.get("do_sample", False)) and "num_beams" not in user
    if decoding.num_return_sequences > 1:
        return True  # several greedy sequences would all be the same
    # Translating and summarising models are used greedily unless they say otherwise.
    return bool(own.get("do_sample", model.family == "causal"))


def _lengths(user: dict[str, Any], own: dict[str, Any]) -> dict[str, int | None]:
    names = ("max_new_tokens", "max_length")
    given = next((source for source in (user, own) if any(name in source for name in names)), BUILT_IN)
    return {name: given.get(name) for name in names}


def _eos(chosen: dict[str, Any], model: "Model") -> set[int]:
    found = chosen.get("eos_token_id", getattr(model.net.config, "eos_token_id", None))
    ids = found if isinstance(found, list) else [found]
    own = getattr(model.tokenizer.backend, "eos_token_id", None)
    return {i for i in [*ids, own] if isinstance(i, int) and i >= 0}


def _model_settings(model: "Model", report: Report) -> dict[str, Any]:
    taken: dict[str, Any] = {}
    for name, value in model.generation.items():
        # The library counts padding as text in these: only a decoder of its own has none.
        if name in ("min_length", "forced_bos_token_id") and model.family != "seq2seq":
            continue
        fits = _fits(name, value, model)
        if fits:
            taken[name] = value
        elif fits is False:
            report(
                Notice(
                    f"generation_config.json: {name} {value!r} is out of bounds and not used",
                    name="W-GENERATION-CONFIG",
                )
            )
    return taken


def _fits(name: str, value: Any, model: "Model") -> bool | None:
    """True: take it; False: a known field with an impossible value; None: not a field that is taken."""
    if value is None:
        return None
    rows = model.net.get_input_embeddings().weight.shape[0]
    if name in _MODEL_NUMBERS:
        low, high = _MODEL_NUMBERS[name]
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if name in _MODEL_FLAGS:
        return isinstance(value, bool)
    if name in _MODEL_TOKENS:
        return isinstance(value, int) and -1 <= value < rows
    if name in _MODEL_TOKEN_LISTS:
        ids = value if isinstance(value, list) else [value]
        return len(ids) < rows and all(isinstance(i, int) and 0 <= i < rows for i in ids)
    if name == "bad_words_ids":
        return isinstance(value, list) and all(isinstance(word, list) and word for word in value)
    return None
