"""How long an explanation takes: a text of 50 tokens under the default model, one process a round.

The peer is one forward pass over the same rows at once, logits and all: as many as the method computes (texts with a
token left out, points on a path, layers). The clock stands behind the load and a first pass of each.
"""

import json
import sys
from collections.abc import Iterator

from benchmarks.runner import Ratio, Run, Side

TARGET = 20.0
PROGRAM = """
import json, sys, time
import torch
from textgen_cli.config import ExplainConfig, ModelConfig, ScoreConfig
from textgen_cli.events import silent
from textgen_cli.score.request import Asked
from textgen_cli.score.scorers import open_scorer
(method,) = sys.argv[1:]
words = "The old keeper of the lighthouse climbed the stairs every evening to light the lamp, and the ships that "
words += "passed far out at sea knew by its beam that somebody was still awake on the island, whatever the weather "
words += "might be that night or the next"
scorer = open_scorer(ScoreConfig(explaining=ExplainConfig(explain=method)), silent)
network, tokenizer = scorer.explainer.network, scorer.explainer.model.tokenizer
ids = tokenizer.encode(words)[:50]
asked = [Asked(0, tokenizer.decode(ids))]
whole = torch.tensor([[network.model.tokenizer.backend.bos_token_id, *ids]])
passed = 0
def count(module, args, kwargs):
    global passed
    ids = kwargs["input_ids"]
    passed += ids.shape[0] if ids.shape[1] > 8 else 0  # a short one is the head by itself
handle = network.net.base_model.register_forward_pre_hook(count, with_kwargs=True)
def explain():
    (_, found), = scorer.score(asked)
    return found["explanation"]
(_, found), = scorer.scorer.score(asked)
with torch.no_grad():
    network.net(input_ids=whole)
passed = 0
start = time.perf_counter()
explain()
ours, rows = time.perf_counter() - start, passed
handle.remove()
start = time.perf_counter()
with torch.no_grad():
    for at in range(0, rows, 32):
        network.net(input_ids=whole.expand(min(32, rows - at), -1), use_cache=False)
peer = time.perf_counter() - start
print(json.dumps({"ours": ours, "peer": peer, "rows": rows}))
"""
METHODS = ("gradient", "attention", "occlusion", "logit-lens", "contrast", "integrated-gradients")


def run(quick: bool) -> Iterator[list[Ratio]]:
    """Every method in one table."""
    yield [_ratio(method, 1 if quick else 3) for method in METHODS]


def _ratio(method: str, rounds: int) -> Ratio:
    """Rounds of a process each; both sides are timed in the same one."""
    done = [Side(method, [sys.executable, "-c", PROGRAM, method])() for _ in range(rounds)]
    said = [json.loads(run.output.splitlines()[-1]) for run in done]
    ours, peer = (
        [Run(told[side], run.peak, run.output) for told, run in zip(said, done, strict=True)]
        for side in ("ours", "peer")
    )
    return Ratio(f"{method}: {said[0]['rows']} rows / one pass over them", ours, peer, TARGET)
