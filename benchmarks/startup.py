"""How fast the program starts: help and errors, a first answer of a cached model, a load once converted.

The peers are what anybody would write instead: importing the two libraries of the face, and the short script
with AutoTokenizer and AutoModelForCausalLM on the folder that `textgen download` prints.
"""

import math
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import peers
from benchmarks.runner import Ratio, Run, Side, compare

ROOT = Path(__file__).parent.parent
TEXTGEN = str(Path(sysconfig.get_path("scripts")) / "textgen")
PROMPT = "Once upon a time"
TOKENS = 32
OFFLINE = {"HF_HUB_OFFLINE": "1"}

FACE = Side("import typer, rich.console", [sys.executable, "-c", "import typer, rich.console"])
COMPLETE = {"_TEXTGEN_COMPLETE": "complete_bash", "COMP_WORDS": "textgen generate --max", "COMP_CWORD": "2"}
LIGHT = (
    Side("--help", [TEXTGEN, "--help"]),
    Side("--version", [TEXTGEN, "--version"]),
    Side("bash completion", [TEXTGEN], COMPLETE),
    Side("usage error", [TEXTGEN, "generate", "--no-such-option"], code=2),
)

PLAIN = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, tokens, dtype = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
inputs = tokenizer(prompt, return_tensors="pt").to(device)
output = model.generate(**inputs, max_new_tokens=int(tokens), do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""

# A user would write this: the same prompt, so many tokens, the likeliest each time; nothing is warm.
LLAMA = """
import json, sys
import xllamacpp
gguf, prompt, tokens, threads = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path = gguf
params.n_parallel = 1
params.n_ctx = 512
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
server = xllamacpp.Server(params)
found = server.handle_completions({"prompt": prompt, "max_tokens": int(tokens), "temperature": 0, "ignore_eos": True})
assert found["usage"]["completion_tokens"] == int(tokens)
print(found["choices"][0]["text"])
"""

LOAD = """
import gc
gc.disable()  # as the program's entry does
import sys, time
from pathlib import Path
from textgen_cli.config import ModelConfig
from textgen_cli.events import Progress
from textgen_cli.model import lean
lean.allowed = True  # so does this
with lean.without_compiler():
    from textgen_cli.model import load
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # else imported at first use
start = converting = time.perf_counter()
converts = False
def report(event):
    # Fetching is the network's time: a second clock starts when the conversion begins.
    global converting, converts
    if isinstance(event, Progress) and event.stage == "convert" and not converts:
        converting, converts = time.perf_counter(), True
lean.load(ModelConfig(cache_dir=Path(sys.argv[1])), "generate", report)
end = time.perf_counter()
print(converts, end - start, end - converting)
"""


def run(quick: bool, only: str | None = None) -> Iterator[list[Ratio]]:
    """The comparisons, one table after another."""
    return (step(quick) for step in peers.chosen(ROWS, only))


def light(quick: bool) -> list[Ratio]:
    """What needs no model, against importing the libraries of the face.

    Raises RuntimeError where torch is imported.
    """
    for side in LIGHT:
        log = Side(side.name, ["sh", "-c", '"$@" 2>&1', "sh", *side.argv],
                   {**(side.env or {}), "PYTHONPROFILEIMPORTTIME": "1"}, side.code)  # fmt: skip
        modules = {line.rpartition("|")[2].strip() for line in log().output.splitlines()}
        if "torch" in modules or "typer" not in modules:
            raise RuntimeError(f"{side.name}: torch is imported, or the import log cannot be read")
    print("torch imported: no, in " + ", ".join(side.name for side in LIGHT))
    rounds = 5 if quick else 15
    return [compare(side.name, side, FACE, rounds=rounds, target=2.5) for side in LIGHT]


def cold(quick: bool) -> list[Ratio]:
    """A whole first answer of the cached default model, against the plain script on the same folder."""
    folder = peers.folder()
    ratios = []
    for dtype in ("float32", "auto"):
        ours, peer = generate(dtype), script(folder, dtype)
        if dtype == "float32":
            same_work(ours(), peer())
        name = f"cold generate, {dtype} / plain script, {dtype}"
        target = 0.75 if dtype == "float32" else 0.6
        ratios.append(compare(name, ours, peer, rounds=3 if quick else 9, target=target))
    return ratios


def cold_llama(quick: bool) -> list[Ratio]:
    """A whole first answer against llama.cpp through Python: import, load, and as many tokens."""
    peer = llama_cpp(peers.llama_cpp(), peers.gguf())
    rounds = 3 if quick else 9
    return [
        compare("cold generate, bfloat16 / llama.cpp, Q4_1 (printed)", generate("bfloat16"), peer,
                rounds=rounds, target=math.inf),
    ]  # fmt: skip


def generate(dtype: str, *options: str) -> Side:
    """The program's side of the cold start."""
    argv = [TEXTGEN, "generate", PROMPT, "-n", str(TOKENS), "--greedy", "--dtype", dtype, *options]
    return Side("textgen generate", argv, OFFLINE)


def script(folder: str, dtype: str) -> Side:
    """The plain script's."""
    argv = [sys.executable, "-c", PLAIN, folder, PROMPT, str(TOKENS), dtype]
    return Side("plain script", argv, OFFLINE)


def llama_cpp(python: str, gguf: str) -> Side:
    """llama.cpp's, on as many threads."""
    return Side("llama.cpp", [python, "-c", LLAMA, gguf, PROMPT, str(TOKENS), str(peers.threads())])


def same_work(ours: Run, peer: Run) -> None:
    """Raise RuntimeError unless both wrote the same continuation (ours may leave out the prompt)."""
    text = peer.output.strip()
    if ours.output.strip() not in (text, text.removeprefix(PROMPT).strip()):
        raise RuntimeError(f"the sides disagree:\nours: {ours.output!r}\npeer: {peer.output!r}")
    print(f"same greedy text on both sides in float32: {text[:60]!r}...")


def second_load(quick: bool) -> list[Ratio]:
    """load() of the converted model against the first run, the one that fetches and converts it.

    Two more rows, printed, hold it against the first load alone, without imports and text, and leave the fetching
    out of that, which is the network's and pip's time.
    """
    firsts, fetching, converting, seconds = [], [], [], []
    for _ in range(1 if quick else 3):
        with tempfile.TemporaryDirectory() as cache:
            firsts.append(Side("first run", [*generate("auto").argv, "--cache-dir", cache])())
            seconds.append(loading(cache, converts=False)[0])
        with tempfile.TemporaryDirectory() as cache:
            whole, conversion = loading(cache, converts=True)
            fetching.append(whole)
            converting.append(conversion)
    return [
        Ratio("second load / first run: fetch, convert, load, 32 tokens", seconds, firsts, 1 / 20),
        Ratio("second load / fetch, convert and load (printed)", seconds, fetching, math.inf),
        Ratio("second load / convert and load (printed)", seconds, converting, math.inf),
    ]


ROWS: dict[str, Callable[[bool], list[Ratio]]] = {
    "light": light,
    "cold": cold,
    "cold-llama": cold_llama,
    "second": second_load,
}


def loading(cache: str, *, converts: bool) -> tuple[Run, Run]:
    """One load in a process of its own, timed inside it: all of it, and from the conversion on.

    Raises RuntimeError where it converts against expectation.
    """
    side = Side("load", [sys.executable, "-c", LOAD, cache], {"PYTHONPATH": str(ROOT)})
    done = side()
    converted, whole, conversion = done.output.split()
    if (converted == "True") != converts:
        raise RuntimeError(f"load: converted={converted}, expected {converts}")
    return Run(float(whole), done.peak, done.output), Run(float(conversion), done.peak, done.output)
