"""Compiled decoding of one stream: against llama.cpp, plain transformers, and the plain script from a cold start.

The compiled models are made in the cache, unless they are there: that takes some minutes. Rates are taken after loading
and a warm-up, in a process each; figures are seconds for a token, ours / peer.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import generate, peers, score, startup
from benchmarks.runner import Ratio, Run, Side, compare

OURS = """
import json, random, sys, time
from types import SimpleNamespace
from textgen_cli.config import ModelConfig
from textgen_cli.events import silent
from textgen_cli.generate.compiled import Settings, steps
from textgen_cli.generate.rows import Row
from textgen_cli.model.compiled import find, open_model
work, quantize, dtype, lookup = sys.argv[1:]
work = json.load(open(work))
config = ModelConfig(quantize=quantize or None, dtype=dtype)
model = open_model(find(config, silent), config)
plan = SimpleNamespace(settings=Settings(prompt_lookup_num_tokens=int(lookup) or None), sample=False)
def run(prompt, tokens):
    model.net.ids = []
    row = Row(list(prompt), tokens, random.Random(0))
    for step in steps(model.net, [row], plan):
        row.tokens.append(step.tokens[0])
        row.done = len(row.tokens) >= tokens
    return row.tokens
prompt = model.tokenizer.encode(work["prompts"][0])
run(prompt, 16)
start = time.perf_counter()
new = run(prompt, work["tokens"])
print(json.dumps({"seconds": time.perf_counter() - start, "tokens": len(new), "texts": [model.tokenizer.decode(new)]}))
"""

BITS = """
import json, math, sys
import torch
from textgen_cli.config import ModelConfig
from textgen_cli.events import silent
from textgen_cli.model.compiled import find, open_model
from textgen_cli.model.load import load
texts = json.load(open(sys.argv[1]))
config = ModelConfig(quantize=sys.argv[2], dtype="bfloat16")
ours = open_model(find(config, silent), config)
plain = load(ModelConfig(dtype="float32"), "score", silent)
sums, size = [0.0, 0.0], 0
for text in texts:
    ids = [0, *plain.tokenizer.encode(text)][:256]
    size += len(plain.tokenizer.decode(ids[1:]).encode())
    with torch.inference_mode():
        logs = plain.net(input_ids=torch.tensor([ids])).logits.float().log_softmax(-1)[0, :-1]
    sums[1] -= float(logs.gather(1, torch.tensor(ids[1:])[:, None]).sum())
    ours.net.ids = []
    for place in range(1, len(ids)):
        sums[0] -= float(ours.net.logits(ids[:place])[0].log_softmax(-1)[ids[place]])
print(json.dumps([total / math.log(2) / size for total in sums]))
"""


def run(quick: bool, only: str | None = None) -> Iterator[list[Ratio]]:
    """Rates, the cold start, and what int8 costs in bits per byte."""
    steps = peers.chosen(ROWS, only)
    made_ready()
    with tempfile.TemporaryDirectory() as scratch:
        parts = generate.Parts(Path(scratch))
        for step in steps:
            yield step(parts, quick)


def made_ready() -> None:
    """Compile what is not compiled yet."""
    narrow = [["--quantize", form, "--dtype", "bfloat16"] for form in ("int8", "int4")]
    for options in (*narrow, ["--dtype", "float32"]):
        subprocess.run(
            [startup.TEXTGEN, "download", "--compile", *options], check=True, stdout=subprocess.DEVNULL
        )


def rates(parts: generate.Parts, quick: bool) -> list[Ratio]:
    """128 tokens in one stream."""
    work = parts.work("one", ["Once upon a time"], 128)
    _same_text(ours(work, "", "float32")(), parts.plain(work, 1, "float32")())
    eight, four = ours(work, "int8", "bfloat16"), ours(work, "int4", "bfloat16")
    llama, plain = parts.llama_cpp(work, 1), parts.plain(work, 1)
    rows = [
        ("int8", eight, "llama.cpp, the same GGUF (Q4_1)", llama, 1.0),
        ("int8", eight, "plain, bfloat16", plain, 1 / 3),
        ("int8", eight, "eager, the same (printed)", parts.ours(work, quantize="int8"), math.inf),
        ("int4", four, "llama.cpp, the same GGUF (Q4_1)", llama, 1.0),
        ("int4", four, "eager, the same (printed)", parts.ours(work, quantize="int4"), math.inf),
    ]
    return [
        compare(
            f"compiled, {form} and bfloat16 / {name}", mine, peer, rounds=3 if quick else 7, target=target
        )
        for form, mine, name, peer, target in rows
    ]


def lookup(parts: generate.Parts, quick: bool) -> list[Ratio]:
    """128 tokens of a text that says again what it was given: prompt lookup against each token for itself."""
    given = "\n".join(score.prose(6)) + "\n\n"
    work = parts.work("again", [given * 2 + given[:40]], 128, warm=["Once upon a time"])
    _same_text(ours(work, "", "float32", 8)(), ours(work, "", "float32")())
    rounds = 3 if quick else 7
    llama = parts.llama_cpp(work, 1)
    return [
        compare(f"text that repeats, {form}, prompt lookup of 15 / {name}", ours(work, form, "bfloat16", 15),
                peer, rounds=rounds, target=target)
        for form in ("int8", "int4")
        for name, peer, target in [("without it (printed)", ours(work, form, "bfloat16"), math.inf),
                                   ("llama.cpp without it", llama, 1 / 1.3)]
    ]  # fmt: skip


def ours(work: str, quantize: str, dtype: str, lookup: int = 0) -> Callable[[], Run]:
    """The compiled network and its loop, without the text and the records around it."""
    return peers.timed([sys.executable, "-c", OURS, work, quantize, dtype, str(lookup)])


def cold(parts: generate.Parts, quick: bool) -> list[Ratio]:
    """A whole one-liner of 32 tokens."""
    ours = startup.generate("bfloat16", "--engine", "compiled", "--quantize", "int8")
    rounds = 3 if quick else 9
    return [
        compare("cold one-liner, compiled int8 / plain script, bfloat16", ours,
                startup.script(parts.folder, "bfloat16"), rounds=rounds, target=0.45),
        compare("cold one-liner, compiled int8 / llama.cpp, Q4_1 (printed)", ours,
                startup.llama_cpp(parts.llama, parts.gguf), rounds=rounds, target=math.inf),
    ]  # fmt: skip


def quality(parts: generate.Parts, quick: bool) -> list[Ratio]:
    """Bits per byte of compiled forms over those of float32, on real prose; the `seconds` are bits."""
    work = parts.scratch / "texts.json"
    work.write_text(json.dumps(score.prose(100 if quick else 1500)))
    rows = []
    for form, target in (("int8", 1.01), ("int4", math.inf)):
        found = Side("bits per byte", [sys.executable, "-c", BITS, str(work), form])()
        ours, peer = ([Run(bits, found.peak, "")] for bits in json.loads(found.output))
        rows.append(Ratio(f"bits per byte, compiled {form} / float32", ours, peer, target))
    return rows


ROWS: dict[str, Callable[[generate.Parts, bool], list[Ratio]]] = {
    "rates": rates,
    "lookup": lookup,
    "cold": cold,
    "quality": quality,
}


def _same_text(ours: Run, peer: Run) -> None:
    if json.loads(ours.output)[1] != json.loads(peer.output)[1]:
        raise RuntimeError(f"the sides disagree:\nours: {ours.output}\npeer: {peer.output}")
    print("same greedy text on both sides in float32")
