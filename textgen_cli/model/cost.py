"""What work with a network takes: memory at its peak and floating-point operations. Pure arithmetic.

Running, in bytes of b a number, with W the weights, S those in the files, B rows of T tokens:

    loading     W where the files have the dtype that is computed in, else S + W: they are mapped beside the copy
    cache       2·L·K·B·T·b             keys and values (`anatomy.cache_elements`)
    passing     B·T · (8·H + 6·I) · b   what one layer holds while the prompt or a text goes through it
    logits      what is made at once of them: a row each while generating, 2 million and their copies in float32 else

    peak = libraries + max(loading, W + cache + passing + logits)

Learning, of P parameters in float32 of which R learn:

    weights     4·P; 2·P where an adapter learns beside weights in bfloat16; codes for QLoRA, which are made of such
    optimizer   8·R: the two moments of AdamW
    gradients   4·R: they grow while the way back takes activations away
    activations what each layer keeps for the way back (`kept`, `kept_beside` an adapter), or with gradient
                checkpointing its input alone and one layer whole, which is there when the logits are gone
    logits      12 bytes each: log-softmax and two gradients in float32; LEARNT of B·T·V at one time where the network
                learns without all of them, as causal ones do but for those that bound them; 0 where a head is small

    peak = libraries + weights + optimizer + 1.25 · max(activations + logits + head's gradient, gradients + one layer)

Operations: 2 a weight and token forward, 4 backward, 2 of these for the gradient of weights that learn: 6·M·D for D
tokens where all learn, 4·M·D beside an adapter, 2·M·D more with gradient checkpointing; attention likewise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from textgen_cli.model import anatomy
from textgen_cli.model.anatomy import Sizes, Weights
from textgen_cli.model.family import Family

Job = Literal["generate", "score", "finetune"]
Method = Literal["full", "lora", "qlora"]

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # names of safetensors
SCORED_TOKENS = 2048  # of a batch that score computes at once, where no text has more
SCORED_LOGITS = 2_000_000 * 4 * 4  # bytes: `head.CHUNK` logits in float32, and what is made of them
LEARNT = 8_000_000  # logits of a training at one time: what finetune's headloss.py has as CHUNK
RANK = 16
SLACK = 1.25  # what comes and goes at every step leaves holes that the allocator keeps; measured on CPUs


@dataclass(frozen=True)
class Network:
    """What the arithmetic has to know of a network."""

    config: Mapping[str, Any]
    family: Family
    sizes: Sizes
    weights: Weights

    @property
    def vocabulary(self) -> int:
        """Outputs of the head for each token; 0 where it judges instead of speaking."""
        return self.sizes.vocabulary if self.family in ("causal", "masked", "seq2seq") else 0

    @property
    def layers(self) -> int:
        """Of all stacks."""
        return self.sizes.layers + self.sizes.encoder_layers


@dataclass(frozen=True)
class Work:
    """What is to be done, on one device."""

    job: Job
    batch: int  # rows computed together
    length: int  # tokens of a row
    dtype: str  # that is computed in
    quantize: Literal["int8", "int4"] | None = None
    method: Method = "full"
    recompute: bool = False  # gradient checkpointing
    rank: int = RANK  # of an adapter
    mapped: bool = True  # whether files are mapped into the memory that is spoken of
    copied: bool = False  # the files are a copy in the form that is computed in

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.batch * self.length

    @property
    def number(self) -> int:
        """Bytes of a number."""
        return BYTES[self.dtype]


def memory(network: Network, work: Work, libraries: int = 0) -> dict[str, int]:
    """Bytes at the peak, and its parts; not all parts are there at one time."""
    if work.job == "finetune":
        return learning(network, work, learns(network, work), libraries)
    held = _held(network, work, work.quantize)
    passing = _passing(network.sizes, work)
    parts = {
        "libraries": libraries,
        "weights": held,
        "loading": _loading(network.weights, work, held),
        "cache": _cache(network, work),
        "activations": passing,
        "logits": _logits(network, work),
    }
    running = held + parts["cache"] + passing + parts["logits"]
    return {"peak": libraries + max(parts["loading"], running), **parts}


def learns(network: Network, work: Work) -> int:
    """Parameters that learn."""
    return network.weights.total if work.method == "full" else work.rank * network.weights.widths


def learning(
    network: Network, work: Work, learn: int, libraries: int = 0, held: int | None = None
) -> dict[str, int]:
    """The peak of a training in bytes and its parts; `learn`: parameters that do, `held`: bytes of the weights."""
    total = network.weights.total
    made = 0  # of what is there before the weights are as they are to be
    if held is None:
        form = (work.quantize or "int4") if work.method == "qlora" else None
        held = 4 * total if work.method == "full" else _held(network, work, form) + 4 * learn
        made = _loading(network.weights, work, held) if form and work.mapped else 0
        # Autocast keeps the weights in 16 bits beside those in 32 while it goes forward.
        held += 2 * network.weights.linear_count if work.method == "full" and work.number == 2 else 0
    lean = work.method == "lora" and not work.recompute
    of_token = (kept_beside if lean else kept)(network, work.length)
    layer = round(work.tokens * of_token * work.number)
    stream = work.tokens * network.sizes.hidden * work.number
    inputs = network.layers * stream
    activations = inputs + layer if work.recompute else network.layers * layer
    head = 4 * network.sizes.hidden * network.vocabulary if learn == total else 0
    parts = {
        "libraries": libraries,
        "weights": held,
        "optimizer": 8 * learn,
        "gradients": 4 * learn,
        "activations": activations,
        "logits": 12 * _learnt_logits(network, work),
    }
    with_logits = (inputs if work.recompute else activations) + parts["logits"] + head
    moving = round(SLACK * max(with_logits, activations, parts["gradients"] + layer))
    return {"peak": libraries + max(made, held + parts["optimizer"] + moving), **parts}


def _held(network: Network, work: Work, form: Literal["int8", "int4"] | None) -> int:
    """Bytes of weights that do not learn."""
    if form is None:
        return work.number * network.weights.total
    codes, rest = network.weights.linear[form], network.weights.total - network.weights.linear_count
    # Scales and offsets, a fifth of int4, are in the dtype that is computed in, and so is what is no linear layer.
    scales = codes // 5 if form == "int4" else 0
    return codes - scales + scales * work.number // 2 + work.number * rest


def _learnt_logits(network: Network, work: Work) -> int:
    """That are there at once."""
    whole = work.tokens * network.vocabulary
    bound = anatomy.inner_config(network.config).get("final_logit_softcapping")
    return whole if network.family != "causal" or bound else min(whole, max(LEARNT, network.vocabulary))


def _matrix(network: Network, length: int) -> float:
    """Numbers of a token for which attention that drops weights, as no kernel does, keeps the matrix of T·T."""
    own, found = anatomy.inner_config(network.config), network.sizes
    dropped = any(isinstance(own.get(name), float) and own[name] > 0 for name in _ATTENTION_DROPOUTS)
    return 2.25 * found.heads * length + 4.5 * found.hidden if dropped else 0  # and scaled queries and keys


def kept_beside(network: Network, length: int) -> float:
    """As `kept`, beside an adapter, where results of norms, activations and gates are made again.

    What goes into two norms; queries, keys, values and what attention makes of them, twice; one or two widths within.
    """
    found = network.sizes
    attention = found.heads * (found.key + 2 * found.value) + found.kv_heads * (found.key + found.value)
    stream = 2 * found.hidden + attention + _matrix(network, length)
    crossed = (attention + found.hidden) * found.layers / network.layers if found.encoder_layers else 0
    return stream + crossed + (2 if network.weights.gated else 1) * found.inner


def kept(network: Network, length: int) -> float:
    """Numbers that a layer keeps of a token for the way back, with rows of so many tokens."""
    own, found = anatomy.inner_config(network.config), network.sizes
    rooted = "rms_norm_eps" in own or "t5" in str(own.get("model_type"))
    matrix = _matrix(network, length)
    stream = (9.5 + rooted) * found.hidden
    crossed = (matrix + 7 * found.hidden) * found.layers / network.layers if found.encoder_layers else 0
    act = str(next((own[name] for name in _ACTIVATIONS if own.get(name)), None))
    return stream + matrix + crossed + (4 if network.weights.gated else _KEPT_BY.get(act, 2)) * found.inner


_ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "dropout_rate")
_ACTIVATIONS = ("hidden_act", "activation_function", "dense_act_fn", "activation")
_KEPT_BY = {
    "gelu_new": 5
}  # computed in steps, each of which is kept; of others what goes in and what comes out


def _passing(found: Sizes, work: Work) -> int:
    tokens = work.tokens
    if work.job == "score":
        tokens = min(tokens, max(SCORED_TOKENS, work.length))
    return tokens * (8 * found.hidden + 6 * found.inner) * work.number


def _loading(weights: Weights, work: Work, held: int) -> int:
    """In 8 and 4 bits, too, all weights are there in 16 or 32 at first, but for a copy that has been made so."""
    if work.copied:
        return held
    plain = work.number * weights.total
    same = any(STORED.get(dtype) == work.dtype for dtype in weights.stored)
    return plain if same or not work.mapped else plain + sum(weights.stored.values())


def _cache(network: Network, work: Work) -> int:
    if work.job != "generate" or network.family not in ("causal", "seq2seq"):
        return 0
    once = anatomy.cache_elements(network.sizes, work.length) * work.batch * work.number
    return once * (2 if network.family == "seq2seq" else 1)  # as many for the source


def _logits(network: Network, work: Work) -> int:
    if work.job == "generate":
        return work.batch * network.vocabulary * 4 * 2
    return min(SCORED_LOGITS, work.tokens * network.vocabulary * 16)


# --- operations


def operations(network: Network, work: Work) -> dict[str, Any]:
    """Floating-point operations of a batch: of all its tokens once, for training forth and back."""
    found, weights = network.sizes, network.weights
    # On average a token sees half of what is before it; a layer without a mask, all.
    seen = work.length // 2 if network.family == "causal" else work.length
    forward = work.tokens * anatomy.flops(weights, found, max(1, seen))
    if found.encoder_layers:
        attention = 4 * found.encoder_layers * found.heads * found.key * work.length
        forward += work.tokens * (2 * weights.encoder + attention)
    if work.job != "finetune":
        return {"flops": forward, "formula": "2·M·D + attention"}
    times = (3 if work.method == "full" else 2) + (1 if work.recompute else 0)
    return {"flops": times * forward, "formula": f"{2 * times}·M·D + attention"}


def token_bytes(network: Network, work: Work) -> int:
    """Bytes that are read to generate one more token of each row: the weights of all matrices and the cache."""
    held = _held(network, work, work.quantize)
    share = min(1.0, network.weights.matrices / max(1, network.weights.total))
    return round(held * share) + _cache(network, work)


# --- what would make it fit


def ways(network: Network, work: Work, libraries: int, free: int) -> list[dict[str, Any]]:
    """What to change so that the work fits into so many bytes; each step keeps those before it, the last one fits.

    Empty where it fits already. Where nothing helps, the last one is the smallest there is.
    """
    found: list[dict[str, Any]] = []
    if memory(network, work, libraries)["peak"] <= free:
        return found
    said: list[str] = []
    for word, change in _changes(work):
        smaller = replace(work, **change)
        if smaller == work:
            continue
        peak = memory(network, smaller, libraries)["peak"]
        before = memory(network, work, libraries)["peak"]
        if peak - libraries > WORTH * (before - libraries):
            continue
        # Of two copies the smaller one is meant.
        work, said = smaller, [*(old for old in said if not (COPY in word and COPY in old)), word]
        found.append({"change": ", ".join(said), "peak": peak, "fits": peak <= free})
        if peak <= free:
            break
    return found


Change = tuple[str, dict[str, Any]]


COPY = "a copy of download"
WORTH = 0.97  # a change that saves less is not told


def _changes(work: Work) -> list[Change]:
    """The options that save memory, those first that change the least."""
    batch: Change = ("--batch-size 1", {"batch": 1})
    half: Change = ("--dtype bfloat16", {"dtype": "bfloat16"})
    if work.job == "finetune":
        return [
            batch,
            ("--recompute", {"recompute": True}),
            (f"--lora {work.rank}", {"method": "lora"}),
            half,
            (f"{COPY} --quantize int4", {"method": "qlora", "quantize": "int4", "copied": True}),
        ]
    word = f"{COPY} --convert --dtype bfloat16"
    copy: Change = (word, {"dtype": work.dtype if work.number == 2 else "bfloat16", "copied": True})
    codes: Change = (f"{COPY} --quantize int4", {"quantize": "int4", "copied": True})
    return [batch, half, copy, codes]


def default_batch(job: Job, length: int) -> int:
    """Rows of a batch where nobody asks for a number: as the commands choose on a CPU."""
    fitting = 1 if job == "generate" else SCORED_TOKENS // length
    return max(1, min(32, 1 << max(0, fitting.bit_length() - 1)))
