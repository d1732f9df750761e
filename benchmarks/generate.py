"""How fast text comes once the model is loaded: one stream, a batch, a file of mixed lengths, a long prompt.

The peers are a hand-written transformers batch on the same folder and llama.cpp (the xllamacpp wheel in an
environment of its own) on the same GGUF file. All run on a CUDA device where one is present, but llama.cpp, whose
wheel computes on the CPU. A round is a process of its own; its clock starts behind the load
and a warm-up. Figures are seconds for a token, ours / peer, so 0.4 is 2.5 times the speed.
"""

import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.archives import members
from benchmarks.peers import timed
from benchmarks.runner import Ratio, Run, compare
from textgen_cli.config import ModelConfig
from textgen_cli.model import device

OURS = """
import json, sys, time
from textgen_cli.config import DecodingConfig, GenerateConfig, ModelConfig
from textgen_cli.events import silent
from textgen_cli.generate import many
from textgen_cli.generate.engines import open_engine
from textgen_cli.text import flow
from textgen_cli.text.records import Record
folder, work, dtype, quantize = sys.argv[1:]
work = json.load(open(work))
n = work["tokens"]
config = GenerateConfig(
    model=ModelConfig(model=folder, dtype=dtype, quantize=quantize or None),
    decoding=DecodingConfig(greedy=True, max_new_tokens=n, min_new_tokens=n),
)
opened = open_engine(config, 0, silent)
def run(prompts):
    records = [Record(i, {"prompt": p}) for i, p in enumerate(prompts)]
    groups = flow.results(records, 0, flow.WINDOW, lambda: opened, many.window)
    found = [fields for group in groups for result in group for fields in result.outputs]
    return sum(o["completion_tokens"] for o in found), [o["text"] for o in found]
run(work["warm"])
start = time.perf_counter()
tokens, texts = run(work["prompts"])
print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens, "texts": texts[:4]}))
"""

PLAIN = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, work, dtype, batch = sys.argv[1:]
work = json.load(open(work))
n, batch = work["tokens"], int(batch)
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
def run(prompts):
    count, texts = 0, []
    for start in range(0, len(prompts), batch):
        inputs = tokenizer(prompts[start : start + batch], return_tensors="pt", padding=True).to(device)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=n, min_new_tokens=n)
        new = out[:, inputs["input_ids"].shape[1] :]
        count += new.numel()
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return count, texts
run(work["warm"])
start = time.perf_counter()
tokens, texts = run(work["prompts"])
print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens, "texts": texts[:4]}))
"""

LLAMA = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
import xllamacpp
gguf, work, parallel, threads = sys.argv[1:]
work = json.load(open(work))
n, parallel = work["tokens"], int(parallel)
params = xllamacpp.CommonParams()
params.model.path = gguf
params.n_parallel = parallel
params.n_ctx = parallel * (work["longest"] + n + 16)
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
server = xllamacpp.Server(params)
def one(prompt):
    asked = {"prompt": prompt, "max_tokens": n, "temperature": 0, "ignore_eos": True}
    return server.handle_completions(asked)["usage"]["completion_tokens"]
for prompt in work["warm"]:
    one(prompt)
start = time.perf_counter()
with ThreadPoolExecutor(parallel) as pool:
    tokens = sum(pool.map(one, work["prompts"]))
print("\\n" + json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens, "texts": []}))
"""

WORDS = [
    "the",
    "old",
    "river",
    "runs",
    "past",
    "a",
    "quiet",
    "town",
    "where",
    "nobody",
    "counts",
    "the",
    "hours",
    "and",
    "the",
    "mill",
    "turns",
    "slowly",
]
PARALLEL = (1, 8, 16, 32, 64)
PROMPT_TOKENS = 1600


def run(quick: bool, only: str | None = None) -> Iterator[list[Ratio]]:
    """The comparisons, one table after another."""
    with tempfile.TemporaryDirectory() as scratch:
        parts = Parts(Path(scratch))
        for step in peers.chosen(ROWS, only):
            yield step(parts, quick)


class Parts:
    """What the sides share: the model as a folder and as a GGUF file, the peer's environment, the work."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch

    @cached_property
    def folder(self) -> str:
        """The model as a folder."""
        return peers.folder()

    @cached_property
    def gguf(self) -> str:
        """The model as a GGUF file."""
        return peers.gguf()

    @cached_property
    def llama(self) -> str:
        """The Python that has llama.cpp."""
        return peers.llama_cpp()

    def work(self, name: str, prompts: list[str], tokens: int, warm: Sequence[str] = ()) -> str:
        """A file that says what both sides generate, and what before the clock begins: else the first two of it."""
        path = self.scratch / f"{name}.json"
        longest = max(len(prompt.split()) for prompt in prompts) * 2
        said = {"prompts": prompts, "warm": list(warm) or prompts[:2], "tokens": tokens, "longest": longest}
        path.write_text(json.dumps(said))
        return str(path)

    def long_prompt(self) -> str:
        """1,600 tokens of real prose and one token to generate; other prose goes before, so that nothing is known."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(Path(self.folder) / "tokenizer.json"))
        ((_, content),) = members("plays", suffix="hamlet_gut.txt")
        words = content.decode("latin-1").split()
        prompts = [_of_tokens(words[start:], PROMPT_TOKENS, tokenizer) for start in (5_000, 10_000)]
        return self.work("long", prompts[1:], 1, warm=prompts[:1])

    def ours(self, work: str, dtype: str = "bfloat16", quantize: str = "") -> Callable[[], Run]:
        """Our side of a piece of work."""
        return timed([sys.executable, "-c", OURS, self.folder, work, dtype, quantize])

    def plain(self, work: str, batch_size: int, dtype: str = "bfloat16") -> Callable[[], Run]:
        """The hand-written transformers loop, in file order."""
        return timed([sys.executable, "-c", PLAIN, self.folder, work, dtype, str(batch_size)])

    def llama_cpp(self, work: str, parallel: int) -> Callable[[], Run]:
        """llama.cpp with so many sequences at once."""
        return timed([self.llama, "-c", LLAMA, self.gguf, work, str(parallel), str(peers.threads())])


