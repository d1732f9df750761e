"""Every field of transformers' GenerationConfig: an option, obeyed by --set, or refused with a reason.

What a field does is compared with the library's own generate; no record may feel its neighbours through one.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from textgen_cli.config import GENERATION_FIELDS, DecodingConfig, ModelConfig
from textgen_cli.errors import UsageError
from textgen_cli.events import silent
from textgen_cli.generate import fields, sampling
from textgen_cli.generate.local import LocalEngine
from textgen_cli.generate.request import Completion, Request
from textgen_cli.model.load import Model, load

PROMPTS = ["Once upon a time", "a", "The quick brown fox jumps over the lazy dog, and the"]
LENGTH = 10


def loaded(folder: Path) -> Model:
    return load(ModelConfig(model=str(folder), dtype="float32", device="cpu"), "generate", silent)


@pytest.fixture(scope="module")
def causal(small_model: Any) -> Model:
    return loaded(small_model("llama"))


@pytest.fixture(scope="module")
def seq2seq(small_model: Any) -> Model:
    return loaded(small_model("t5"))


def planned(model: Model, *pairs: str, **decoding: Any) -> sampling.Plan:
    pairs = (*decoding.pop("set", ()), *pairs)
    return sampling.plan(DecodingConfig(max_new_tokens=LENGTH, set=pairs, **decoding), model, silent)


def ours(model: Model, plan: sampling.Plan, *prompts: str, draft: Any = None) -> list[list[int]]:
    """The new tokens of each prompt, all asked for together."""
    requests = [Request(number, 0, prompt, None, number) for number, prompt in enumerate(prompts)]
    finals: dict[int, Completion] = {}
    for chunk in LocalEngine(model, plan, draft=draft).stream(requests):
        if chunk.final:
            assert chunk.final.error is None, chunk.final.error
            finals[chunk.index] = chunk.final
    return [list(finals[number].tokens[1]) for number in range(len(prompts))]  # type: ignore[index]


def theirs(model: Model, prompt: str, **settings: Any) -> list[int]:
    """What the library gives for a prompt alone."""
    ids = torch.tensor([model.tokenizer.encode(prompt)])
    given = {"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": 0, "eos_token_id": 0}
    given |= {"decoder_start_token_id": 1} if model.family == "seq2seq" else {}
    given |= settings
    out = model.net.generate(ids, attention_mask=torch.ones_like(ids), **given)[0]
    return list(out[1 if model.family == "seq2seq" else ids.shape[1] :].tolist())


def test_every_field_has_its_place() -> None:
    known = {name for name in transformers.GenerationConfig().__dict__ if not name.startswith("_")}
    assert known | {"custom_generate", "trust_remote_code"} == set(fields.CHECKS) | set(fields.REFUSED)
    assert not set(fields.CHECKS) & set(fields.REFUSED)
    assert set(GENERATION_FIELDS) | set(fields.NEEDS) <= set(fields.CHECKS)
    assert set(fields.CHECKS) == set(GENERATION_FIELDS) | set(EFFECTS) | set(NEARLY_GREEDY) | set(GUESSES) | {
        "pad_token_id", "bos_token_id",
    }  # fmt: skip


@pytest.mark.parametrize("name", fields.REFUSED)
def test_what_is_refused_says_why(causal: Model, name: str) -> None:
    for spelled in (name, name.replace("_", "-")):
        with pytest.raises(UsageError, match=re.escape(fields.REFUSED[name])) as caught:
            planned(causal, f"{spelled}=1")
        assert caught.value.name == "E-SET"


WRONG = ["abc", "{'a': 1}", "[[99999]]", "[[]]", "()", "-5", "1e999", "99999999999", "[1, 2, 3]", '"x"', "1j"]


@pytest.mark.parametrize("name", sorted(fields.CHECKS))
def test_a_value_that_cannot_be_is_a_usage_error(causal: Model, seq2seq: Model, name: str) -> None:
    """Never a failure inside the library, and never silence."""
    own = seq2seq if fields.NEEDS.get(name) == "an encoder-decoder model" else causal
    beside = {"beams": {"num_beams": 2}, "--prompt-lookup": {"prompt_lookup": 2}}.get(
        fields.NEEDS.get(name, ""), {}
    )
    refused = 0
    for value in WRONG:
        try:
            plan = planned(own, f"{name}={value}", **beside)
        except UsageError as error:
            refused += error.name in ("E-SET", "E-RANGE", "E-DECODING")
        else:
            ours(own, plan, "Once")
    assert refused >= 7


@pytest.mark.parametrize("name", GENERATION_FIELDS)
def test_an_option_and_set_are_the_same(causal: Model, name: str) -> None:
    value = 1 if "float" not in str(DecodingConfig.__dataclass_fields__[name].type) else 0.5
    value = 2 if name in ("num_beams", "max_length") else value
    beside = {"num_beams": 2} if name == "length_penalty" else {}
    option = sampling.plan(DecodingConfig(**{name: value}, **beside), causal, silent)  # type: ignore[arg-type]
    by_set = sampling.plan(DecodingConfig(set=(f"{name}={value}",), **beside), causal, silent)  # type: ignore[arg-type]
    assert vars(option) == vars(by_set)
    assert value in (getattr(option, name, None), getattr(option.settings, name, None))


# Field -> family, value (token ids by their place in the plain answer), what stands beside it.
EFFECTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bad_words_ids": ("causal", "[[{0}]]", {}),
    "sequence_bias": ("causal", "[[[{0}], -50]]", {}),
    "suppress_tokens": ("causal", "[{0}, {1}]", {}),
    "begin_suppress_tokens": ("causal", "[{0}]", {}),
    "forced_eos_token_id": ("causal", "0", {}),
    "exponential_decay_length_penalty": ("causal", "(1, 9)", {}),
    "encoder_repetition_penalty": ("causal", "4", {}),
    "encoder_no_repeat_ngram_size": ("causal", "1", {}),
    "guidance_scale": ("causal", "3", {}),
    "watermarking_config": (
        "causal",
        "{{'bias': 20.0, 'context_width': 2, 'seeding_scheme': 'lefthash'}}",
        {},
    ),
    "eos_token_id": ("causal", "[0, {2}]", {}),
    "decoder_start_token_id": ("seq2seq", "9", {}),
    "forced_bos_token_id": ("seq2seq", "9", {}),
    "early_stopping": ("causal", "never", {"num_beams": 3}),
    "renormalize_logits": ("causal", "true", {"num_beams": 3, "repetition_penalty": 3.0}),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_a_field_does_what_it_does_in_the_library(causal: Model, seq2seq: Model, name: str) -> None:
    family, text, beside = EFFECTS[name]
    model = causal if family == "causal" else seq2seq
    [plain] = ours(model, planned(model, greedy=True), PROMPTS[0])
    text = text.format(*plain)
    plan = planned(model, f"{name}={text}", **(beside or {"greedy": True}))
    value = getattr(plan.settings, name)
    prompts = [*PROMPTS, PROMPTS[0] + model.tokenizer.decode(plain)]  # one that holds what is likely next
    expected = [theirs(model, prompt, **{name: value}, **beside) for prompt in prompts]
    together = ours(model, plan, *prompts)
    assert together == expected
    assert [ours(model, plan, prompt)[0] for prompt in prompts] == together
    if not beside:
        assert together != ours(model, planned(model, greedy=True), *prompts)


# At these values one token is left, the most likely, but for eta: what is then left depends on the entropy.
NEARLY_GREEDY = {"top_h": "0.000001", "epsilon_cutoff": "0.999999", "eta_cutoff": "0.999999"}


@pytest.mark.parametrize("name", NEARLY_GREEDY)
def test_samplers(causal: Model, name: str) -> None:
    plan = planned(causal, f"{name}={NEARLY_GREEDY[name]}", temperature=1.0)
    assert plan.sample and getattr(plan.settings, name) == float(NEARLY_GREEDY[name])
    found = ours(causal, plan, *PROMPTS)
    assert name == "eta_cutoff" or found == ours(causal, planned(causal, greedy=True), *PROMPTS)
    assert found != ours(causal, planned(causal, temperature=1.0), *PROMPTS)


def test_rows_that_end_at_different_places_all_end_so(causal: Model) -> None:
    """forced_eos_token_id with --max-length, which leaves short prompts more room."""
    plan = sampling.plan(
        DecodingConfig(max_length=40, greedy=True, set=("forced_eos_token_id=3",)), causal, silent
    )
    together = ours(causal, plan, *PROMPTS)
    assert [tokens[-1] for tokens in together] == [3, 3, 0]  # the last ends by itself
    assert together == [ours(causal, plan, prompt)[0] for prompt in PROMPTS]


def test_the_token_that_begins_a_text(causal: Model) -> None:
    """bos_token_id stands where there is no prompt."""
    ids = torch.tensor([[7]])
    expected = causal.net.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False
    )
    assert ours(causal, planned(causal, "bos_token_id=7", greedy=True), "") == [expected[0, 1:].tolist()]
    assert ours(causal, planned(causal, greedy=True), "") != [expected[0, 1:].tolist()]


def test_the_token_that_pads(causal: Model) -> None:
    """pad_token_id changes no text."""
    plan = planned(causal, "pad_token_id=5", greedy=True)
    assert plan.pad == 5
    assert ours(causal, plan, *PROMPTS) == ours(causal, planned(causal, greedy=True), *PROMPTS)


# A draft of random weights is never sure.
BOLD = ("assistant_confidence_threshold=0.000001", "num_assistant_tokens=3")

# Field -> values whose guesses differ in number, what stands beside it.
GUESSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "prompt_lookup_num_tokens": ("1", "4", {}),
    "max_matching_ngram_size": ("1", "4", {"prompt_lookup": 4}),
    "assistant_early_exit": ("1", "2", {}),
    "num_assistant_tokens": ("1", "6", {"draft_model": "x", "set": BOLD[:1]}),
    "num_assistant_tokens_schedule": ("constant", "heuristic", {"draft_model": "x", "set": BOLD}),
    "assistant_confidence_threshold": ("0.001", "0.9999", {"draft_model": "x"}),
    "assistant_ensemble_weight": ("0.999", "0.001", {"draft_model": "x"}),
}


@pytest.mark.parametrize("name", GUESSES)
def test_guesses(causal: Model, tmp_path: Path, small_model: Any, name: str) -> None:
    """They change what is computed and not what is said, but for the weight of the draft's own opinion."""
    *values, beside = GUESSES[name]
    draft: Any = loaded(small_model("tiny")).net if "draft_model" in beside else None
    plain = ours(causal, planned(causal, greedy=True), *PROMPTS)
    passes = []
    for value in values:
        plan = planned(causal, f"{name}={value}", greedy=True, **dict(beside))
        assert plan.settings.to_dict()[name] == (
            float(value) if "." in value else int(value) if value.isdigit() else value
        )
        before = draft and draft.generation_config.to_dict()
        seen: list[int] = []
        hook = (draft or causal.net).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        text = ours(causal, plan, *PROMPTS, draft=draft)
        hook.remove()
        passes.append(len(seen))
        assert text == plain or (name, value) == ("assistant_ensemble_weight", "0.001")
        assert before == (draft and draft.generation_config.to_dict())
    assert passes[0] != passes[1]


@pytest.mark.parametrize("name", fields.NEEDS)
def test_a_field_without_what_it_needs_is_refused(causal: Model, seq2seq: Model, name: str) -> None:
    model = causal if "without" not in fields.NEEDS[name] else seq2seq
    value = {
        "early_stopping": "never",
        "renormalize_logits": "true",
        "num_assistant_tokens_schedule": "constant",
    }
    text = value.get(name, "0.5" if "assistant" in name and "num" not in name else "1")
    with pytest.raises(UsageError, match=f"needs {fields.NEEDS[name]}") as caught:
        planned(model, f"{name}={text}")
    assert caught.value.name == "E-CONFLICT"
