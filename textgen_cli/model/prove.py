"""The proof of a compiled model: what it chooses, token by token, is what its weights choose in float32."""

import copy
import json
from pathlib import Path
from typing import Any

import torch

from textgen_cli.errors import ModelError
from textgen_cli.events import Notice, Progress, Report
from textgen_cli.model.compiled import FACTS, Network
from textgen_cli.model.loaded import Model
from textgen_cli.model.quantize import QuantizedLinear

PROOF_TOKENS = 24  # generated behind each prompt of the proof
# How far logits may be off those of the same weights in float32, as a share of their own spread (one standard
# deviation), and so what counts as a tie. In bfloat16 the network itself, not compiled, is off by 0.4.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.05}
PROOFS = ("Once upon a time", "The capital of France is", "1, 2, 3, 4,", "def add(a, b):\n", "a")


def prove(folder: Path, model: Model, report: Report) -> None:
    """Text behind each prompt: the compiled choice is that of the same weights in float32, or a tie with it.

    Raises ModelError E-COMPILE where logits are off by more than TOLERANCES, in standard deviations of the true ones.
    """
    report(Progress("prove", model.name))
    net, reference = Network(folder, json.loads((folder / FACTS).read_bytes())), _exact(model.net)
    tolerance, worst = TOLERANCES[model.placement.dtype], 0.0
    rows = net.get_input_embeddings().weight.shape[0]
    for text in PROOFS:
        ids = [one % rows for one in model.tokenizer.encode(text)] or [0]
        start = len(ids)
        alone: list[torch.Tensor] = []
        for _ in range(PROOF_TOKENS if model.context is None else min(PROOF_TOKENS, model.context - start)):
            alone.append(net.logits(ids))
            ids.append(int(alone[-1].argmax()))
        with torch.inference_mode():
            kept = {"use_cache": False, "logits_to_keep": len(alone)}
            true = reference(input_ids=torch.tensor([ids[:-1]]), **kept).logits[0].float()  # (T, V)
        net.logits(ids[:start])
        together = net.logits(ids[: start + 1], ids[start + 1 : -1])  # (T - 1, V)
        worst = max(worst, _apart(torch.cat(alone), true), _apart(together, true[1:]))
        if worst > tolerance:
            fact = f"compiled logits are off by {worst:.2g} of their spread, {tolerance:g} is allowed"
            raise ModelError("E-COMPILE", model.name, fact, hint="--engine eager runs it as it is")
    report(Notice(f"{model.name}: compiled; logits differ by at most {worst:.2g} of their spread"))


def _apart(ours: torch.Tensor, true: torch.Tensor) -> float:
    """How far rows of logits (T, V) are off at most, and how far behind the best their choice is, in spreads."""
    spread = true.std(dim=-1).clamp_min(1e-6)  # (T,)
    off = (ours - true).abs().amax(dim=-1).nan_to_num(torch.inf)
    behind = true.amax(dim=-1) - true.gather(1, ours.argmax(dim=-1)[:, None])[:, 0]
    return float((torch.maximum(off, behind) / spread).amax())


def _exact(net: Any) -> Any:
    """The same weights computing in float32."""
    exact = copy.deepcopy(net).float()
    for layer in exact.modules():
        if isinstance(layer, QuantizedLinear):
            layer.way = "turned back"
    return exact