def one_stream(parts: Parts, quick: bool) -> list[Ratio]:
    """128 tokens in one stream."""
    work = parts.work("one", ["Once upon a time"], 128)
    _same_work(parts.ours(work, "float32")(), parts.plain(work, 1, "float32")())
    plain, eight = parts.plain(work, 1), parts.ours(work, quantize="int8")
    sides = {
        "one stream, 128 tokens, bfloat16 / plain, bfloat16": (parts.ours(work), plain, 1.0),
        "the same, int8 and bfloat16 / plain, bfloat16": (eight, plain, 0.5),
        "the same / llama.cpp, Q4_1 (printed)": (eight, parts.llama_cpp(work, 1), math.inf),
    }
    return [
        compare(name, ours, peer, rounds=3 if quick else 7, target=target)
        for name, (ours, peer, target) in sides.items()
    ]


def quantized(parts: Parts, quick: bool) -> list[Ratio]:
    """128 tokens in one stream, in the dtype that is chosen where none is asked for."""
    work = parts.work("quantized", ["Once upon a time"], 128)
    chosen = device.place(ModelConfig(), "generate").dtype
    dtype = str(chosen).removeprefix("torch.")
    plain = parts.plain(work, 1, dtype)
    return [
        compare(f"one stream, {form}, default dtype / plain, {dtype}", parts.ours(work, "auto", form), plain,
                rounds=3 if quick else 5, target=1.0)
        for form in ("int8", "int4")
    ]  # fmt: skip


def batch(parts: Parts, quick: bool) -> list[Ratio]:
    """64 prompts with 64 new tokens each."""
    work = parts.work("batch", [f"Story number {n}: once upon a time" for n in range(64)], 64)
    best = min(
        PARALLEL[1::2] if quick else PARALLEL, key=lambda parallel: parts.llama_cpp(work, parallel)().seconds
    )
    print(f"llama.cpp is fastest with {best} sequences at once")
    rounds = 2 if quick else 5
    return [
        compare("64 x 64, bfloat16 / plain batch of 64, bfloat16", parts.ours(work), parts.plain(work, 64),
                rounds=rounds, target=1.0),
        compare(f"64 x 64, bfloat16 / llama.cpp with {best} at once, Q4_1", parts.ours(work),
                parts.llama_cpp(work, best), rounds=rounds, target=0.4),
    ]  # fmt: skip


def mixed(parts: Parts, quick: bool) -> list[Ratio]:
    """512 prompts of 4 to 260 words, 16 new tokens each, in no order."""
    lengths = [4 + (number * 89) % 257 for number in range(128 if quick else 512)]
    prompts = [" ".join((WORDS * 20)[n % 7 : n % 7 + length]) for n, length in enumerate(lengths)]
    work = parts.work("mixed", prompts, 16)
    rounds = 1 if quick else 3
    name = f"{len(prompts)} mixed lengths, bfloat16 / plain batches of 64 in file order, bfloat16"
    return [compare(name, parts.ours(work), parts.plain(work, 64), rounds=rounds, target=1 / 1.5)]


def first_token(parts: Parts, quick: bool) -> list[Ratio]:
    """A prompt of 1,600 tokens to its first token."""
    work = parts.long_prompt()
    _same_work(parts.ours(work, "float32")(), parts.plain(work, 1, "float32")())
    rounds = 3 if quick else 7
    return [
        compare("prompt of 1,600 tokens to first token, bfloat16 / llama.cpp, Q4_1", parts.ours(work),
                parts.llama_cpp(work, 1), rounds=rounds, target=0.5),
        compare("the same / plain, bfloat16 (printed)", parts.ours(work), parts.plain(work, 1),
                rounds=rounds, target=math.inf),
    ]  # fmt: skip


def _of_tokens(words: Sequence[str], tokens: int, tokenizer: Any) -> str:
    """The text of the words as far as it comes to so many tokens. RuntimeError where no cut does."""
    text = " ".join(words[:tokens])
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:tokens]
    found: str = tokenizer.decode(ids)
    if len(tokenizer.encode(found, add_special_tokens=False).ids) != tokens:
        raise RuntimeError("the prompt of the benchmark has another length than it must have")
    return found


ROWS: dict[str, Callable[[Parts, bool], list[Ratio]]] = {
    "one": one_stream,
    "quantized": quantized,
    "batch": batch,
    "mixed": mixed,
    "prompt": first_token,
}


def _same_work(ours: Run, peer: Run) -> None:
    """Raise RuntimeError unless both gave the same number of tokens and the same greedy texts."""
    if ours.output != peer.output:
        raise RuntimeError(f"the sides disagree:\nours: {ours.output}\npeer: {peer.output}")
    print("same greedy text on both sides in float32")
