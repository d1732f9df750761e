"""How far speed is from what this machine can do at most, on the CPU or on a CUDA device, in bfloat16.

Decoding can be no faster than its weights are read, a prompt no faster than its operations are done.
Both rates are measured here, with nothing around them; the figures are time over the least time, all of them printed.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import decode, generate, peers
from benchmarks.runner import Ratio, Run

CONTEXT = 4 + 128 // 2  # tokens behind which one more is generated, on average


def run(quick: bool, only: str | None = None) -> Iterator[list[Ratio]]:
    """Each row as soon as it is measured, behind the rates that it is held against."""
    with tempfile.TemporaryDirectory() as scratch:
        parts = generate.Parts(Path(scratch))
        for step in peers.chosen(ROWS, only):
            yield [step(parts, 1 if quick else 3)]


def bandwidth(placement: Any, elements: int = 1 << 27) -> float:
    """Bytes a second that are read: the sum of so many numbers of 4 bytes, more than caches hold."""
    import torch

    numbers = torch.ones(elements, device=placement.device)
    return 4 * elements / _least(numbers.sum, placement)


def matrix_rate(placement: Any, width: int = 4096) -> float:
    """Operations a second of a product of two square matrices in the placement's dtype."""
    import torch

    one, other = (torch.randn(width, width, device=placement.device, dtype=placement.dtype) for _ in range(2))
    return 2 * width**3 / _least(lambda: one @ other, placement)


def _least(run: Callable[[], object], placement: Any) -> float:
    """Seconds of one run in the best of three measurements: a limit is what the machine can do undisturbed."""
    from textgen_cli.model import speed

    return min(speed.mean(run, placement, speed.SECONDS) for _ in range(3))


def decoding(parts: generate.Parts, rounds: int) -> Ratio:
    """One stream of 128 tokens, over the bytes of its weights and keys."""
    from textgen_cli.model import cost

    network, placement = _network()
    rate = bandwidth(placement)
    size = cost.token_bytes(network, _work(CONTEXT))
    print(f"{placement.device}: reads {rate / 1e9:,.0f} GB/s, {size / 1e6:,.0f} MB a token")
    ours = parts.ours(parts.work("one", ["Once upon a time"], 128))
    return _against(f"one stream, bfloat16, {placement.device} / its bytes", ours, size / rate, rounds)


def compiled(parts: generate.Parts, rounds: int) -> Ratio:
    """The same by the compiled model in 8 bits; these run on the CPU so far."""
    from textgen_cli.config import ModelConfig
    from textgen_cli.model import cost, device

    network, _ = _network()
    rate = bandwidth(device.place(ModelConfig(device="cpu", dtype="bfloat16"), "generate"))
    # A byte for each number of the matrices; that a head and its table are two there is memory, and not read.
    size = cost.token_bytes(network, _work(CONTEXT)) - network.weights.matrices
    print(f"cpu: reads {rate / 1e9:,.0f} GB/s, {size / 1e6:,.0f} MB a token")
    decode.made_ready()
    ours = decode.ours(parts.work("one", ["Once upon a time"], 128), "int8", "bfloat16")
    return _against("one stream, compiled int8, cpu / its bytes", ours, size / rate, rounds)


def prompt(parts: generate.Parts, rounds: int) -> Ratio:
    """1,600 tokens of a prompt, over their operations; the head computes the last one alone."""
    from textgen_cli.model import cost

    network, placement = _network()
    rate = matrix_rate(placement)
    tokens = generate.PROMPT_TOKENS
    count = cost.operations(network, _work(tokens))["flops"]
    count -= 2 * (tokens - 1) * network.vocabulary * network.sizes.hidden
    print(f"{placement.device}: {rate / 1e9:,.0f} GFLOP/s, {count / 1e9:,.0f} GFLOP a prompt")
    ours = parts.ours(parts.long_prompt())
    return _against(
        f"prompt of 1,600 tokens, bfloat16, {placement.device} / its operations", ours, count / rate, rounds
    )


ROWS: dict[str, Callable[[generate.Parts, int], Ratio]] = {
    "decoding": decoding,
    "compiled": compiled,
    "prompt": prompt,
}


def _against(name: str, ours: Callable[[], Run], least: float, rounds: int) -> Ratio:
    measured = [ours() for _ in range(rounds)]
    return Ratio(f"{name} (printed)", measured, [Run(least, 0, "")] * rounds, math.inf)


def _network() -> tuple[Any, Any]:
    """The default model as arithmetic knows it, and where it runs."""
    from textgen_cli.config import ModelConfig
    from textgen_cli.download.work import network_of
    from textgen_cli.events import silent
    from textgen_cli.model import device
    from textgen_cli.model.inspect import inspect

    config = ModelConfig(dtype="bfloat16")
    return network_of(inspect(config, silent)), device.place(config, "generate")


def _work(tokens: int) -> Any:
    """A row of so many tokens."""
    from textgen_cli.model.cost import Work

    return Work(job="generate", batch=1, length=tokens, dtype="bfloat16")
